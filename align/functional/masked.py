"""Statistics over the valid entries of a mask, **on all ranks together**.

Every rank must call: with a process group of several ranks, each function waits for the others. The
results are statistics and carry no gradient. Entries where the mask is False are never read; they
may be NaN. Reduced precisions are summed in float32. Left out: masked sums of a single rank, which
need no function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch.distributed
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

_single: ContextVar[bool] = ContextVar("single", default=False)


@contextmanager
def single_process() -> Iterator[None]:
    """Treat this process as the only one inside the block.

    For work that ranks do not share, such as the training of one of several seeds.
    """
    token = _single.set(True)
    try:
        yield
    finally:
        _single.reset(token)


def ranks() -> int:
    """Number of ranks: 1 without a process group and inside :func:`single_process`."""
    if _single.get():
        return 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def sum_over_ranks(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum over the ranks, entry by entry: the same bits on every rank, and no gradient."""
    values = values.detach().clone()
    if ranks() > 1:
        torch.distributed.all_reduce(values)
    return values


def max_over_ranks(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Maximum over the ranks, entry by entry; no gradient."""
    values = values.detach().clone()
    if ranks() > 1:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def masked_var(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Population variance (divided by n, not n - 1) of the valid entries of all ranks.

    NaN without a valid entry.

    >>> masked_var(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(1.)
    """
    return _moments(values, mask).variance


def masked_whiten(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Shift and scale the valid entries of all ranks to mean 0 and variance 1; others become 0.

    ``eps`` is added to the variance, so that equal entries become 0 and not NaN.

    >>> masked_whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    mean, variance = _moments(values, mask)
    whitened = (_precise(values) - mean) * (variance + eps).rsqrt()
    return whitened.masked_fill(~mask, 0).to(values.dtype)


def masked_scale(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Scale the valid entries of all ranks to variance 1 and keep their mean; others become 0.

    For rewards, whose sign distinguishes good from bad: :func:`masked_whiten` would remove it.

    >>> masked_scale(torch.tensor([5.0, 9.0, 1.0]), torch.tensor([True, True, False]))
    tensor([6., 8., 0.])

    Source: Ziegler et al. 2019, arXiv:1909.08593, published code (``whiten(shift_mean=False)``).
    """
    mean, variance = _moments(values, mask)
    scaled = (_precise(values) - mean) * (variance + eps).rsqrt() + mean
    return scaled.masked_fill(~mask, 0).to(values.dtype)


class _Moments(NamedTuple):
    mean: Tensor
    variance: Tensor


def _moments(values: Tensor, mask: Tensor) -> _Moments:
    """Mean and variance in two passes: the mean of squares minus the squared mean would cancel."""
    values = _precise(values)
    total = torch.stack([values.masked_fill(~mask, 0).sum(), mask.sum().to(values.dtype)])
    total, count = sum_over_ranks(total)
    mean = total / count
    squares = (values - mean).square().masked_fill(~mask, 0).sum()
    return _Moments(mean, sum_over_ranks(squares) / count)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
