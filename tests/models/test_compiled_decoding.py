"""Compiled steps choose the same tokens as steps that are not compiled, with few shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.test_decoding import GREEDY, NUCLEUS, SMALL, SOFTMAX, STOPS, WINDOW, build, prompts
from peft import LoraConfig, get_peft_model

from align.config.completions import Sample
from align.config.online_rl_stages import PPO
from align.errors import UserError
from align.models.decoding import compiled, eager
from align.models.decoding.choice import NotFiniteError
from align.models.decoding.compiled import CompiledDecoder


def decoded(decode: Any, rows: list[list[int]], seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return decode(rows)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SOFTMAX, id="softmax", marks=pytest.mark.slow),
        pytest.param(NUCLEUS, id="temperature and top_p"),
        pytest.param(GREEDY, id="greedy", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("llama", "eager"),
        pytest.param("qwen3", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_tokens_and_log_probabilities_are_those_of_steps_that_are_not_compiled(
    kind: str, backend: str, sampling: dict[str, Any]
):
    model = build(kind, SMALL, **sampling)
    decoder = CompiledDecoder(model, backend)
    lengths = set()
    for seed, rows in enumerate((prompts(9), prompts(3, copies=4), prompts(1), prompts(2))):
        expected = decoded(lambda rows: eager.decode(model, rows, STOPS), rows, seed)
        result = decoded(lambda rows: decoder.decode(rows, STOPS), rows, seed)
        assert [row.tokens for row in result] == [row.tokens for row in expected]
        for row, other in zip(result, expected, strict=True):
            assert row.logps == pytest.approx(other.logps, abs=1e-5)
        seeds = range(len(rows))
        own = [row.tokens for row in eager.decode(model, rows, STOPS, seeds)]
        assert [row.tokens for row in decoder.decode(rows, STOPS, seeds)] == own
        lengths |= {len(row.tokens) for row in expected}
    assert len(lengths) > 1, "all rows end together"


@pytest.mark.slow
def test_the_decoder_follows_the_weights_and_the_adapter():
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft_model = get_peft_model(build("llama", SMALL, **SOFTMAX), adapter).eval()
    model, rows = peft_model.get_base_model(), prompts(4)
    decoder = CompiledDecoder(model, "eager")
    before = decoded(lambda rows: decoder.decode(rows, STOPS), rows, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.mul_(2)
    after = decoded(lambda rows: decoder.decode(rows, STOPS), rows, 0)
    expected = decoded(lambda rows: eager.decode(model, rows, STOPS), rows, 0)
    assert [r.tokens for r in after] == [r.tokens for r in expected]
    assert [r.tokens for r in after] != [r.tokens for r in before]


def test_a_shape_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build("llama", SMALL, **SOFTMAX)
    decoder = CompiledDecoder(model, backend)  # type: ignore[arg-type]
    for seed in range(3):
        decoded(lambda rows: decoder.decode(rows, STOPS), prompts(8), seed)
    n_shapes = len(decoder._steps)
    assert len(graphs) == n_shapes <= 2, "8 rows, and 4"


@pytest.mark.slow
def test_the_memory_grows_and_never_shrinks():
    model = build("llama", SMALL | {"max_position_embeddings": 512}, **GREEDY)
    decoder = CompiledDecoder(model, "eager")
    decoder.decode([[4, 5]] * 3, STOPS)
    memory = decoder._memory
    assert (memory.n_rows, memory.length) == (4, 128)
    decoder.decode([[4] * 120], STOPS)
    assert (decoder._memory.n_rows, decoder._memory.length) == (4, 256)
    decoder.decode([[4]] * 9, STOPS)
    assert (decoder._memory.n_rows, decoder._memory.length) == (16, 256)
    grown = decoder._memory
    decoder.decode([[4]], STOPS)
    assert decoder._memory is grown


def test_lengths_are_few_and_hold_the_tokens():
    lengths = {n: compiled.padded_length(n) for n in range(1, 5000)}
    assert all(0 <= length - n < max(128, n / 2) for n, length in lengths.items())
    assert len(set(lengths.values())) <= 14


def test_probabilities_that_are_not_finite_are_an_error():
    model = build("llama", SMALL, **SOFTMAX)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NotFiniteError):
        CompiledDecoder(model, "eager").decode(prompts(4), STOPS)


def test_what_cannot_be_compiled_is_an_error():
    with pytest.raises(UserError, match="compile_decoding: the model has a sliding window"):
        CompiledDecoder(build("mistral", WINDOW, **SOFTMAX), "eager")
    model = build("llama", SMALL, **SOFTMAX)

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    with pytest.raises(UserError, match="torch cannot compile LlamaForCausalLM"):
        CompiledDecoder(model, broken).decode(prompts(4), STOPS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantization": "nf4", "lora": {}}, "in 4 bits are not compiled; remove `quantization`"),
        ({"sampler": "vllm"}, "`sampler: vllm` samples with steps of vLLM; remove it"),
    ],
)
def test_a_recipe_that_compiles_no_step_is_an_error(keys: dict[str, Any], message: str):
    config = PPO(
        model="m", rewards=["r"], steps=1, batch_size=2, compile_decoding="inductor", **keys
    )
    (problem,) = config.problems({})
    assert problem.keys == ("compile_decoding",)
    assert message in problem.message


def test_a_recipe_without_the_key_has_the_digest_that_it_had():
    sampled = [Sample(model="m", **k) for k in ({}, {"compile_decoding": "inductor"})]
    assert ["compile_decoding" in each.digest_settings() for each in sampled] == [False, True]
