"""Layers compile under prefix sharing, for all batches at once, and few copies cross the device."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.prefix_models import (
    ROWS,
    SMALL,
    assert_close_in_norm,
    batch,
    gradients,
    hidden,
    model,
    varlen,
    weighted_sum,
    without_layout,
)
from torch._dynamo.utils import counters
from torch.testing import assert_close

from align.models.prefix_sharing import attention, row_attention, trie, wrapper

pytestmark = pytest.mark.filterwarnings(  # by the compiler, for the input of every layer
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forget compiled graphs before and after the test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_layers(causal_model: Any) -> None:
    """Compile each layer as one graph without breaks."""
    for layer in causal_model.base_model.layers:
        layer.compile(backend="aot_eager", dynamic=True, fullgraph=True)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_one_graph_of_a_layer_serves_all_layers_and_batches(monkeypatch):
    monkeypatch.setattr(wrapper._State, "log_fallback", lambda _, reason: pytest.fail(reason))
    padded = model("mistral", SMALL | {"sliding_window": 4})
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared)
    compile_layers(shared)
    for name, rows in ROWS.items():
        ids, mask = batch(rows, "right")
        actual, expected = hidden(shared, ids, mask), hidden(padded, ids, mask)
        assert_close(
            actual, expected, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert_close_in_norm(
            gradients(shared, weighted_sum(actual)), gradients(padded, weighted_sum(expected))
        )
    assert counters["stats"]["unique_graphs"] == 1


@torch.library.custom_op("tests::varlen_attn", mutates_args=())
def varlen_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    return varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window)


@varlen_operator.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    return torch.empty_like(q)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_one_graph_with_variable_length_attention_serves_all_batches(monkeypatch):
    monkeypatch.setattr(attention, "varlen_function", lambda: varlen_operator)
    monkeypatch.setattr(attention, "kernel_for", lambda query, layout: attention.attend_varlen)
    padded = model("llama", SMALL)
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared)
    compile_layers(shared)
    for rows in ROWS.values():
        ids, mask = batch(rows, "right")
        assert_close(hidden(shared, ids, mask), hidden(padded, ids, mask), rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_layers_that_ignore_the_layout_are_detected_in_the_first_call(caplog):
    causal_model = model("llama", SMALL, torch.float32)
    ids, mask = batch(ROWS["pairs"], "right")
    expected = hidden(causal_model, ids, mask)
    wrapper.enable_prefix_sharing(causal_model)
    layer = causal_model.base_model.layers[1].self_attn
    layer.forward = functools.partial(without_layout, layer.forward)
    for each in causal_model.base_model.layers:
        each.compile(backend="eager", dynamic=True)
    assert_close(hidden(causal_model, ids, mask), expected)
    assert "attention interface" in caplog.text


# The operator ------------------------------------------------------------------------------------


def attention_inputs(dtype: torch.dtype) -> tuple[list[torch.Tensor], trie.Layout]:
    """Query with four heads, key and value with two, and the layout of rows that share prefixes."""
    ids, mask = batch(ROWS["four completions of a prompt"], "right")
    layout = trie.build_layout(ids, mask, absolute=False)
    assert layout is not None
    generator = torch.Generator().manual_seed(0)
    n = len(layout.tokens)
    tensors = [
        torch.randn(1, heads, n, 8, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (4, 2, 2)
    ]
    return [tensor.requires_grad_() for tensor in tensors], layout


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_the_operator_has_the_values_and_gradients_of_attention_by_rows(window, scale):
    inputs, layout = attention_inputs(torch.float64)
    expected = row_attention.attend_by_row(*inputs, layout.plan, scale, window)
    actual = row_attention.attend_by_code(*inputs, layout.code, scale, window)
    assert torch.equal(actual, expected)
    weights = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).view_as(actual)
    first, second = (torch.autograd.grad(output, inputs, weights) for output in (expected, actual))
    for one, other in zip(first, second, strict=True):
        assert_close(other, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_have_the_strides_that_the_compiler_expects(dtype):
    inputs, layout = attention_inputs(dtype)
    # as layers pass them: the heads of a token are neighbors
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    output = row_attention.attend_by_row(*strided, layout.plan, None, None)
    arguments = (torch.ones_like(output), *strided, layout.code, None, None)
    backward = torch.ops.align.attend_by_code_backward
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        expected = backward(
            *(x if x is layout.code or x is None else mode.from_tensor(x) for x in arguments)
        )
    for gradient, fake in zip(backward(*arguments), expected, strict=True):
        assert (gradient.stride(), gradient.dtype) == (fake.stride(), fake.dtype)


def test_the_operator_is_a_valid_one():
    inputs, layout = attention_inputs(torch.float32)
    torch.library.opcheck(row_attention.attend_by_code, (*inputs, layout.code, None, 3))


def test_the_operator_computes_gradients_in_bfloat16():
    inputs, layout = attention_inputs(torch.bfloat16)
    output = row_attention.attend_by_code(*inputs, layout.code, None, None)
    gradient = torch.autograd.grad(output.sum(), inputs[2])[0]
    # The gradient of a sum over values is the sum of the attention weights, which is 1 per query.
    assert gradient.dtype == torch.bfloat16
    assert gradient.float().sum() / 8 == pytest.approx(output.shape[1] * 4, rel=1e-2)


# Copies ------------------------------------------------------------------------------------------


def test_a_layout_moves_to_a_device_in_one_copy(monkeypatch):
    ids, mask = batch(ROWS["pairs"], "right")
    layout, expected = (trie.build_layout(ids, mask, absolute=False) for _ in range(2))
    assert layout is not None
    copies = []
    move = trie.copy_to_device
    monkeypatch.setattr(trie, "copy_to_device", lambda *a: copies.append(a) or move(*a))
    layout.to(torch.device("meta"))
    monkeypatch.setattr(trie, "copy_to_device", lambda tensor, device: tensor.clone())
    moved = trie.build_layout(ids, mask, absolute=False)
    moved.to(torch.device("meta"))
    assert len(copies) == 1
    for name in ("tokens", "positions", "last", "places", "path", "ends"):
        original, on_meta = getattr(expected, name), getattr(layout, name)
        assert on_meta.device.type == "meta"
        assert (on_meta.shape, on_meta.dtype) == (original.shape, original.dtype)
        assert torch.equal(getattr(moved, name), original)


def test_the_host_waits_for_the_device_once_per_call(monkeypatch):
    import trl.trainer.utils as inside

    causal_model = model("llama", SMALL, torch.float32)
    inside.add_fused_lm_head(causal_model)
    wrapper.enable_prefix_sharing(causal_model)
    waits = []
    to_host = trie.copy_to_host
    monkeypatch.setattr(
        wrapper, "copy_to_host", lambda tensors: waits.append(len(tensors)) or to_host(tensors)
    )
    ids, mask = batch(ROWS["pairs"], "right")
    labels = ids.masked_fill(mask == 0, -100)
    causal_model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert waits == [3]
    causal_model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert waits == [3, 2]
