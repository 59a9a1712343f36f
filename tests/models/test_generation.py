"""Sampling and scoring of completions, against loops over tokens without padding or batches."""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
)

from align.errors import UserError
from align.models import generation, loading, logps, tokenization
from align.models.generation import Completion
from align.runtime import distributed

SAMPLING = {
    "n_completions": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 24,
    "batch_size": 8,
    "seed": 0,
}

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture
def tokenizer(world: tiny_models.World) -> Any:
    return tokenization.load_tokenizer(world.sft)


@pytest.fixture
def model(world: tiny_models.World) -> Any:
    return loading.load_merged(world.sft, dtype="float32").eval()


@pytest.fixture
def wide(tokenizer: Any) -> Any:
    """Random weights, initialised wide: the next token is clear, and the one after is another."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=None, **SHAPE)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def prompts(world: tiny_models.World) -> list[Any]:
    """Prompts of lengths between about 20 and 120 tokens, in no order of length."""
    found = [row["prompt"] for row in tiny_models.rows(world.data, "prompts-test")][:6]
    short = [{"role": "user", "content": "A sea."}]
    long = [{"role": "user", "content": "the gull and the boat " * 6}]
    return [found[0], long, found[1], short, *found[2:]]


@pytest.fixture(scope="module")
def pairs(world: tiny_models.World) -> list[tuple[Any, Any]]:
    rows = tiny_models.rows(world.data, "pairs-train")[:3]
    return [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]


def sample(model: Any, tokenizer: Any, prompts: Any, **more: Any) -> list[list[Completion]]:
    return generation.sample(model, tokenizer, prompts, **SAMPLING | more)


# Sampling -----------------------------------------------------------------------------------------


def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """The likeliest token, n times: no cache, no padding."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-n:]


def test_greedy_completions_are_the_likeliest_tokens_up_to_a_stop(
    wide: Any, tokenizer: Any, prompts: Any
):
    tokens = [greedy(wide, ids, 16) for ids in tokenization.tokenize_prompts(tokenizer, prompts)]
    # the model's own stop beside the tokenizer's: what the first completion has at its sixth place
    stop = tokens[0][5]
    wide.generation_config.eos_token_id = [stop]
    completions = sample(wide, tokenizer, prompts, temperature=0.0, max_new_tokens=16)
    for i, row in enumerate(tokens):
        ends = [place for place, token in enumerate(row) if token in (stop, tokenizer.eos_token_id)]
        kept = row[: ends[0]] if ends else row
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert completions[i] == [Completion(text, len(kept), bool(ends))]
    assert {rows[0].finished for rows in completions} == {True, False}


def test_a_prompt_alone_is_completed_as_in_a_padded_batch_of_mixed_lengths(
    wide: Any, tokenizer: Any, prompts: Any
):
    lengths = {len(ids) for ids in tokenization.tokenize_prompts(tokenizer, prompts)}
    assert max(lengths) > 3 * min(lengths)
    together = sample(wide, tokenizer, prompts, temperature=0.0)
    assert len({rows[0].text for rows in together}) == len(prompts)
    for i, prompt in enumerate(prompts):
        assert sample(wide, tokenizer, [prompt], temperature=0.0)[0] == together[i]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_any_number_of_processes_samples_the_same_completions(
    model: Any, tokenizer: Any, prompts: Any, world_size: int
):
    calls = []

    def map_batches(batches: Any, run: Any) -> Any:
        """Sample each rank's batches one after another, as ``distributed.map_rows`` shares them."""
        results = [None] * len(batches)
        for rank in range(world_size):
            torch.rand(rank)  # the random state of a rank has no effect
            for k in range(rank, len(batches), world_size):
                (results[k],) = run([batches[k]])
                calls.append(k)
        return results

    alone = sample(model, tokenizer, prompts, n_completions=2, batch_size=4)
    shared = sample(
        model, tokenizer, prompts, n_completions=2, batch_size=4, map_batches=map_batches
    )
    assert shared == alone
    assert sorted(calls) == list(range(4)), "8 prompts, two per batch"
    assert len(shared) == len(prompts)


def test_the_seed_decides_and_another_seed_differs(model: Any, tokenizer: Any, prompts: Any):
    first = sample(model, tokenizer, prompts)
    assert sample(model, tokenizer, prompts) == first
    other = sample(model, tokenizer, prompts, seed=1)
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_completions_of_one_prompt_and_of_equal_prompts_differ(
    model: Any, tokenizer: Any, prompts: Any
):
    completions = sample(model, tokenizer, [prompts[0]] * 4, n_completions=4, batch_size=8)
    texts = [completion.text for rows in completions for completion in rows]
    assert [len(rows) for rows in completions] == [4] * 4
    assert len(set(texts)) == 16


def test_a_batch_never_holds_more_than_batch_size_completions(
    model: Any, tokenizer: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs),
    )
    seen = []
    sample(
        model,
        tokenizer,
        prompts,
        n_completions=3,
        batch_size=7,
        max_new_tokens=1,
        map_batches=functools.partial(
            distributed.map_rows, progress=lambda done, total: seen.append((done, total))
        ),
    )
    assert sizes == [6, 6, 6, 6]  # 8 prompts, two at a time
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_completion_ends_at_eos_also_where_pad_is_eos(model: Any, tokenizer: Any, prompts: Any):
    apart = sample(model, tokenizer, prompts, n_completions=4, max_new_tokens=40)
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    together = sample(model, same, prompts, n_completions=4, max_new_tokens=40)
    assert together == apart
    flat = [completion for rows in apart for completion in rows]
    assert {completion.finished for completion in flat} == {True, False}
    assert all(c.n_tokens == 40 for c in flat if not c.finished)
    assert all(c.n_tokens < 40 for c in flat if c.finished)
    assert not any("<|" in c.text for c in flat), "no special tokens in the text"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param([65, 66, 2], Completion("", 2, True), id="eos last"),
        pytest.param([65, 2, 66, 2], Completion("", 1, True), id="what follows eos is padding"),
        pytest.param([65, 66, 67], Completion("", 3, False), id="cut off by the length"),
        pytest.param([2, 2, 2], Completion("", 0, True), id="empty"),
        pytest.param([65, 7, 66], Completion("", 1, True), id="the model's own second stop"),
    ],
)
def test_tokens_become_a_completion(
    model: Any, tokenizer: Any, prompts: Any, row: list[int], expected: Completion,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    model.generation_config.eos_token_id = [7]
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.tensor([input_ids[0].tolist() + row])
    )
    ((completion,),) = sample(model, tokenizer, prompts[:1])
    assert (completion.n_tokens, completion.finished) == (expected.n_tokens, expected.finished)
    assert completion.text == tokenizer.decode(row[: expected.n_tokens])


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.6)])
def test_first_tokens_come_as_often_as_the_softmax_of_logits_over_temperature_says(
    model: Any, tokenizer: Any, prompts: Any, temperature: float, top_p: float
):
    drawn = 2000
    ids = tokenization.tokenize_prompts(tokenizer, prompts[3:4])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids)).logits[0, -1].double()
    p = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:  # the likeliest tokens whose sum first reaches top_p
        order = p.argsort(descending=True)
        n = int((p[order].cumsum(0) < top_p).sum()) + 1
        p = torch.zeros_like(p).index_copy(0, order[:n], p[order[:n]] / p[order[:n]].sum())
    expected: dict[str, float] = {}
    for token, probability in enumerate(p.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True).strip()
        expected[text] = expected.get(text, 0.0) + probability
    found = sample(
        model,
        tokenizer,
        prompts[3:4],
        n_completions=drawn,
        batch_size=drawn,
        max_new_tokens=1,
        temperature=temperature,
        top_p=top_p,
    )[0]
    for text, probability in expected.items():
        share = sum(c.text == text for c in found) / drawn
        # four standard errors, and two draws for what is rare
        error = (probability * (1 - probability) / drawn) ** 0.5
        assert abs(share - probability) <= 4 * error + 2 / drawn, text
    likely = sorted(expected.values())[-2:]
    assert likely[0] > 0.02, "a distribution of one token proves nothing"


def test_what_a_folder_asks_of_generation_does_not_change_the_policy(
    model: Any, tokenizer: Any, prompts: Any
):
    likeliest = sample(model, tokenizer, prompts, temperature=0.0)
    drawn = sample(model, tokenizer, prompts)
    # as in Qwen2.5-Instruct's generation_config.json, only more
    for name, value in {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 2,
        "top_p": 0.1,
        "repetition_penalty": 3.0,
        "min_new_tokens": 20,
    }.items():
        setattr(model.generation_config, name, value)
    assert sample(model, tokenizer, prompts, temperature=0.0) == likeliest
    assert sample(model, tokenizer, prompts) == drawn


def test_a_tokenizer_without_a_template_is_a_users_mistake(tokenizer: Any, prompts: Any):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        tokenization.tokenize_prompts(tokenizer, prompts)


# Scoring ------------------------------------------------------------------------------------------


def by_hand(model: Any, tokenizer: Any, rows: Any, max_length: int | None = None) -> torch.Tensor:
    """A forward pass for each token; the template ends a completion with eos and a line feed."""
    found = []
    for prompt, completion in rows:
        head = f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        text = f"{head}{completion[0]['content']}<|im_end|>\n"
        start = len(tokenizer(head).input_ids)
        found.append(tiny_models.slow_logps(model, tokenizer(text).input_ids[:max_length], start))
    return torch.tensor(found, dtype=torch.float64)


def test_log_probabilities_are_those_of_a_loop_over_tokens(model: Any, tokenizer: Any, pairs: Any):
    expected = by_hand(model, tokenizer, pairs)
    for batch_size, steps in ((1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (6, [6])):
        progress = Mock()
        found = logps.completion_logps(
            model, tokenizer, pairs, batch_size=batch_size, progress=progress
        )
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert progress.mock_calls == [call(step, 6) for step in steps]


def test_the_end_of_the_completion_is_scored(model: Any, tokenizer: Any, pairs: Any):
    prompt, completion = pairs[0]
    ids = tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)
    whole = logps.completion_logps(model, tokenizer, pairs[:1], batch_size=1)
    end = ids.index(
        tokenizer.eos_token_id, len(tokenization.tokenize_prompts(tokenizer, [prompt])[0])
    )
    without = logps.completion_logps(model, tokenizer, pairs[:1], batch_size=1, max_length=end)
    last = tiny_models.slow_logps(model, ids, end)
    assert last < -0.01
    assert_close(whole - without, torch.tensor([last], dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_padding_that_is_eos_changes_no_log_probability(model: Any, tokenizer: Any, pairs: Any):
    apart = logps.completion_logps(model, tokenizer, pairs, batch_size=6)
    tokenizer.pad_token = tokenizer.eos_token
    assert torch.equal(logps.completion_logps(model, tokenizer, pairs, batch_size=6), apart)


def test_a_row_is_cut_off_at_its_length_and_nan_where_nothing_is_left(
    model: Any, tokenizer: Any, pairs: Any
):
    longest = max(
        tokenization.tokenize_prompts(tokenizer, [prompt for prompt, _ in pairs]), key=len
    )
    for max_length, empty in ((len(longest), True), (len(longest) + 3, False)):
        found = logps.completion_logps(model, tokenizer, pairs, batch_size=4, max_length=max_length)
        filled = [
            len(ids) >= max_length
            for ids in tokenization.tokenize_prompts(tokenizer, [prompt for prompt, _ in pairs])
        ]
        assert found.isnan().tolist() == filled
        assert any(filled) == empty
        expected = by_hand(model, tokenizer, pairs, max_length)
        expected[torch.tensor(filled)] = torch.nan
        assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_only_the_completions_positions_reach_the_vocabulary(
    model: Any, tokenizer: Any, pairs: Any
):
    made = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, given, logits: made.append(logits.shape[:-1].numel()))
    logps.completion_logps(model, tokenizer, pairs, batch_size=6)
    wholes = [tokenizer.apply_chat_template([*p, *c], return_dict=False) for p, c in pairs]
    heads = tokenization.tokenize_prompts(tokenizer, [prompt for prompt, _ in pairs])
    assert made == [sum(map(len, wholes)) - sum(map(len, heads))]
    made.clear()
    model(input_ids=torch.tensor([heads[0]]))
    assert made == [len(heads[0])], "and the model is as it was"


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param(Gemma2Config, {"final_logit_softcapping": 2.0}, id="a soft cap"),
        pytest.param(GraniteConfig, {"logits_scaling": 8.0}, id="a scale"),
        pytest.param(GPTNeoXConfig, {}, id="a head of another name"),
    ],
)
def test_what_other_architectures_do_to_their_logits_counts(
    tokenizer: Any, pairs: Any, kind: Any, more: dict[str, Any]
):
    torch.manual_seed(0)
    ends = {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    config = kind(vocab_size=len(tokenizer), **SHAPE, **ends, **more)
    other = AutoModelForCausalLM.from_config(config).eval()
    found = logps.completion_logps(other, tokenizer, pairs[:2], batch_size=2)
    assert_close(found, by_hand(other, tokenizer, pairs[:2]), rtol=1e-5, atol=1e-5)
