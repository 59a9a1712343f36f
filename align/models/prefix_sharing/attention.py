"""Attention over a packed trie of prefixes, registered with transformers' attention interface.

On CPU, torch's attention is called once per row. On CUDA, one variable-length call computes all
rows if the data type has 16 bits and torch or flash-attn provides the function; otherwise
FlexAttention is used. The tests replace the variable-length function by an equivalent one on the
CPU and run FlexAttention uncompiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from align.models.prefix_sharing.row_attention import attend_by_code, attend_by_row
from align.models.prefix_sharing.trie import Layout

# Arguments of a backbone or an attention function that do not change the result.
IGNORED_ARGUMENTS = {
    "num_items_in_batch", "position_ids", "position_embeddings", "use_cache", "cache_position",
    "past_key_values", "past_key_value", "layer_past", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict",
}  # fmt: skip


class CannotShare(Exception):  # noqa: N818 (not an error: the padded forward pass runs instead)
    """The reason for which a batch, or any batch of a model, is not shared."""


def intercept(implementation: str) -> None:
    """Make transformers' attention function of this name attend along a ``prefix_layout``.

    The name in the model's config does not change, and therefore neither do masks, generation and
    saved files. The layout is an argument of the layers, so gradient checkpointing passes it again
    when it recomputes a layer.
    """
    original = AttentionInterface._global_mapping[implementation]
    if hasattr(original, "shares_prefixes"):
        return

    @functools.wraps(original)
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        prefix_layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        if prefix_layout is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        if args or attention_mask.shape != (1, 1, 1, 1):
            raise CannotShare("the model changes its attention mask")
        return _attend(module, query, key, value, prefix_layout, **kwargs), None

    attend.shares_prefixes = True  # type: ignore[attr-defined]
    AttentionInterface.register(implementation, attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = 0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attend along the paths of a layout: ``[1, heads, N, size]`` to ``[1, N, heads, size]``.

    Raises:
        CannotShare: The attention function has an argument or property that a layout cannot
            represent.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:  # a compiled layer would be compiled again for each number
        layout.layers_run += 1
    if sliding_window == 0:  # the argument is missing
        if getattr(getattr(module, "config", None), "sliding_window", None):
            raise CannotShare("the sliding window is only in the attention mask")
        sliding_window = None
    unknown = [k for k, v in kwargs.items() if k not in IGNORED_ARGUMENTS and v is not None]
    if unknown:
        raise CannotShare(f"the attention function has the argument `{unknown[0]}`")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise CannotShare("the attention is not causal")
    if query.shape[2] != key.shape[2]:
        raise CannotShare("keys and queries have different lengths")
    eager_on_cpu = query.device.type == "cpu" and not compiling  # torch's attention casts them
    if torch.is_autocast_enabled(query.device.type) and not eager_on_cpu:
        # Rotary embeddings leave queries and keys in float32, and values in the lower precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if dropout:
        rows: Any = torch.compiler.disable(attend_by_row) if compiling else attend_by_row
        return rows(query, key, value, layout.plan, scaling, sliding_window, dropout)
    return kernel_for(query, layout)(query, key, value, layout, scaling, sliding_window)


Kernel = Callable[[Tensor, Tensor, Tensor, Layout, float | None, int | None], Tensor]


def kernel_for(query: Tensor, layout: Layout) -> Kernel:
    """The attention function without dropout for the device and the data type of a query."""
    if query.device.type != "cuda":
        return attend_compiled_rows if torch.compiler.is_compiling() else attend_rows
    if query.dtype in (torch.bfloat16, torch.float16) and layout.varlen is not None:
        return attend_varlen
    return torch.compiler.disable(attend_flex) if torch.compiler.is_compiling() else attend_flex


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention with one call per row."""
    return attend_by_row(query, key, value, layout.plan, scaling, window)


def attend_compiled_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same as one operator of a compiled graph."""
    return attend_by_code(query, key, value, layout.code, scaling, window)


@functools.cache
def varlen_function() -> Callable[..., Any] | None:
    """Variable-length attention, causal from the bottom right; None if no library provides it.

    Its arguments are ``(q, k, v, cu_q, cu_k, max_q, max_k, scale, window)``.

    torch's function exists from version 2.10 on and is used from 2.11 on, where it has a scale and
    a window. Version 2.12 added ``enable_gqa``; 2.11 accepts fewer heads of keys without it. The
    flash-attn package is used from version 2.1 on: before, it aligned the mask at the top left.
    """
    import importlib.util
    import inspect

    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        parameters = inspect.signature(varlen_attn).parameters
        if {"window_size", "scale"} <= parameters.keys():
            has_gqa_flag = "enable_gqa" in parameters
            return lambda q, k, v, cu_q, cu_k, max_q, max_k, scale, window: varlen_attn(
                q, k, v, cu_q, cu_k, max_q, max_k, scale=scale,
                window_size=(-1 if window is None else window - 1, 0),
                **({"enable_gqa": q.shape[1] != k.shape[1]} if has_gqa_flag else {}),
            )  # fmt: skip
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, cu_q, cu_k, max_q, max_k, scale, window: flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True,
            window_size=(-1 if window is None else window - 1, 0),
        )  # fmt: skip
    return None


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention in one call for all rows, with keys gathered along the path of each row."""
    call = layout.varlen
    assert call is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k, v = k.index_select(0, layout.path), v.index_select(0, layout.path)
    sizes = layout.longest_new, layout.longest
    return call(q.contiguous(), k, v, *layout.ends, *sizes, scaling, window)[None]


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """FlexAttention over the packed sequence; two comparisons per pair of tokens give the mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    last, positions = layout.last, layout.positions

    def attends(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ancestor = (j <= i) & (i <= last[j])
        return ancestor if window is None else ancestor & (positions[i] - positions[j] < window)

    n = query.shape[2]
    blocks = layout.plan.cached(
        ("flex", window), lambda: create_block_mask(attends, None, None, n, n, device=query.device)
    )
    flex: Any = _compiled(flex_attention) if query.device.type == "cuda" else flex_attention
    grouped = query.shape[1] != key.shape[1]
    output = flex(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
