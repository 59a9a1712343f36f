"""Prefix sharing changes no hidden state, loss, gradient or file."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.distributed_training import Recorder
from helpers.prefix_models import (
    ROWS,
    SHARED,
    SMALL,
    P,
    assert_close_in_norm,
    batch,
    distinct,
    gradients,
    hidden,
    model,
    varlen,
    weighted_sum,
    without_layout,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.integrations.neftune import activate_neftune

from align.models.prefix_sharing import attention as prefix_sharing_attention
from align.models.prefix_sharing import trie, wrapper


def tokens_computed(causal_model: Any) -> list[int]:
    """The number of positions in each call of the first layer, appended during the calls."""
    seen: list[int] = []
    has_adapter = hasattr(causal_model, "peft_config")
    backbone = (causal_model.get_base_model() if has_adapter else causal_model).base_model
    layer = (backbone.layers if hasattr(backbone, "layers") else backbone.h)[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    return seen


@pytest.fixture
def fallbacks() -> Iterator[list[str]]:
    """Reasons of fallbacks, appended during the test."""
    recorder = Recorder()
    level = wrapper.LOGGER.level
    wrapper.LOGGER.addHandler(recorder)
    wrapper.LOGGER.setLevel(logging.DEBUG)
    yield recorder.reasons
    wrapper.LOGGER.setLevel(level)
    wrapper.LOGGER.removeHandler(recorder)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test as soon as a batch is not shared."""
    monkeypatch.setattr(wrapper._State, "log_fallback", lambda _, reason: pytest.fail(reason))


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute RMSNorm in float64: rounding to float32, as transformers does, hides small errors."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if hasattr(self, "variance_epsilon") else 1 + self.weight
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    for kind in (GemmaRMSNorm, Gemma3RMSNorm, LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


# The layout --------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=7),
    gaps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
)
def test_a_layout_is_the_trie_of_its_rows(rows, gaps):
    width = max(len(row) + gap for row, gap in zip(rows, gaps, strict=False)) + 1
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width)
    for b, row in enumerate(rows):
        ids[b, gaps[b] : gaps[b] + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[b, gaps[b] : gaps[b] + len(row)] = 1
    layout = trie.build_layout(ids, mask, absolute=False)
    assert layout is not None
    places = layout.places.view(len(rows), width).tolist()
    n = len(layout.tokens)
    nodes: dict[tuple[int, ...], int] = {}  # each distinct prefix, to its packed index
    for b, row in enumerate(rows):
        path = places[b][gaps[b] : gaps[b] + len(row)]
        assert layout.tokens[path].tolist() == row
        assert layout.positions[path].tolist() == list(range(len(row)))
        rest = places[b][: gaps[b]] + places[b][gaps[b] + len(row) :]
        assert rest == [n] * len(rest)
        for k, place in enumerate(path):
            assert nodes.setdefault(tuple(row[: k + 1]), place) == place
    assert sorted(nodes.values()) == list(range(n))
    attends = {(i, j) for a, i in nodes.items() for b, j in nodes.items() if a[: len(b)] == b}
    last = layout.last.tolist()
    assert attends == {(i, j) for i in range(n) for j in range(n) if j <= i <= last[j]}
    decoded = trie.Plan.decode(layout.code)
    assert (decoded.rows, decoded.segments) == (layout.plan.rows, layout.plan.segments)
    # the path of every row, from its segments and from the concatenated paths
    assert sum(layout.plan.segments) == n
    assert sum(row.new for row in layout.plan.rows) == n
    pieces = torch.arange(n).split(layout.plan.segments)
    paths = layout.path.split([row.shared + row.new for row in layout.plan.rows])
    end = 0
    for row, path in zip(layout.plan.rows, paths, strict=True):
        end += row.new
        assert torch.cat([pieces[i] for i in row.segments]).tolist() == path.tolist()
        assert path.tolist() == [j for j in range(n) if (end - 1, j) in attends]


# Equal to the padded forward ---------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("kind", "shape"), SHARED)
@pytest.mark.usefixtures("norms_in_float64", "no_fallback")
def test_hidden_states_and_gradients_are_those_of_the_padded_forward(kind, shape, side):
    padded = model(kind, shape)
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared)
    seen = tokens_computed(shared)
    for name, rows in ROWS.items():
        ids, mask = batch(rows, side)
        actual = hidden(shared, ids, mask)
        # GPT-2's positions are columns, so rows padded on the left share less.
        columns = kind == "gpt2" and side == "left"
        # Rotary positions that count from the first token change nothing except rounding.
        counted = {} if columns else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        expected = hidden(padded, ids, mask, **counted)
        assert_close(
            actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert_close(actual, hidden(padded, ids, mask), rtol=1e-5, atol=1e-5)
        assert columns or seen[-1] == distinct(rows), name
        assert_close_in_norm(
            gradients(shared, weighted_sum(actual)),
            gradients(padded, weighted_sum(expected)),
            tolerance=1e-9,
        )


@pytest.mark.usefixtures("no_fallback")
def test_a_batch_without_shared_tokens_runs_padded():
    shared = model("llama", SMALL)
    ids = torch.tensor([[1, 2, 3], [2, 3, 1]])
    expected = hidden(shared, ids, torch.ones_like(ids))
    wrapper.enable_prefix_sharing(shared)
    seen = []
    shared.base_model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    assert torch.equal(hidden(shared, ids, torch.ones_like(ids)), expected)
    assert seen == [(2, 3, 32)]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_same_layout_again(reentrant):
    padded = model("mistral", SMALL | {"sliding_window": 4}).train()
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared)
    for each in (padded, shared):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
    # inside the part that transformers 5.23 recomputes: hooks of the layer itself run in the first
    # pass only
    seen: list[int] = []
    shared.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[:2].numel())
    )
    ids, mask = batch(ROWS["pairs"], "right")
    first, second = (
        gradients(each, weighted_sum(hidden(each, ids, mask))) for each in (padded, shared)
    )
    assert_close_in_norm(second, first)
    assert seen == [distinct(ROWS["pairs"])] * 2


def test_all_ranks_detect_in_the_same_call_that_a_model_cannot_share(monkeypatch, fallbacks):
    # A rank that runs its layers twice (packed, then padded) next to a rank with nothing to pack
    # would never return.
    monkeypatch.setattr(wrapper, "several_processes", lambda: True)
    unable = model("llama", SMALL, torch.float32)
    attention = unable.model.layers[1].self_attn
    attention.forward = functools.partial(without_layout, attention.forward)
    wrapper.enable_prefix_sharing(unable)
    nothing_shared = torch.tensor([[5, 6, 7], [8, 9, 10]])
    seen = tokens_computed(unable)
    unable(input_ids=nothing_shared, use_cache=False)
    assert (seen, len(fallbacks)) == ([6, 6], 1)


@pytest.mark.usefixtures("no_fallback")
def test_until_a_model_has_shared_once_every_rank_packs_every_batch(monkeypatch):
    monkeypatch.setattr(wrapper, "several_processes", lambda: True)
    able = model("llama", SMALL, torch.float32)
    wrapper.enable_prefix_sharing(able)
    seen = tokens_computed(able)
    layouts = []
    able.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: layouts.append(kwargs.get("prefix_layout")), with_kwargs=True
    )
    for _ in range(2):
        able(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]), use_cache=False)
    assert seen == [6, 6]
    assert [layout is not None for layout in layouts] == [True, False]


@pytest.mark.usefixtures("no_fallback")
def test_an_adapter_gets_the_same_gradients():
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    padded = get_peft_model(model("llama", SMALL), config).double()
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared)
    seen = tokens_computed(shared)
    ids, mask = batch(ROWS["pairs"], "right")
    results = []
    for each in (padded, shared):
        logits = each(input_ids=ids, attention_mask=mask, use_cache=False).logits
        results.append(gradients(each, weighted_sum(logits * mask[..., None])))
    assert_close_in_norm(results[1], results[0])
    assert seen == [distinct(ROWS["pairs"])]
    with padded.disable_adapter(), shared.disable_adapter():
        assert_close(
            hidden(shared.get_base_model(), ids, mask), hidden(padded.get_base_model(), ids, mask)
        )


@pytest.mark.usefixtures("no_fallback")
def test_a_model_in_four_bits_computes_the_same(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model("llama", SMALL | {"hidden_size": 64}, torch.float32).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    padded, shared = (
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config) for _ in range(2)
    )
    wrapper.enable_prefix_sharing(shared)
    seen = tokens_computed(shared)
    ids, mask = batch(ROWS["pairs"], "right")
    assert_close(hidden(shared, ids, mask), hidden(padded, ids, mask), rtol=1e-4, atol=1e-4)
    assert seen == [distinct(ROWS["pairs"])]


# Attention functions for accelerators, run on the CPU ---------------------------------------------


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("function", ["attend_varlen", "attend_flex"])
@pytest.mark.parametrize(("kind", "shape"), SHARED)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_functions_for_accelerators_compute_the_same(kind, shape, function, monkeypatch):
    padded = model(kind, shape)
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared)
    monkeypatch.setattr(prefix_sharing_attention, "varlen_function", lambda: varlen)
    calls = []

    def accelerated(query, key, value, layout, scaling, window):
        calls.append(window)
        return getattr(prefix_sharing_attention, function)(
            query, key, value, layout, scaling, window
        )

    monkeypatch.setattr(prefix_sharing_attention, "kernel_for", lambda query, layout: accelerated)
    with torch.set_grad_enabled(
        function == "attend_varlen"
    ):  # FlexAttention has no backward on CPU
        for rows in ROWS.values():
            ids, mask = batch(rows, "right")
            expected, actual = hidden(padded, ids, mask), hidden(shared, ids, mask)
            assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            if actual.requires_grad:
                assert_close_in_norm(
                    gradients(shared, weighted_sum(actual)),
                    gradients(padded, weighted_sum(expected)),
                )
    assert len(calls) == 2 * len(ROWS)


def varlen_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    pytest.fail("this version has no sliding window")


def varlen_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    left, right = window_size
    assert right == 0
    window = None if left == -1 else left + 1
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window)


def varlen_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return varlen_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


@pytest.fixture
def varlen_signature(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Replaces ``torch.nn.attention.varlen.varlen_attn`` by a function of another version."""
    from torch.nn.attention import varlen as module

    prefix_sharing_attention.varlen_function.cache_clear()
    yield lambda function: monkeypatch.setattr(module, "varlen_attn", function)
    prefix_sharing_attention.varlen_function.cache_clear()


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize(("kind", "shape"), [SHARED[0], SHARED[2], SHARED[3]])
@pytest.mark.parametrize("function", [varlen_2_11, varlen_2_12], ids=["2.11", "2.12 to 2.14"])
def test_each_signature_of_varlen_attn_computes_the_same(
    function, kind, shape, varlen_signature, monkeypatch
):
    varlen_signature(function)
    padded = model(kind, shape)
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared)

    monkeypatch.setattr(
        prefix_sharing_attention,
        "kernel_for",
        lambda query, layout: prefix_sharing_attention.attend_varlen,
    )
    ids, mask = batch(ROWS["four completions of a prompt"], "right")
    actual, expected = hidden(shared, ids, mask), hidden(padded, ids, mask)
    assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert_close_in_norm(
        gradients(shared, weighted_sum(actual)), gradients(padded, weighted_sum(expected))
    )


@pytest.mark.parametrize("missing", ["a window (2.10)", "the module (2.8 and 2.9)"])
@pytest.mark.parametrize("has_flash_attention", [True, False])
def test_a_torch_without_windows_leaves_it_to_flash_attention_or_flex_attention(
    missing, has_flash_attention, varlen_signature, monkeypatch
):
    varlen_signature(varlen_2_10)
    absent = {"torch.nn.attention.varlen"} if "module" in missing else set()
    absent |= set() if has_flash_attention else {"flash_attn"}
    package = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else name)
    call = prefix_sharing_attention.varlen_function()
    assert (call is not None) == has_flash_attention
    layout = types.SimpleNamespace(varlen=call)
    query = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    kernel = prefix_sharing_attention.kernel_for(query, layout)
    assert kernel.__name__ == ("attend_varlen" if has_flash_attention else "attend_flex")
    if call is not None:
        x = torch.randn(3, 2, 4, dtype=torch.float64)
        ends = torch.tensor([0, 3], dtype=torch.int32)
        assert_close(
            call(x, x, x, ends, ends, 3, 3, 0.5, 2), varlen(x, x, x, ends, ends, 3, 3, 0.5, 2)
        )


def flash_attn_varlen_func(
    q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    assert causal
    return varlen_2_11(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window_size=window_size
    )


def test_under_autocast_accelerators_get_queries_keys_and_values_of_one_type(monkeypatch):
    layout = trie.build_layout(*batch(ROWS["pairs"], "right"), absolute=False)
    types = []

    def accelerated(query, key, value, layout, scaling, window):
        types.append([query.dtype, key.dtype, value.dtype])
        return query

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # not eager on a CPU
    monkeypatch.setattr(prefix_sharing_attention, "kernel_for", lambda query, layout: accelerated)
    rotated = torch.randn(1, 4, len(layout.tokens), 8)
    with torch.autocast("cpu", torch.bfloat16):
        value = rotated.to(torch.bfloat16)
        prefix_sharing_attention._attend(torch.nn.Module(), rotated, rotated, value, layout)
    assert types == [[torch.bfloat16] * 3]


# Fallbacks to the padded forward pass -------------------------------------------------------------


def holes(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, 1] = 0
    return mask


@pytest.mark.parametrize(("call", "reason"), [
    pytest.param(lambda m, x: m(x), "enables a key/value cache", id="a cache, by default"),
    pytest.param(lambda m, x: m(x, use_cache=True), "uses a key/value cache", id="a cache, as in generation"),
    pytest.param(lambda m, x: m(x, use_cache=False, output_hidden_states=True), "`output_hidden_states`", id="every layer's states"),
    pytest.param(lambda m, x: m(x, use_cache=False, attention_mask=holes(x)), "has holes", id="holes"),
    pytest.param(lambda m, x: m(x, use_cache=False, attention_mask=torch.ones(3, 1, 4, 4, dtype=torch.bool).tril()), "[batch, time]", id="a mask of pairs"),
    pytest.param(lambda m, x: m(x, use_cache=False, position_ids=torch.arange(4)[None] + 3), "`position_ids`", id="positions"),
    pytest.param(lambda m, x: m(inputs_embeds=m.get_input_embeddings()(x), use_cache=False), "`inputs_embeds`", id="embeddings"),
])  # fmt: skip
def test_calls_that_would_not_be_exact_run_padded_and_log_the_reason_once(call, reason, fallbacks):
    causal_model = model("llama", SMALL)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])
    expected = call(causal_model, ids).logits
    wrapper.enable_prefix_sharing(causal_model)
    assert torch.equal(call(causal_model, ids).logits, expected)
    call(causal_model, ids)
    assert len(fallbacks) == 1
    assert reason in fallbacks[0]


def test_a_fallback_is_a_warning_except_for_generation(caplog):
    causal_model = model("llama", SMALL, torch.float32)
    wrapper.enable_prefix_sharing(causal_model)
    causal_model.generate(input_ids=torch.tensor([P]), max_new_tokens=2)
    assert caplog.records == []
    causal_model(torch.tensor([P]), use_cache=False, output_hidden_states=True)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("align.prefix_sharing", "WARNING")


@pytest.mark.parametrize(("kind", "shape", "reason"), [
    pytest.param("llama", SMALL | {"attn_implementation": "eager"}, "eager", id="eager attention"),
    pytest.param("gemma2", SMALL, "soft-capped", id="soft-capping"),
    pytest.param("bloom", {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "positions", id="ALiBi"),
    pytest.param("llama", SMALL | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary", id="rotary embeddings that stretch"),
    pytest.param("lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}, "layers of type conv", id="convolutions"),
])  # fmt: skip
def test_models_that_cannot_share_run_padded_and_log_the_reason_once(
    kind, shape, reason, fallbacks
):
    causal_model = model(kind, shape, torch.float32)
    ids, mask = batch(ROWS["pairs"], "right")
    expected = hidden(causal_model, ids, mask)
    wrapper.enable_prefix_sharing(causal_model)
    assert torch.equal(hidden(causal_model, ids, mask), expected)
    hidden(causal_model, ids, mask)
    assert len(fallbacks) == 1
    assert reason in fallbacks[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter on the embeddings"])
def test_neftune_has_the_noise_of_a_padded_batch(lora, fallbacks):
    """NEFTune scales its noise by the row length; each row has other noise."""
    causal_model = model("llama", SMALL)
    if lora:
        config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
        causal_model = get_peft_model(causal_model, config)
    ids, mask = batch(ROWS["pairs"], "right")
    wrapper.enable_prefix_sharing(causal_model)
    handle = activate_neftune(causal_model, 10.0)
    seen = []
    causal_model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append((output - module.forward(*args)).detach())
    )
    causal_model.train()
    causal_model(input_ids=ids, attention_mask=mask, use_cache=False)
    (noise,) = seen
    bound = 10.0 / math.sqrt(ids.shape[1] * SMALL["hidden_size"])
    assert noise.shape[:2] == ids.shape
    assert 0.99 * bound < noise.abs().max() <= bound
    assert not torch.equal(noise[0, 0], noise[2, 0])  # both rows begin with the same token
    assert "neftune_post_forward_hook" in fallbacks[0]
    handle.remove()


def test_hooks_that_change_no_value_keep_sharing(fallbacks):
    causal_model = model("llama", SMALL)
    causal_model.enable_input_require_grads()  # registered by adapters with gradient checkpointing
    ids, mask = batch(ROWS["pairs"], "right")
    wrapper.enable_prefix_sharing(causal_model)
    seen = tokens_computed(causal_model)
    hidden(causal_model, ids, mask)
    assert seen == [distinct(ROWS["pairs"])]
    assert not fallbacks


@pytest.mark.parametrize("pre", [False, True], ids=["after", "before"])
def test_any_other_hook_on_the_embeddings_runs_padded(pre, fallbacks):
    causal_model = model("llama", SMALL)
    ids, mask = batch(ROWS["pairs"], "right")
    embeddings = causal_model.get_input_embeddings()
    if pre:  # rolls the tokens of the batch
        embeddings.register_forward_pre_hook(lambda module, args: (args[0].roll(1, 0),))
    else:
        embeddings.register_forward_hook(lambda module, args, output: output / output.shape[1])
    expected = hidden(causal_model, ids, mask)
    wrapper.enable_prefix_sharing(causal_model)
    assert torch.equal(hidden(causal_model, ids, mask), expected)
    assert "the embeddings have the hook" in fallbacks[0]


def test_layers_that_ignore_the_layout_are_detected(fallbacks):
    """Layers that never read the layout would let every row attend to the others."""
    causal_model = model("llama", SMALL)
    ids, mask = batch(ROWS["pairs"], "right")
    expected = hidden(causal_model, ids, mask)
    wrapper.enable_prefix_sharing(causal_model)
    attention = causal_model.base_model.layers[1].self_attn
    attention.forward = functools.partial(without_layout, attention.forward)
    assert torch.equal(hidden(causal_model, ids, mask), expected)
    assert "attention interface" in fallbacks[0]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_with_learned_prompts_run_padded(kind, fallbacks):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = get_peft_model(model("llama", SMALL, torch.float32), config)
    ids, mask = batch(ROWS["pairs"], "right")
    call = functools.partial(adapted, input_ids=ids, attention_mask=mask, use_cache=False)
    expected = call().logits
    wrapper.enable_prefix_sharing(adapted)
    assert torch.equal(call().logits, expected)
    assert len(fallbacks) == 1


# Side effects ------------------------------------------------------------------------------------


def test_generation_files_and_copies_do_not_change(tmp_path):
    causal_model = model("llama", SMALL, torch.float32)
    ids, mask = batch([P, P[:3]], "left", extra=0)
    sample = functools.partial(
        causal_model.generate,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
    )
    expected = sample()
    causal_model.save_pretrained(tmp_path / "before")
    wrapper.enable_prefix_sharing(causal_model)
    wrapper.enable_prefix_sharing(causal_model)
    causal_model.save_pretrained(tmp_path / "after")
    assert torch.equal(sample(), expected)
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("before", "after")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    other = copy.deepcopy(causal_model)
    assert other.base_model.prefix_sharing is not causal_model.base_model.prefix_sharing
    with torch.no_grad():
        for weight in causal_model.parameters():
            weight.zero_()
    ids, mask = batch(ROWS["pairs"], "right")
    seen = tokens_computed(other)  # a copy computes with its weights, and shares as well
    assert_close(hidden(other, ids, mask), hidden(plain, ids, mask), rtol=1e-4, atol=1e-5)
    assert seen == [distinct(ROWS["pairs"])]


@pytest.mark.parametrize("copied", [False, True], ids=["the model", "a copy"])
def test_disabling_restores_the_padded_forward_pass(copied):
    causal_model = model("llama", SMALL, torch.float32)
    attributes = vars(causal_model).keys(), vars(causal_model.base_model).keys()
    attributes = tuple(map(set, attributes))
    ids, mask = batch(ROWS["pairs"], "right")
    seen = tokens_computed(causal_model)
    wrapper.enable_prefix_sharing(causal_model)
    causal_model = copy.deepcopy(causal_model) if copied else causal_model
    seen = tokens_computed(causal_model) if copied else seen
    hidden(causal_model, ids, mask)
    wrapper.disable_prefix_sharing(causal_model, None)
    wrapper.disable_prefix_sharing(causal_model)
    hidden(causal_model, ids, mask)
    with wrapper.prefix_sharing(causal_model):
        hidden(causal_model, ids, mask)
    hidden(causal_model, ids, mask)
    assert seen == [distinct(ROWS["pairs"]), ids.numel()] * 2
    assert (set(vars(causal_model)), set(vars(causal_model.base_model))) == attributes
    assert not causal_model._forward_hooks
    assert not causal_model._forward_pre_hooks


def test_the_context_manager_changes_nothing_for_a_model_that_already_shares():
    causal_model = model("llama", SMALL, torch.float32)
    wrapper.enable_prefix_sharing(causal_model)
    ids, mask = batch(ROWS["pairs"], "right")
    seen = tokens_computed(causal_model)
    with wrapper.prefix_sharing(causal_model, None):
        hidden(causal_model, ids, mask)
    hidden(causal_model, ids, mask)
    assert seen == [distinct(ROWS["pairs"])] * 2


# TRL's trainers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


ARGUMENTS = tiny_models.TRAINER | {
    "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": "none", "use_cpu": True,
    "disable_tqdm": True, "log_level": "error", "dataloader_pin_memory": False,
}  # fmt: skip


def curve(
    world: tiny_models.World, folder: Path, kind: str, start: str, *, share: bool, **extra: Any
) -> list[dict[str, float]]:
    """Metrics that a trainer of TRL logs in 20 steps."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(world.sft)
    load = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    options = {"num_labels": 1} if kind == "Reward" else {}
    policy = load.from_pretrained(world.sft, **options)
    reference = (
        load.from_pretrained(world.sft) if kind in ("DPO", "KTO") and start == "full" else None
    )
    if reference is not None:  # otherwise policy and reference would agree on every pair at first
        with torch.no_grad():
            for weight in reference.parameters():
                weight += 0.02 * torch.randn_like(weight)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    if start == "trained adapter":
        policy = PeftModel.from_pretrained(policy, str(world.lora), is_trainable=True)
    rows = tiny_models.rows(world.data, "demonstrations-train" if kind == "SFT" else "pairs-train")
    keys = ("prompt", "completion") if kind == "SFT" else ("prompt", "chosen", "rejected")
    rows = [{key: row[key] for key in keys} for row in rows]
    if kind == "KTO":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    references = {"ref_model": reference} if kind in ("DPO", "KTO") else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=policy,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), seed=0, **ARGUMENTS | extra),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter if start == "new adapter" else None,
        **references,
    )
    if share:
        wrapper.enable_prefix_sharing(trainer.model, reference)
        seen = tokens_computed(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if share:
        assert len(seen) >= 20
    drop = ("runtime", "per_second", "total_flos", "epoch")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in drop)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(("kind", "start", "extra"), [
    pytest.param("DPO", "full", {}, id="DPO, full fine-tuning, a reference model"),
    pytest.param("DPO", "new adapter", {"gradient_checkpointing": True}, id="DPO, new adapter, checkpointing"),
    pytest.param("DPO", "trained adapter", {"learning_rate": 6.0e-4}, id="DPO, a trained adapter, its frozen copy as reference"),
    pytest.param("SFT", "full", {"completion_only_loss": False}, id="SFT, all tokens"),
    pytest.param("SFT", "new adapter", {"gradient_accumulation_steps": 2}, id="SFT, completions, accumulated"),
    pytest.param("Reward", "full", {}, id="reward model"),
    pytest.param("KTO", "full", {}, id="KTO"),
])  # fmt: skip
@pytest.mark.usefixtures("no_fallback")
def test_trainers_of_trl_follow_the_same_curve(kind, start, extra, world, tmp_path):
    plain, shared = (
        curve(world, tmp_path / str(share), kind, start, share=share, **extra)
        for share in (False, True)
    )
    assert len(plain) == len(shared) == 21
    losses = [[entry["loss"] for entry in run[:-1]] for run in (plain, shared)]
    assert max(losses[0]) - min(losses[0]) > 0.01, "a flat curve would prove nothing"
    for step, (a, b) in enumerate(zip(plain, shared, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4), f"step {step}: {key}"


@pytest.mark.parametrize("lora", [None, tiny_models.LORA], ids=["full fine-tuning", "adapter"])
def test_the_dpo_stage_shares_prefixes_by_default(lora, world, tmp_path):
    from align.config.training import DPO
    from align.stages import dpo

    results = {}
    for share in (True, False):
        option = {} if share else {"prefix_sharing": False}
        config = DPO(
            model="sft", lora=lora, trainer=tiny_models.TRAINER | {"max_steps": 3}, **option
        )
        inputs = {"model": world.sft, "pairs": world.data}
        trainer = dpo.build(config, inputs, tmp_path / str(share))
        seen = tokens_computed(trainer.model)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, batch)
        rows = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert seen[0] == (distinct(rows) if share else batch["input_ids"].numel())
        assert hasattr(trainer.model, "prefix_sharing_hooks") == share
        results[share] = loss, gradients(trainer.model, loss)
    assert_close(results[True][0], results[False][0])
    assert_close_in_norm(results[True][1], results[False][1], tolerance=1e-3)  # float32


@pytest.mark.parametrize("share", [True, False])
def test_the_sft_stage_shares_prefixes_by_default(share, world, tmp_path, monkeypatch):
    from align.config.training import SFT
    from align.stages import sft

    calls = []
    monkeypatch.setattr(wrapper, "enable_prefix_sharing", lambda *models: calls.append(models))
    option = {} if share else {"prefix_sharing": False}
    config = SFT(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 1}, **option)
    tiny_models.stage(sft, config, {"model": world.sft, "demonstrations": world.data}, tmp_path)
    assert len(calls) == share


@pytest.mark.usefixtures("no_fallback")
def test_log_probabilities_with_shared_prefixes_are_the_same(world):
    from align.models import loading, logps, tokenization

    rows = tiny_models.rows(world.data, "pairs-test")
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    tokenizer = tokenization.load_tokenizer(world.sft)
    results = []
    for share in (False, True):
        policy = loading.load_merged(world.sft, dtype="float32")
        if share:
            wrapper.enable_prefix_sharing(policy)
        seen = tokens_computed(policy)
        results.append((logps.completion_logps(policy, tokenizer, sides, batch_size=8), sum(seen)))
    assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-4)
    assert results[1][1] < 0.8 * results[0][1]


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2"], ids=["shared", "padded, since it cannot share"]
)
@pytest.mark.parametrize("triton", [False, True], ids=["every position", "as with Triton"])
def test_only_labeled_positions_reach_the_vocabulary(kind, triton, monkeypatch):
    import trl.kernels.chunked_logprob as tiles
    import trl.trainer.utils as inside

    # With Triton, TRL selects the labeled positions of what it receives. The tiles stay torch's.
    monkeypatch.setattr(inside, "_use_triton", lambda device: triton)
    monkeypatch.setattr(tiles, "TOKEN_CHUNK_SIZE", 3)  # several tiles
    causal_model = model(kind, SMALL, torch.float32)
    inside.add_fused_lm_head(
        causal_model, outputs=("log_probs", "entropy", "mean_logits", "is_top1")
    )
    ids, mask = batch(ROWS["pairs"], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    call = functools.partial(causal_model, input_ids=ids, attention_mask=mask, fused_lm_head=True)
    everywhere, nowhere = call(labels=labels), call(labels=torch.full_like(labels, -100))
    wrapper.enable_prefix_sharing(causal_model)
    rows = []
    apply = inside._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        inside._ChunkedLogProbFunction, "apply", lambda *a: rows.append(len(a[0])) or apply(*a)
    )
    for scored, expected in ((labels, everywhere), (torch.full_like(labels, -100), nowhere)):
        outputs = call(labels=scored)
        assert rows[-1] == (scored[:, 1:] != -100).sum()
        assert outputs.keys() == expected.keys()
        for key in outputs:
            assert_close(outputs[key], expected[key], rtol=1e-5, atol=1e-5)
        outputs.loss.backward()
    # a call without labels returns all positions, also after an error
    with pytest.raises((AttributeError, TypeError)):
        causal_model(input_ids="no tensor", labels=labels, fused_lm_head=True)
    assert causal_model(input_ids=ids, attention_mask=mask, use_cache=False).logits.shape == (
        *ids.shape,
        40,
    )
