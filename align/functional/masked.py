"""Statistics over the entries that a mask lets through, **on all ranks together**.

Every rank must call: with a process group of several, each function waits for the others. They are statistics, so no
gradient passes. What a mask hides is never read: it may be NaN. Reduced precisions are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch.distributed
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process is the only one: for work that it does not share, such as one seed of several."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def ranks() -> int:
    """How many processes there are; 1 without a process group, and for one that works :func:`alone`."""
    if _alone.get():
        return 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def sum_over_ranks(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Add up the ranks' values entry by entry: the same bits on every rank, and no gradient."""
    values = values.detach().clone()
    if ranks() > 1:
        torch.distributed.all_reduce(values)
    return values


def max_over_ranks(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Take the greatest of the ranks' values entry by entry; no gradient."""
    values = values.detach().clone()
    if ranks() > 1:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of the valid entries of all ranks; NaN where there is none.

    >>> masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return _moments(values, mask).mean


def masked_var(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Variance of the valid entries of all ranks, as of a population: divided by n, not by n - 1.

    >>> masked_var(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(1.)
    """
    return _moments(values, mask).variance


def masked_whiten(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Shift and scale the valid entries of all ranks to mean 0 and variance 1; the others become 0.

    ``eps`` is added to the variance: entries that are all alike become 0, not NaN.

    >>> masked_whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    mean, variance = _moments(values, mask)
    whitened = (_precise(values) - mean) * (variance + eps).rsqrt()
    return whitened.masked_fill(~mask, 0).to(values.dtype)


def masked_scale(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, eps: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """Scale the valid entries of all ranks to variance 1 around the mean that they have.

    For rewards: their sign against 0 tells good from bad, so :func:`masked_whiten` would lose something.

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
    """Mean and variance in two passes: the mean of squares less the square of the mean would cancel."""
    values = _precise(values)
    total = torch.stack([values.masked_fill(~mask, 0).sum(), mask.sum().to(values.dtype)])
    total, count = sum_over_ranks(total)
    mean = total / count
    squares = (values - mean).square().masked_fill(~mask, 0).sum()
    return _Moments(mean, sum_over_ranks(squares) / count)


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
