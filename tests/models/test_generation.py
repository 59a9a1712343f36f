"""Sampling and log-probabilities, compared with loops over tokens without padding or batches."""

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
from align.models.decoding import eager
from align.models.generation import Completion
from align.models.policy import Policy
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
    """A model with large random weights: the most probable next token is clear and varies."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=None, **SHAPE)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def prompts(world: tiny_models.World) -> list[Any]:
    """Prompts of lengths between about 20 and 120 tokens, in no order of length."""
    embedded = [row["prompt"] for row in tiny_models.rows(world.data, "prompts-test")][:6]
    short = [{"role": "user", "content": "A sea."}]
    long = [{"role": "user", "content": "the gull and the boat " * 6}]
    return [embedded[0], long, embedded[1], short, *embedded[2:]]


@pytest.fixture(scope="module")
def pairs(world: tiny_models.World) -> list[tuple[Any, Any]]:
    rows = tiny_models.rows(world.data, "pairs-train")[:3]
    return [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]


def sample(model: Any, tokenizer: Any, prompts: Any, **more: Any) -> list[list[Completion]]:
    return generation.sample(model, tokenizer, prompts, **SAMPLING | more)


# Sampling -----------------------------------------------------------------------------------------


def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """The most probable token, n times, without cache or padding."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-n:]


def test_greedy_completions_are_the_most_probable_tokens_up_to_a_stop(
    wide: Any, tokenizer: Any, prompts: Any
):
    tokens = [greedy(wide, ids, 16) for ids in tokenization.tokenize_prompts(tokenizer, prompts)]
    # a stop of the model besides that of the tokenizer: the sixth token of the first completion
    stop = tokens[0][5]
    wide.generation_config.eos_token_id = [stop]
    completions = sample(wide, tokenizer, prompts, temperature=0.0, max_new_tokens=16)
    for i, row in enumerate(tokens):
        ends = [place for place, token in enumerate(row) if token in (stop, tokenizer.eos_token_id)]
        kept = row[: ends[0]] if ends else row
        text = tokenizer.decode(kept, skip_special_tokens=True)
        sampled = tuple(row[: ends[0] + 1] if ends else row)
        assert completions[i] == [Completion(text, len(kept), bool(ends), sampled)]
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


def test_completions_depend_on_the_seed(model: Any, tokenizer: Any, prompts: Any):
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
    decode = eager.decode
    monkeypatch.setattr(
        eager,
        "decode",
        lambda model, rows, *rest: sizes.append(len(rows)) or decode(model, rows, *rest),
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
        pytest.param([65, 66, 2], Completion("", 2, True), id="eos at the end"),
        pytest.param([65, 2, 66, 2], Completion("", 1, True), id="tokens after eos are padding"),
        pytest.param([65, 66, 67], Completion("", 3, False), id="cut off by the length"),
        pytest.param([2, 2, 2], Completion("", 0, True), id="empty"),
        pytest.param([65, 7, 66], Completion("", 1, True), id="a second stop of the model"),
    ],
)
def test_tokens_become_a_completion(
    model: Any, tokenizer: Any, prompts: Any, row: list[int], expected: Completion,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    model.generation_config.eos_token_id = [7]
    monkeypatch.setattr(eager, "obstacle", lambda model: "the test")
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.tensor([input_ids[0].tolist() + row])
    )
    ((completion,),) = sample(model, tokenizer, prompts[:1])
    assert (completion.n_tokens, completion.finished) == (expected.n_tokens, expected.finished)
    assert completion.text == tokenizer.decode(row[: expected.n_tokens])


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.6)])
def test_first_tokens_have_the_frequencies_of_the_softmax_over_temperature(
    model: Any, tokenizer: Any, prompts: Any, temperature: float, top_p: float
):
    n_samples = 2000
    ids = tokenization.tokenize_prompts(tokenizer, prompts[3:4])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids)).logits[0, -1].double()
    p = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:  # the most probable tokens whose sum first reaches top_p
        order = p.argsort(descending=True)
        n = int((p[order].cumsum(0) < top_p).sum()) + 1
        p = torch.zeros_like(p).index_copy(0, order[:n], p[order[:n]] / p[order[:n]].sum())
    expected: dict[str, float] = {}
    for token, probability in enumerate(p.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0.0) + probability
    completions = sample(
        model,
        tokenizer,
        prompts[3:4],
        n_completions=n_samples,
        batch_size=n_samples,
        max_new_tokens=1,
        temperature=temperature,
        top_p=top_p,
    )[0]
    for text, probability in expected.items():
        share = sum(c.text == text for c in completions) / n_samples
        # four standard errors, and two samples for rare tokens
        error = (probability * (1 - probability) / n_samples) ** 0.5
        assert abs(share - probability) <= 4 * error + 2 / n_samples, text
    likely = sorted(expected.values())[-2:]
    assert likely[0] > 0.01, "a distribution with a single token would prove nothing"


def test_the_generation_config_of_a_folder_does_not_change_the_samples(
    model: Any, tokenizer: Any, prompts: Any
):
    greedy_completions = sample(model, tokenizer, prompts, temperature=0.0)
    sampled = sample(model, tokenizer, prompts)
    # fields of Qwen2.5-Instruct's generation_config.json, and others
    for name, value in {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 2,
        "top_p": 0.1,
        "repetition_penalty": 3.0,
        "min_new_tokens": 20,
    }.items():
        setattr(model.generation_config, name, value)
    assert sample(model, tokenizer, prompts, temperature=0.0) == greedy_completions
    assert sample(model, tokenizer, prompts) == sampled


def test_a_tokenizer_without_a_template_is_a_user_error(tokenizer: Any, prompts: Any):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        tokenization.tokenize_prompts(tokenizer, prompts)


# Scoring ------------------------------------------------------------------------------------------


def by_hand(model: Any, tokenizer: Any, rows: Any, max_length: int | None = None) -> torch.Tensor:
    """One forward pass per token; a completion ends with eos, without the template's line feed."""
    sums = []
    for prompt, completion in rows:
        prompt_text = f"<|im_start|>user\n{prompt[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        text = f"{prompt_text}{completion[0]['content']}<|im_end|>"
        start = len(tokenizer(prompt_text).input_ids)
        sums.append(tiny_models.slow_logps(model, tokenizer(text).input_ids[:max_length], start))
    return torch.tensor(sums, dtype=torch.float64)


def test_log_probabilities_equal_those_of_single_tokens(model: Any, tokenizer: Any, pairs: Any):
    expected = by_hand(model, tokenizer, pairs)
    for batch_size, steps in ((1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (6, [6])):
        progress = Mock()
        sums = logps.completion_logps(
            model, tokenizer, pairs, batch_size=batch_size, progress=progress
        )
        assert_close(sums, expected, rtol=1e-5, atol=1e-5)
        assert progress.mock_calls == [call(step, 6) for step in steps]


def test_the_eos_of_a_completion_is_scored(model: Any, tokenizer: Any, pairs: Any):
    prompt, completion = pairs[0]
    ids = tokenization.tokenize_rows(tokenizer, [prompt], [completion])[0].ids
    complete = logps.completion_logps(model, tokenizer, pairs[:1], batch_size=1)
    end = ids.index(
        tokenizer.eos_token_id, len(tokenization.tokenize_prompts(tokenizer, [prompt])[0])
    )
    truncated = logps.completion_logps(model, tokenizer, pairs[:1], batch_size=1, max_length=end)
    last = tiny_models.slow_logps(model, ids, end)
    assert last < -0.01
    assert_close(
        complete - truncated, torch.tensor([last], dtype=torch.float64), rtol=1e-4, atol=1e-4
    )


def test_padding_that_is_eos_changes_no_log_probability(model: Any, tokenizer: Any, pairs: Any):
    expected = logps.completion_logps(model, tokenizer, pairs, batch_size=6)
    tokenizer.pad_token = tokenizer.eos_token
    assert torch.equal(logps.completion_logps(model, tokenizer, pairs, batch_size=6), expected)


def test_rows_are_truncated_and_nan_if_nothing_of_the_completion_is_left(
    model: Any, tokenizer: Any, pairs: Any
):
    longest = max(
        tokenization.tokenize_prompts(tokenizer, [prompt for prompt, _ in pairs]), key=len
    )
    for max_length, empty in ((len(longest), True), (len(longest) + 3, False)):
        sums = logps.completion_logps(model, tokenizer, pairs, batch_size=4, max_length=max_length)
        filled = [
            len(ids) >= max_length
            for ids in tokenization.tokenize_prompts(tokenizer, [prompt for prompt, _ in pairs])
        ]
        assert sums.isnan().tolist() == filled
        assert any(filled) == empty
        expected = by_hand(model, tokenizer, pairs, max_length)
        expected[torch.tensor(filled)] = torch.nan
        assert_close(sums, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_logits_are_computed_for_the_completions_only(model: Any, tokenizer: Any, pairs: Any):
    sizes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, logits: sizes.append(logits.shape[:-1].numel()))
    logps.completion_logps(model, tokenizer, pairs, batch_size=6)
    rows = tokenization.tokenize_rows(tokenizer, *zip(*pairs, strict=True))
    sequences = [row.ids for row in rows]
    prompts = tokenization.tokenize_prompts(tokenizer, [prompt for prompt, _ in pairs])
    assert sizes == [sum(map(len, sequences)) - sum(map(len, prompts))]
    sizes.clear()
    model(input_ids=torch.tensor([prompts[0]]))
    assert sizes == [len(prompts[0])], "the model is unchanged afterwards"


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param(Gemma2Config, {"final_logit_softcapping": 2.0}, id="a soft cap"),
        pytest.param(GraniteConfig, {"logits_scaling": 8.0}, id="a scale"),
        pytest.param(GPTNeoXConfig, {}, id="a head of another name"),
    ],
)
def test_operations_on_logits_of_other_architectures_are_applied(
    tokenizer: Any, pairs: Any, kind: Any, more: dict[str, Any]
):
    torch.manual_seed(0)
    ends = {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    config = kind(vocab_size=len(tokenizer), **SHAPE, **ends, **more)
    other = AutoModelForCausalLM.from_config(config).eval()
    sums = logps.completion_logps(other, tokenizer, pairs[:2], batch_size=2)
    assert_close(sums, by_hand(other, tokenizer, pairs[:2]), rtol=1e-5, atol=1e-5)


# Positions ----------------------------------------------------------------------------------------


def test_prompts_that_leave_no_positions_for_a_completion_are_refused(
    model: Any, tokenizer: Any, prompts: Any, world: tiny_models.World
):
    longest = max(map(len, tokenization.tokenize_prompts(tokenizer, prompts)))
    left = tiny_models.POSITIONS - longest
    with pytest.raises(UserError, match=rf"^max_new_tokens: 1 of {len(prompts)} prompts plus"):
        sample(model, tokenizer, prompts, max_new_tokens=left + 1)
    sample(model, tokenizer, prompts, max_new_tokens=left)
    # By default, the completions of the Python API end at the positions of the model.
    texts = Policy(model, tokenizer).generate([prompts[0], "a " * 160], temperature=0.0)
    assert len(texts) == 2
