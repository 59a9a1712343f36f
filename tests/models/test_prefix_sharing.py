"""Prefix sharing changes the work, not the result: hidden states, losses, gradients and files are the padded forward's."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from align.models.prefix_sharing import attention as prefix_sharing_attention
from align.models.prefix_sharing import trie, wrapper

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # narrow models look alike at 0.02, whatever the code does
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SHARED = [
    pytest.param("llama", SMALL, id="Llama, grouped queries"),
    pytest.param("qwen3", SMALL, id="Qwen3, norms of queries and keys"),
    pytest.param("gpt2", GPT2, id="GPT-2, absolute positions"),
    pytest.param("mistral", SMALL | {"sliding_window": 4}, id="Mistral, sliding window"),
    pytest.param(
        "gemma3_text",
        SMALL | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        id="Gemma 3, a window in every other layer, two rotary embeddings",
    ),
    pytest.param("gemma", SMALL, id="Gemma, one head of keys"),
]
P = [5, 6, 7, 8, 9, 10, 11]  # longer than the windows
ROWS = {
    "pairs": [[*P, 1, 2, 3], [3, 1, 2], [*P, 4, 4], [3, 1, 4, 4, 4]],
    "four completions of a prompt": [[*P, 1], [*P, 2, 2], [*P, 2, 3, 1], [*P, 4]],
    "rows equal to each other": [P, [1, 2], P, [1, 2], P],
    "a row that is a prefix of others": [P, P[:3], [*P, 2], P[:1], [*P, 2, 3]],
    "nothing shared": [[1, 2, 3, 4], [2, 1], [3, 3, 3]],
    "a batch of one": [P],
    "tokens of the pad's kind inside": [[*P, 0, 1], [*P, 0, 0, 2], [0, 1]],
    "an empty row": [P, [], P[:2]],
}


def model(kind: str, shape: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape)).to(dtype)


def batch(rows: list[list[int]], side: str, extra: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, ``extra`` columns wider than need be."""
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def distinct(rows: list[list[int]]) -> int:
    return len({tuple(row[:k]) for row in rows for k in range(1, len(row) + 1)})


def hidden(some: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    backbone = some.base_model
    found = backbone(input_ids=ids, attention_mask=mask, use_cache=False, **more).last_hidden_state
    return found * mask[..., None]


def tokens_computed(some: Any) -> list[int]:
    """How many positions each call of the first layer saw, as they come."""
    seen: list[int] = []
    backbone = (some.get_base_model() if hasattr(some, "peft_config") else some).base_model
    layer = (backbone.layers if hasattr(backbone, "layers") else backbone.h)[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    return seen


def gradients(some: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    some.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in some.named_parameters() if p.grad is not None}


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm computes in float32 and rounds what differs in the last bit of float64; without that the test is sharp."""
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


def assert_close_in_norm(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float = 1e-6,
) -> None:
    assert actual.keys() == expected.keys()
    assert len(expected) > 0
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error}"


def some_loss(states: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(0, 99, states.numel(), dtype=states.dtype).cos().view_as(states)
    return (states.tanh() * weights).sum()


# The layout --------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=7),
    gaps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
)
def test_a_layout_is_the_trie_of_its_rows(rows, gaps):
    width = max(len(row) + gap for row, gap in zip(rows, gaps, strict=False)) + 1
    layout = trie.pack(rows, gaps[: len(rows)], width=width)
    places = layout.places.view(len(rows), width).tolist()
    n = len(layout.tokens)
    nodes: dict[tuple[int, ...], int] = {}  # of a trie by brute force, to where they lie
    for b, row in enumerate(rows):
        path = places[b][gaps[b] : gaps[b] + len(row)]
        assert layout.tokens[path].tolist() == row
        assert layout.positions[path].tolist() == list(range(len(row)))
        rest = places[b][: gaps[b]] + places[b][gaps[b] + len(row) :]
        assert rest == [n] * len(rest)
        for k, place in enumerate(path):
            assert nodes.setdefault(tuple(row[: k + 1]), place) == place
    assert sorted(nodes.values()) == list(range(n))
    sees = {(i, j) for a, i in nodes.items() for b, j in nodes.items() if a[: len(b)] == b}
    last = layout.last.tolist()
    assert sees == {(i, j) for i in range(n) for j in range(n) if j <= i <= last[j]}
    # every row's path, from its segments and from the list of paths
    assert sum(layout.segments) == n
    assert sum(row.new for row in layout.rows) == n
    pieces = torch.arange(n).split(layout.segments)
    paths = layout.path.split([row.shared + row.new for row in layout.rows])
    end = 0
    for row, path in zip(layout.rows, paths, strict=True):
        end += row.new
        assert torch.cat([pieces[i] for i in row.segments]).tolist() == path.tolist()
        assert path.tolist() == [j for j in range(n) if (end - 1, j) in sees]


# Equal to the padded forward ---------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("kind", "shape"), SHARED)
@pytest.mark.usefixtures("norms_in_float64")
def test_hidden_states_and_gradients_are_those_of_the_padded_forward(kind, shape, side):
    padded = model(kind, shape)
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared, say=pytest.fail)
    seen = tokens_computed(shared)
    for name, rows in ROWS.items():
        ids, mask = batch(rows, side)
        actual = hidden(shared, ids, mask)
        columns = kind == "gpt2" and side == "left"  # are its positions, so less is alike
        # Rotary positions count from the first token here: that turns nothing but float32's rounding.
        counted = {} if columns else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        expected = hidden(padded, ids, mask, **counted)
        assert_close(
            actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert_close(actual, hidden(padded, ids, mask), rtol=1e-5, atol=1e-5)
        assert columns or seen[-1] == distinct(rows), name
        mine = gradients(shared, some_loss(actual))
        assert_close_in_norm(mine, gradients(padded, some_loss(expected)), tolerance=1e-9)


def test_a_batch_with_nothing_to_gain_runs_as_it_came():
    shared = model("llama", SMALL)
    ids = torch.tensor([[1, 2, 3], [2, 3, 1]])
    expected = hidden(shared, ids, torch.ones_like(ids))
    wrapper.enable_prefix_sharing(shared, say=pytest.fail)
    seen = []
    shared.base_model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    assert torch.equal(hidden(shared, ids, torch.ones_like(ids)), expected)
    assert seen == [(2, 3, 32)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_same_layout_again(reentrant):
    padded = model("mistral", SMALL | {"sliding_window": 4}).train()
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared, say=pytest.fail)
    for each in (padded, shared):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
    # below what transformers 5.23 runs again: the layer's hooks hear of the first time only
    seen: list[int] = []
    shared.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[:2].numel())
    )
    ids, mask = batch(ROWS["pairs"], "right")
    first, second = (
        gradients(each, some_loss(hidden(each, ids, mask))) for each in (padded, shared)
    )
    assert_close_in_norm(second, first)
    assert seen == [distinct(ROWS["pairs"])] * 2


def test_several_processes_find_out_in_the_same_call_whether_a_model_can_share(monkeypatch):
    # One that runs its layers twice, packed and then padded, beside one that had nothing to pack would wait for ever.
    monkeypatch.setattr(wrapper, "_several_processes", lambda: True)
    some, said = model("llama", SMALL, torch.float32), []
    attention = some.model.layers[1].self_attn
    keep, attention.forward = attention.forward, functools.partial(forget, attention.forward)
    wrapper.enable_prefix_sharing(some, say=said.append)
    nothing_shared = torch.tensor([[5, 6, 7], [8, 9, 10]])
    seen = tokens_computed(some)
    some(input_ids=nothing_shared, use_cache=False)
    assert (seen, len(said)) == ([6, 6], 1)

    attention.forward = keep
    able = model("llama", SMALL, torch.float32)
    wrapper.enable_prefix_sharing(able, say=pytest.fail)
    seen = tokens_computed(able)
    layouts = []
    able.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: layouts.append(kwargs.get("prefix_layout")), with_kwargs=True
    )
    for _ in range(2):
        able(input_ids=nothing_shared, use_cache=False)
    assert seen == [6, 6]
    assert [layout is not None for layout in layouts] == [True, False]


def test_an_adapter_learns_the_same():
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    padded = get_peft_model(model("llama", SMALL), config).double()
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared, say=pytest.fail)
    seen = tokens_computed(shared)
    ids, mask = batch(ROWS["pairs"], "right")
    results = []
    for each in (padded, shared):
        logits = each(input_ids=ids, attention_mask=mask, use_cache=False).logits
        results.append(gradients(each, some_loss(logits * mask[..., None])))
    assert_close_in_norm(results[1], results[0])
    assert seen == [distinct(ROWS["pairs"])]
    with padded.disable_adapter(), shared.disable_adapter():
        assert_close(
            hidden(shared.get_base_model(), ids, mask), hidden(padded.get_base_model(), ids, mask)
        )


def test_a_model_in_four_bits_gives_the_same(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model("llama", SMALL | {"hidden_size": 64}, torch.float32).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    padded, shared = (
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config) for _ in range(2)
    )
    wrapper.enable_prefix_sharing(shared, say=pytest.fail)
    seen = tokens_computed(shared)
    ids, mask = batch(ROWS["pairs"], "right")
    assert_close(hidden(shared, ids, mask), hidden(padded, ids, mask), rtol=1e-4, atol=1e-4)
    assert seen == [distinct(ROWS["pairs"])]


# Other devices' attention, as far as it can be tried here ----------------------------------------


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    """What flash attention promises: every sequence by itself, causal from the bottom right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outputs = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        assert 0 < b - a <= max_q
        assert d - c <= max_k
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        sees = (distance >= 0) & (distance < (window or max_k))
        x, y, z = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d]))
        out = scaled_dot_product_attention(x, y, z, attn_mask=sees, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("function", ["_by_varlen", "_by_flex"])
@pytest.mark.parametrize(("kind", "shape"), SHARED)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_made_for_accelerators_is_the_same(kind, shape, function, monkeypatch):
    padded = model(kind, shape)
    shared = copy.deepcopy(padded)
    wrapper.enable_prefix_sharing(shared, say=pytest.fail)
    monkeypatch.setattr(prefix_sharing_attention, "_varlen", lambda: varlen)
    calls = []

    def instead(query, key, value, layout, scaling, dropout, window):
        calls.append(window)
        return getattr(prefix_sharing_attention, function)(
            query, key, value, layout, scaling, window
        )

    monkeypatch.setattr(prefix_sharing_attention, "_by_row", instead)
    with torch.set_grad_enabled(function == "_by_varlen"):  # FlexAttention has no backward on CPU
        for rows in ROWS.values():
            ids, mask = batch(rows, "right")
            expected, actual = hidden(padded, ids, mask), hidden(shared, ids, mask)
            assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            if actual.requires_grad:
                assert_close_in_norm(
                    gradients(shared, some_loss(actual)), gradients(padded, some_loss(expected))
                )
    assert len(calls) == 2 * len(ROWS)


# Stepping aside ----------------------------------------------------------------------------------


def holes(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, 1] = 0
    return mask


@pytest.mark.parametrize(("call", "reason"), [
    pytest.param(lambda m, x: m(x), "a key/value cache", id="a cache, by default"),
    pytest.param(lambda m, x: m(x, use_cache=False, output_hidden_states=True), "`output_hidden_states`", id="every layer's states"),
    pytest.param(lambda m, x: m(x, use_cache=False, attention_mask=holes(x)), "with holes", id="holes"),
    pytest.param(lambda m, x: m(x, use_cache=False, attention_mask=torch.ones(3, 1, 4, 4, dtype=torch.bool).tril()), "[batch, time]", id="a mask of pairs"),
    pytest.param(lambda m, x: m(x, use_cache=False, position_ids=torch.arange(4)[None] + 3), "`position_ids`", id="positions"),
    pytest.param(lambda m, x: m(inputs_embeds=m.get_input_embeddings()(x), use_cache=False), "`inputs_embeds`", id="embeddings"),
])  # fmt: skip
def test_what_would_not_be_exact_runs_padded_and_says_so_once(call, reason):
    some, said = model("llama", SMALL), []
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4]])
    expected = call(some, ids).logits
    wrapper.enable_prefix_sharing(some, say=said.append)
    assert torch.equal(call(some, ids).logits, expected)
    call(some, ids)
    assert len(said) == 1
    assert reason in said[0]


@pytest.mark.parametrize(("kind", "shape", "reason"), [
    pytest.param("llama", SMALL | {"attn_implementation": "eager"}, "eager", id="eager attention"),
    pytest.param("gemma2", SMALL, "soft-capped", id="soft-capping"),
    pytest.param("bloom", {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "positions", id="ALiBi"),
    pytest.param("llama", SMALL | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary", id="rotary embeddings that stretch"),
    pytest.param("lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}, "layers of conv", id="convolutions"),
])  # fmt: skip
def test_models_that_cannot_share_run_padded_and_say_so_once(kind, shape, reason):
    some, said = model(kind, shape, torch.float32), []
    ids, mask = batch(ROWS["pairs"], "right")
    expected = hidden(some, ids, mask)
    wrapper.enable_prefix_sharing(some, say=said.append)
    assert torch.equal(hidden(some, ids, mask), expected)
    hidden(some, ids, mask)
    assert len(said) == 1
    assert reason in said[0]


def test_a_model_that_hides_its_attention_is_found_out():
    """Layers that never read the layout would let every row see the others."""
    some, said = model("llama", SMALL), []
    ids, mask = batch(ROWS["pairs"], "right")
    expected = hidden(some, ids, mask)
    wrapper.enable_prefix_sharing(some, say=said.append)
    attention = some.base_model.layers[1].self_attn
    attention.forward = functools.partial(forget, attention.forward)
    assert torch.equal(hidden(some, ids, mask), expected)
    assert "interface" in said[0]


def forget(forward: Any, *args: Any, prefix_layout: Any = None, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_that_learn_prompts_run_padded(kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    some, said = get_peft_model(model("llama", SMALL, torch.float32), config), []
    ids, mask = batch(ROWS["pairs"], "right")
    expected = some(input_ids=ids, attention_mask=mask, use_cache=False).logits
    wrapper.enable_prefix_sharing(some, say=said.append)
    assert torch.equal(some(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)
    assert len(said) == 1


# Nothing else changes ----------------------------------------------------------------------------


def test_generation_files_and_copies_are_as_before(tmp_path):
    some = model("llama", SMALL, torch.float32)
    ids, mask = batch([P, P[:3]], "left", extra=0)
    sample = functools.partial(
        some.generate, input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False
    )
    before = sample()
    some.save_pretrained(tmp_path / "before")
    wrapper.enable_prefix_sharing(some, say=lambda line: None)
    wrapper.enable_prefix_sharing(some, say=pytest.fail)
    some.save_pretrained(tmp_path / "after")
    assert torch.equal(sample(), before)
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("before", "after")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    other = copy.deepcopy(some)
    assert other.base_model.prefix_sharing is not some.base_model.prefix_sharing
    with torch.no_grad():
        for weight in some.parameters():
            weight.zero_()
    ids, mask = batch(ROWS["pairs"], "right")
    seen = tokens_computed(other)  # a copy computes with its own weights, and shares as well
    assert_close(hidden(other, ids, mask), hidden(plain, ids, mask), rtol=1e-4, atol=1e-5)
    assert seen == [distinct(ROWS["pairs"])]


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
    """What a trainer of TRL logs in 20 steps."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(world.sft)
    load = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    options = {"num_labels": 1} if kind == "Reward" else {}
    some = load.from_pretrained(world.sft, **options)
    reference = (
        load.from_pretrained(world.sft) if kind in ("DPO", "KTO") and start == "full" else None
    )
    if reference is not None:  # as the policy they would agree on every pair at the first step
        with torch.no_grad():
            for weight in reference.parameters():
                weight += 0.02 * torch.randn_like(weight)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    if start == "trained adapter":
        some = PeftModel.from_pretrained(some, str(world.lora), is_trainable=True)
    rows = tiny_models.rows(world.data, "demonstrations-train" if kind == "SFT" else "pairs-train")
    keys = ("prompt", "completion") if kind == "SFT" else ("prompt", "chosen", "rejected")
    rows = [{key: row[key] for key in keys} for row in rows]
    if kind == "KTO":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    made = {"ref_model": reference} if kind in ("DPO", "KTO") else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=some,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), seed=0, **ARGUMENTS | extra),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter if start == "new adapter" else None,
        **made,
    )
    if share:
        wrapper.enable_prefix_sharing(trainer.model, reference, say=pytest.fail)
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
    pytest.param("DPO", "full", {}, id="DPO, all weights, a reference"),
    pytest.param("DPO", "new adapter", {"gradient_checkpointing": True}, id="DPO, new adapter, checkpointing"),
    pytest.param("DPO", "trained adapter", {}, id="DPO, adapter trained on, its frozen copy the reference"),
    pytest.param("SFT", "full", {"completion_only_loss": False}, id="SFT, all tokens"),
    pytest.param("SFT", "new adapter", {"gradient_accumulation_steps": 2}, id="SFT, completions, accumulated"),
    pytest.param("Reward", "full", {}, id="reward model"),
    pytest.param("KTO", "full", {}, id="KTO"),
])  # fmt: skip
def test_trainers_of_trl_follow_the_same_curve(kind, start, extra, world, tmp_path):
    plain, shared = (
        curve(world, tmp_path / str(share), kind, start, share=share, **extra)
        for share in (False, True)
    )
    assert len(plain) == len(shared) == 21
    losses = [[entry["loss"] for entry in run[:-1]] for run in (plain, shared)]
    assert max(losses[0]) - min(losses[0]) > 0.01, "a flat curve shows nothing"
    for step, (a, b) in enumerate(zip(plain, shared, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4), f"step {step}: {key}"


@pytest.mark.parametrize("lora", [None, tiny_models.LORA], ids=["all weights", "adapter"])
def test_the_dpo_stage_shares_unless_told_not_to(lora, world, tmp_path):
    from align.config.training import DPO
    from align.stages import dpo

    found = {}
    for share in (True, False):
        told = {} if share else {"prefix_sharing": False}
        chosen = DPO(model="sft", lora=lora, trainer=tiny_models.TRAINER | {"max_steps": 3}, **told)
        inputs = {"model": world.sft, "pairs": world.data}
        built = dpo.build(chosen, inputs, tmp_path / str(share))
        seen = tokens_computed(built.model)
        batch = built._prepare_inputs(next(iter(built.get_train_dataloader())))
        loss = built.compute_loss(built.model, batch)
        real = [r[m.bool()].tolist() for r, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
        assert seen[0] == (distinct(real) if share else batch["input_ids"].numel())
        assert hasattr(built.model, "scores_labelled_positions") == share
        found[share] = loss, gradients(built.model, loss)
    assert_close(found[True][0], found[False][0])
    assert_close_in_norm(found[True][1], found[False][1], tolerance=1e-3)  # float32


@pytest.mark.parametrize("share", [True, False])
def test_the_sft_stage_shares_unless_told_not_to(share, world, tmp_path, monkeypatch):
    from align.config.training import SFT
    from align.stages import sft

    calls = []
    monkeypatch.setattr(wrapper, "enable_prefix_sharing", lambda *models, say: calls.append(models))
    told = {} if share else {"prefix_sharing": False}
    chosen = SFT(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 1}, **told)
    tiny_models.stage(sft, chosen, {"model": world.sft, "demonstrations": world.data}, tmp_path)
    assert len(calls) == share


def test_scoring_completions_shares_and_gives_the_same(world):
    from align.models import loading, logps, tokenization

    rows = tiny_models.rows(world.data, "pairs-test")
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    tokenizer = tokenization.load_tokenizer(world.sft)
    found = []
    for share in (False, True):
        some = loading.load_merged(world.sft, dtype="float32")
        if share:
            wrapper.enable_prefix_sharing(some, say=pytest.fail)
        seen = tokens_computed(some)
        found.append((logps.completion_logps(some, tokenizer, sides, batch_size=8), sum(seen)))
    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    assert found[1][1] < 0.8 * found[0][1]


@pytest.mark.parametrize("kind", ["llama", "gemma2"], ids=["shared", "padded, for it cannot share"])
def test_only_labelled_positions_reach_the_vocabulary(kind, monkeypatch):
    import trl.kernels.chunked_logprob as tiles
    import trl.trainer.utils as inside

    monkeypatch.setattr(tiles, "TOKEN_CHUNK_SIZE", 3)  # several tiles
    some = model(kind, SMALL, torch.float32)
    inside.add_fused_lm_head(some, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids, mask = batch(ROWS["pairs"], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    call = functools.partial(some, input_ids=ids, attention_mask=mask, fused_lm_head=True)
    everywhere, nowhere = call(labels=labels), call(labels=torch.full_like(labels, -100))
    wrapper.enable_prefix_sharing(some, say=lambda line: None)
    rows = []
    apply = inside._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        inside._ChunkedLogProbFunction, "apply", lambda *a: rows.append(len(a[0])) or apply(*a)
    )
    for some_labels, expected in ((labels, everywhere), (torch.full_like(labels, -100), nowhere)):
        found = call(labels=some_labels)
        assert rows[-1] == (some_labels[:, 1:] != -100).sum()
        assert found.keys() == expected.keys()
        for key in found:
            assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
        found.loss.backward()
    # a call without labels comes back whole, and so does one after an error
    with pytest.raises((AttributeError, TypeError)):
        some(input_ids="no tensor", labels=labels, fused_lm_head=True)
    assert some(input_ids=ids, attention_mask=mask, use_cache=False).logits.shape == (
        *ids.shape,
        40,
    )
