"""Attention over a packed trie of prefixes with one call of torch's attention per row.

Any device, any data type. A compiled layer calls it as one operator, ``align::attend_by_code``,
whose backward pass runs the rows again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from align.models.prefix_sharing.trie import Plan, Row


def attend_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with one call per row.

    Keys are split at the segments, so that the backward pass concatenates gradients; slices would
    each add a zero tensor of size N.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    keys, values = key.split(plan.segments, 2), value.split(plan.segments, 2)
    outputs = []
    for row, new in zip(plan.rows, query.split([row.new for row in plan.rows], 2), strict=True):
        plain = row.shared == 0 and (window is None or window >= row.new)
        output = scaled_dot_product_attention(
            new,
            _concatenate([keys[i] for i in row.segments]),
            _concatenate([values[i] for i in row.segments]),
            attn_mask=None if plain else _mask(plan, row, window, query),
            dropout_p=dropout,
            is_causal=plain,
            scale=scaling,
        )
        outputs.append(output.transpose(1, 2))
    return _concatenate(outputs, 1)


def _concatenate(pieces: list[Tensor], dim: int = 2) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _mask(plan: Plan, row: Row, window: int | None, like: Tensor) -> Tensor | None:
    """Additive causal mask, ``[new, shared + new]``, aligned at the bottom right; None if empty."""
    if row.new == 1 and (window is None or window > row.shared):
        return None

    def compute() -> Tensor:
        distance = torch.arange(row.shared, row.shared + row.new)[:, None] - torch.arange(
            row.shared + row.new
        )
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill(hidden, -torch.inf)

    key = (row.shared, row.new, window, like.dtype)
    return plan.cached(key, lambda: compute().to(like.device))


# The operator for compiled layers -----------------------------------------------------------------


@torch.library.custom_op("align::attend_by_code", mutates_args=())
def attend_by_code(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    code: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """:func:`attend_by_row` without dropout; ``code`` is the encoded plan."""
    plan = Plan.decode(code)
    return attend_by_row(query, key, value, plan, scaling, window).contiguous()


@attend_by_code.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    code: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    batch, heads, n, _ = query.shape
    return query.new_empty(batch, n, heads, value.shape[-1])


@torch.library.custom_op("align::attend_by_code_backward", mutates_args=())
def _attend_by_code_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    code: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Autograd does not record inside an operator, so the derivative is written out.
    plan = Plan.decode(code)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    inputs = (query, *(x.repeat_interleave(groups, 1) for x in (key, value)))
    q, k, v = (tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in inputs)
    gradient = gradient.transpose(1, 2).to(q.dtype)
    places = torch.arange(query.shape[2], device=query.device).split(plan.segments)
    # The compiler expects the strides of the function below: those of new, contiguous tensors.
    dq, dk, dv = (tensor.new_zeros(tensor.shape) for tensor in (q, k, v))
    end = 0
    for row in plan.rows:
        path = torch.cat([places[i] for i in row.segments])
        new = slice(end, end := end + row.new)
        keys, values, outer = k[:, :, path], v[:, :, path], gradient[:, :, new]
        scores = scale * q[:, :, new] @ keys.mT
        mask = _mask(plan, row, window, q)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        inner = outer @ values.mT
        d_scores = scale * weights * (inner - (weights * inner).sum(-1, keepdim=True))
        dq[:, :, new] = d_scores @ keys
        dk.index_add_(2, path, d_scores.mT @ q[:, :, new])
        dv.index_add_(2, path, weights.mT @ outer)
    shape = (key.shape[0], key.shape[1], groups, key.shape[2], -1)
    dk, dv = dk.view(shape).sum(2), dv.view(shape).sum(2)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


@_attend_by_code_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    code: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = _attend_by_code_backward(gradient, *tensors, ctx.scaling, ctx.window)
    return (*gradients, None, None, None)


attend_by_code.register_autograd(_backward, setup_context=_save)
