"""Decoding equals ``model.generate`` token by token, with fewer rows computed."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from helpers import prefix_models
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from align.models import generation
from align.models.decoding import choice, eager
from align.models.decoding.eager import PreallocatedLayer, remaining
from align.models.decoding.prompts import MIN_ROWS
from align.runtime.seeds import derive_seeds

STOPS, NEW_TOKENS = {1, 2, 3}, 16
VOCABULARY = {"vocab_size": 12, "pad_token_id": 0, "eos_token_id": 1}
SMALL = prefix_models.SMALL | VOCABULARY
WINDOW = SMALL | {"sliding_window": 4}
HYBRID = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
ABSOLUTE = prefix_models.GPT2 | VOCABULARY
SOFTMAX = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
NUCLEUS = SOFTMAX | {"temperature": 0.7, "top_p": 0.8}
GREEDY = {"do_sample": False}
CASES = [
    pytest.param("llama", SMALL, SOFTMAX, id="Llama, grouped queries"),
    pytest.param("llama", SMALL, NUCLEUS, id="temperature and top_p"),
    pytest.param("llama", SMALL, GREEDY, id="greedy"),
    pytest.param("qwen3", SMALL, NUCLEUS, id="Qwen3, norms of queries and keys"),
    pytest.param("gpt2", ABSOLUTE, SOFTMAX, id="GPT-2, absolute positions"),
    pytest.param("mistral", WINDOW, SOFTMAX, id="Mistral, sliding window"),
    pytest.param("gemma3_text", HYBRID, SOFTMAX, id="Gemma 3, a window in every other layer"),
    pytest.param("gemma2", HYBRID, NUCLEUS, id="Gemma 2, soft-capped logits"),
]


def build(kind: str, shape: dict[str, Any], **sampling: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(STOPS), pad_token_id=0, max_new_tokens=NEW_TOKENS, **sampling
    )
    return model


def prompts(n: int, *, copies: int = 1) -> list[list[int]]:
    """Prompts of one to ten tokens, each several times."""
    random.seed(n)
    rows = [random.choices(range(2, 12), k=random.randint(1, 10)) for _ in range(n)]
    return [row for row in rows for _ in range(copies)]


def generated(model: Any, rows: list[list[int]], seed: int) -> list[list[int]]:
    """The completions of ``model.generate``, up to their first stop token."""
    torch.manual_seed(seed)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    completions = []
    for row in model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist():
        ends = [place for place, token in enumerate(row) if token in STOPS]
        completions.append(row[: ends[0] + 1] if ends else row)
    return completions


def decoded(model: Any, rows: list[list[int]], seed: int) -> list[list[int]]:
    torch.manual_seed(seed)
    return [row.tokens for row in eager.decode(model, rows, STOPS)]


def sampled_by_generate(model: Any, rows: list[list[int]], seed: int) -> list[list[int]]:
    torch.manual_seed(seed)
    return [row.tokens for row in generation.generate_tokens(model, rows, STOPS)]


@pytest.mark.parametrize(("kind", "shape", "sampling"), CASES)
def test_tokens_are_those_of_generate_with_the_same_random_state(
    kind: str, shape: dict[str, Any], sampling: dict[str, Any]
):
    model = build(kind, shape, **sampling)
    assert eager.obstacle(model) is None
    lengths = set()
    for seed, rows in enumerate((prompts(9), prompts(3, copies=4), prompts(1, copies=6))):
        expected = generated(model, rows, seed)
        assert decoded(model, rows, seed) == expected
        lengths |= set(map(len, expected))
    assert len(lengths) > 1, "all rows end together"


@pytest.mark.parametrize("n", [1, 3, 5])
def test_small_batches_and_batches_without_padding_are_those_of_generate(n: int):
    model = build("llama", SMALL, **SOFTMAX)
    rows = prompts(n)
    for batch in (rows, [rows[0]] * n, [row[:1] for row in rows]):
        assert decoded(model, batch, n) == generated(model, batch, n)


def test_tokens_are_those_of_generate_under_an_adapter():
    base = build("llama", SMALL, **SOFTMAX)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft_model = get_peft_model(base, adapter).eval()
    model, rows = peft_model.get_base_model(), prompts(3, copies=4)
    completions = decoded(model, rows, 0)
    assert completions == generated(model, rows, 0)
    with peft_model.disable_adapter():
        assert decoded(model, rows, 0) != completions


@pytest.mark.parametrize("sample", [eager.decode, generation.generate_with_transformers])
@pytest.mark.parametrize(
    "sampling", [SOFTMAX, SOFTMAX | {"temperature": 0.7}, NUCLEUS], ids=["1", "0.7", "top_p"]
)
def test_log_probabilities_are_those_of_the_distribution_that_a_token_is_drawn_from(
    sample: Any, sampling: dict[str, Any]
):
    model, rows = build("llama", SMALL, **sampling), prompts(3, copies=4)
    torch.manual_seed(0)
    completions = sample(model, rows, STOPS)
    assert len({len(row.tokens) for row in completions}) > 1, "all rows end together"
    for prompt, row in zip(rows, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1]
        probabilities = (logits.double() / sampling["temperature"]).softmax(-1)
        for token, logp, full in zip(row.tokens, row.logps, probabilities, strict=True):
            # top_p keeps the likeliest tokens, the fewest whose probabilities sum to it
            likelier = full[full > full[token]].sum()
            kept = sum(p for p in full if full[full > p].sum() < sampling["top_p"])
            assert likelier < sampling["top_p"]
            assert math.exp(logp) == pytest.approx(float(full[token] / kept), rel=1e-4)


@pytest.mark.parametrize("sample", [eager.decode, generation.generate_with_transformers])
def test_a_greedy_choice_has_probability_1(sample: Any):
    (row,) = sample(build("llama", SMALL, **GREEDY), [[4, 5]], STOPS)
    assert row.logps == [0.0] * len(row.tokens)


def test_a_prompt_is_computed_once_and_rows_that_have_ended_are_not_computed():
    model = build("llama", SMALL, **SOFTMAX)
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    rows = prompts(5, copies=6)
    completions = decoded(model, rows, 0)
    lengths = list(map(len, completions))
    assert min(lengths) < max(lengths)
    continuing = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert shapes[0] == (5, max(map(len, rows)))
    assert shapes[1:] == [(max(n, MIN_ROWS), 1) for n in continuing]


def test_rows_that_stay_are_as_few_as_possible():
    for _ in range(200):
        continues = [random.random() < 0.5 for _ in range(random.randint(1, 12))]
        n_min = random.randint(1, len(continues))
        order = remaining(continues, n_min)
        assert len(order) == max(sum(continues), n_min)
        assert len(set(order)) == len(order)
        assert {k for k, flag in enumerate(continues) if flag} <= set(order)
        assert all(row in (place, row) for place, row in enumerate(order))
        assert all(order[k] == k for k in range(len(order)) if continues[k])


@pytest.mark.parametrize("in_order", [True, False], ids=["rows are skipped", "the whole table"])
def test_noise_and_random_state_are_those_of_a_draw_for_all_rows(
    in_order: bool, monkeypatch: pytest.MonkeyPatch
):
    if not in_order:
        monkeypatch.setattr(choice, "_draws_in_order", lambda: False)
    for rows in ([4, 1, 2], [0, 5], [3], [5, 4, 3, 2, 1, 0]):
        torch.manual_seed(0)
        expected, following = torch.empty(6, 50).exponential_(), torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(choice.SharedNoise(6)(rows, expected), expected[rows])
        assert torch.equal(torch.rand(3), following)


@pytest.mark.parametrize("sample", [eager.decode, generation.generate_with_transformers])
def test_with_a_seed_of_each_row_a_completion_does_not_depend_on_the_others(sample: Any):
    model, rows = build("llama", SMALL, **SOFTMAX), prompts(3, copies=4)
    seeds = list(range(100, 100 + len(rows)))
    whole = [row.tokens for row in sample(model, rows, STOPS, seeds)]
    assert len(set(map(tuple, whole))) > 6
    assert len(set(map(len, whole))) > 1, "all rows end together"
    torch.rand(3)  # the global random state must not matter
    for places in (range(11, -1, -1), range(0, 12, 2), [7, 2, 5, 3]):
        part = sample(model, [rows[k] for k in places], STOPS, [seeds[k] for k in places])
        assert [row.tokens for row in part] == [whole[k] for k in places]
    other = sample(model, rows, STOPS, [seed + 1000 for seed in seeds])
    assert [row.tokens for row in other] != whole


def test_rows_with_seeds_are_drawn_by_their_probabilities_at_each_step():
    n, probabilities = 4000, torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    choose = choice.Choice(GenerationConfig(**SOFTMAX), n, derive_seeds(0, range(n)))
    logits = probabilities.log().expand(n, -1)
    steps = [choose(logits, range(n)).tokens for _ in range(2)]
    for tokens in steps:
        shares = (torch.bincount(tokens, minlength=5) / n).tolist()
        for share, p in zip(shares, probabilities.tolist(), strict=True):
            assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    # Two steps of a row are independent: they agree as often as two draws do.
    p = float(probabilities.square().sum())
    agree = float((steps[0] == steps[1]).float().mean())
    assert agree == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_a_row_at_two_places_gets_the_same_numbers_and_draws_once():
    like = torch.empty(3, 5)
    twice, once = choice.RowNoise([7, 8]), choice.RowNoise([7, 8])
    table = twice([0, 1, 0], like)
    assert torch.equal(table[0], table[2])
    assert torch.equal(table[:2], once([0, 1], like[:2]))
    assert torch.equal(twice([1], like[:1]), once([1], like[:1]))


def test_the_preallocated_cache_holds_what_a_growing_cache_holds():
    random.seed(0)
    torch.manual_seed(0)
    growing, initial = DynamicLayer(), DynamicLayer()
    prompt = torch.randn(2, 6, 3, 5, 4)
    for layer in (growing, initial):
        layer.update(*prompt)
    ours = PreallocatedLayer(initial, capacity=5 + 10)
    memory = [buffer.data_ptr() for buffer in (ours.keys, ours.values)]
    for step in range(10):
        n = len(growing.keys)
        for mine, theirs in zip(
            *[layer.update(*torch.full((2, n, 3, 1, 4), float(step))) for layer in (ours, growing)],
            strict=True,
        ):
            assert torch.equal(mine, theirs)
        order = remaining([random.random() < 0.9 for _ in range(n)], 1)
        for layer in (ours, growing):
            layer.batch_select_indices(torch.tensor(order))
        assert ours.get_seq_length() == growing.get_seq_length() == 6 + step
        assert torch.equal(ours.keys, growing.keys)
        assert torch.equal(ours.values, growing.values)
    assert [buffer.data_ptr() for buffer in (ours.keys, ours.values)] == memory
    assert len(ours.keys) < 6


# Models and settings that are left to generate ---------------------------------------------------


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"min_new_tokens": 12}, "min_new_tokens"),
        ({"top_k": 2}, "top_k"),
    ],
)
def test_other_settings_of_generation_are_applied_by_generate(more: dict[str, Any], field: str):
    model = build("llama", SMALL, **SOFTMAX | more)
    assert eager.obstacle(model) == f"the generation config has `{field}`"
    rows = prompts(3, copies=4)
    completions = sampled_by_generate(model, rows, 0)
    assert completions == generated(model, rows, 0)
    assert completions != decoded(model, rows, 0), "the setting has no effect on these rows"


@pytest.mark.parametrize(
    ("kind", "shape", "reason"),
    [
        pytest.param(
            "mamba",
            {"vocab_size": 12, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1},
            "the model prepares the inputs of its generation itself",
            id="state-space layers",
        ),
        pytest.param(
            "phi3", SMALL, "the model prepares the inputs of its generation itself", id="Phi-3"
        ),
        pytest.param(
            "lfm2",
            SMALL | {"layer_types": ["conv", "full_attention"]},
            "the model has a cache of the kind LinearAttentionLayer",
            id="convolutions",
        ),
    ],
)
def test_other_models_are_sampled_by_generate(kind: str, shape: dict[str, Any], reason: str):
    model = build(kind, shape, **SOFTMAX)
    assert eager.obstacle(model) == reason
    rows = prompts(3, copies=2)
    assert sampled_by_generate(model, rows, 0) == generated(model, rows, 0)


def test_models_with_an_encoder_are_left_to_generate():
    config = CONFIG_MAPPING["t5"](
        vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    assert eager.obstacle(AutoModelForSeq2SeqLM.from_config(config)) is not None


def test_sharded_weights_are_left_to_generate(monkeypatch: pytest.MonkeyPatch):
    model = build("llama", SMALL, **SOFTMAX)
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    assert eager.obstacle(model) is None, "one process has all weights"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert eager.obstacle(model) == "the weights are sharded over processes"
