"""Drift: KL against exact enumeration, entropies, unfinished completions, distinct n-grams."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from align.config.evaluate import Evaluate
from align.evaluation import drift, tables
from align.evaluation.completions import Samples
from align.evaluation.drift import DriftMeter, ScoredSamples
from align.evaluation.intervals import Bootstrap
from align.evaluation.results import DriftMetrics, EvaluationMetrics, Interval
from align.models import generation, logps, tokenization
from align.models.generation import Completion
from align.models.policy import Policy

TEMPERATURE = 0.7
N = 3000
PROMPTS = [{"prompt": [{"role": "user", "content": text}]} for text in ("ab", "b a")]


def config(**more: Any) -> Evaluate:
    settings = {"policies": ["policy"], "baseline": "base", "judge": "gold", "batch_size": 500}
    return Evaluate(**settings | {"temperature": TEMPERATURE} | more)


def random_policy(seed: int, scale: float = 0.3) -> Policy:
    tokenizer = tokenization.new_tokenizer(["a b"], vocab_size=262, max_length=64)
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": 2, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **vocabulary)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=scale)
        model.lm_head.weight[2] = model.lm_head.weight.mean(0) + 0.5  # ends are likely
    return Policy(model, tokenizer)


def next_logps(policy: Policy, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = policy.model(input_ids=rows).logits[:, -1].double()
    return torch.log_softmax(logits / TEMPERATURE, dim=-1)


def exact(policy: Policy, reference: Policy, prompt: list[int]) -> tuple[float, float]:
    """KL and expected summed entropy of completions of at most two tokens, by enumeration."""
    first, other = (next_logps(each, torch.tensor([prompt]))[0] for each in (policy, reference))
    p = first.exp()
    rows = torch.tensor([[*prompt, token] for token in range(len(p))])
    second, other_second = (next_logps(each, rows) for each in (policy, reference))
    continues = p.clone()
    continues[2] = 0  # a completion that has ended has no second token
    kl = (p * (first - other)).sum()
    kl = kl + (continues * (second.exp() * (second - other_second)).sum(1)).sum()
    entropy = -(p * first).sum() - (continues * (second.exp() * second).sum(1)).sum()
    return kl.item(), entropy.item()


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    return {"policy": random_policy(0), "base": random_policy(1)}


@pytest.fixture(scope="module")
def samples(policies: dict[str, Policy]) -> list[list[Completion]]:
    policy = policies["policy"]
    return generation.sample(
        policy.model, policy.tokenizer, [row["prompt"] for row in PROMPTS], n_completions=N,
        temperature=TEMPERATURE, top_p=1.0, max_new_tokens=2, batch_size=N, seed=3,
    )  # fmt: skip


def score(policy: Policy, completions: Any, folder: Path, **more: Any) -> ScoredSamples:
    logger = tiny_models.logger("evaluate", folder)
    return drift.score_samples(policy, PROMPTS, completions, config(**more), logger, name="x")


def test_kl_and_entropy_agree_with_exact_enumeration(
    policies: dict[str, Policy], samples: list[list[Completion]], tmp_path: Path
):
    own = score(policies["policy"], samples, tmp_path)
    reference = score(policies["base"], samples, tmp_path)
    (row,) = drift.measure(
        "base", {"policy": samples}, {"policy": own}, {"policy": reference}, Bootstrap()
    )
    expected = [
        exact(policies["policy"], policies["base"], ids)
        for ids in tokenization.tokenize_prompts(
            policies["policy"].tokenizer, [row["prompt"] for row in PROMPTS]
        )
    ]
    kl = sum(each for each, _ in expected) / len(expected)
    deviation = (own.logps - reference.logps).std().item() / math.sqrt(2 * N)
    assert row.kl is not None and abs(row.kl - kl) < 4 * deviation < 0.25 * kl
    lengths = [len(completion.tokens) for rows in samples for completion in rows]
    assert set(lengths) == {1, 2}, "some completions end at once"
    entropy = sum(each for _, each in expected) / len(expected)
    assert row.entropy == pytest.approx(entropy * 2 * N / sum(lengths), rel=0.02)
    assert row.kl_per_token == pytest.approx(row.kl * 2 * N / sum(lengths))
    assert row.missing_eos == sum(not c.finished for rows in samples for c in rows) / (2 * N)


def test_log_probabilities_are_those_of_the_sampled_tokens_one_at_a_time(
    policies: dict[str, Policy], samples: list[list[Completion]], tmp_path: Path
):
    few = [rows[:7] for rows in samples]
    policy = policies["base"]
    prompts = tokenization.tokenize_prompts(policy.tokenizer, [row["prompt"] for row in PROMPTS])
    expected, entropies = torch.zeros(2, 2, 7, dtype=torch.float64)
    for i, k in itertools.product(range(2), range(7)):
        ids = list(prompts[i])
        for token in few[i][k].tokens:
            distribution = next_logps(policy, torch.tensor([ids]))[0]
            expected[i, k] += distribution[token]
            entropies[i, k] -= (distribution.exp() * distribution).sum()
            ids.append(token)
    for more in ({}, {"prefix_sharing": False, "batch_size": 3}):
        scored = score(policy, few, tmp_path, **more)
        assert_close(scored.logps, expected, rtol=1e-4, atol=1e-4)
        assert_close(scored.entropies, entropies, rtol=1e-4, atol=1e-4)


def test_batches_hold_a_bounded_number_of_logits(
    policies: dict[str, Policy], samples: list[list[Completion]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    few = [rows[:5] for rows in samples]
    expected = score(policies["base"], few, tmp_path).logps
    rows = []
    forward = LlamaForCausalLM.forward

    def count(self: Any, *args: Any, **more: Any) -> Any:
        rows.append(len(more["input_ids"]))
        return forward(self, *args, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", count)
    # four tokens at a time: two rows with two tokens, or more of one token
    monkeypatch.setattr(logps, "LOGITS", 4 * len(policies["base"].tokenizer))
    bounded = score(policies["base"], few, tmp_path, prefix_sharing=False).logps
    assert_close(bounded, expected, rtol=1e-5, atol=1e-5)
    n_tokens = sum(len(completion.tokens) for row in few for completion in row)
    assert sum(rows) == 10 and n_tokens / 4 <= len(rows) < 10


def test_a_policy_has_no_kl_to_another_vocabulary(policies: dict[str, Policy], tmp_path: Path):
    # The policy has more tokens than the baseline, whose model has no row for their ids.
    smaller = policies["base"]
    tokenizer = tokenization.new_tokenizer(["a b"], vocab_size=262, max_length=64)
    tokenizer.add_tokens(["<extra>"])
    larger = Policy(random_policy(2).model, tokenizer)
    larger.model.resize_token_embeddings(len(tokenizer))
    extra = tokenizer.convert_tokens_to_ids("<extra>")
    sampled = {
        "policy": Samples([[Completion("a b", 2, True, (extra, 2))]] * 2),
        "base": Samples([[Completion("a b", 2, True, (4, 2))]] * 2),
        "base again": Samples([[Completion("a", 1, True, (4, 2))]] * 2),
    }
    meter = DriftMeter(config(), PROMPTS, tiny_models.logger("evaluate", tmp_path))
    meter.add("policy", larger, sampled)
    meter.add("base", smaller, sampled)
    row, baseline = meter.metrics(sampled)
    assert (row.kl, row.kl_ci, row.kl_per_token, row.reference) == (None, None, None, None)
    assert row.entropy > 0 and baseline.entropy > 0
    meter = DriftMeter(config(), PROMPTS, tiny_models.logger("evaluate", tmp_path))
    meter.add("policy", policies["policy"], {**sampled, "policy": sampled["base"]})
    meter.add("base", smaller, {**sampled, "policy": sampled["base"]})
    assert meter.metrics(sampled)[0].reference == "base", "equal vocabularies are compared"


def test_a_policy_has_no_kl_from_a_file():
    (row,) = drift.measure(
        "base", {"policy": [[Completion("a b c", 0, True)]]}, {}, {}, Bootstrap()
    )
    assert (row.entropy, row.missing_eos, row.mean_tokens, row.mean_words) == (None, None, None, 3)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),
        pytest.param({"temperature": 0.0}, False, id="one completion only"),
        pytest.param({"top_p": 0.9}, False, id="the reference is not truncated alike"),
    ],
)
def test_kl_needs_samples_of_the_whole_distribution(more: dict[str, Any], expected: bool):
    assert config(**more).measures_drift is expected


def test_expected_distinct_items_by_enumeration():
    items = "aaabbcd"
    counts = Counter((item,) for item in items)
    for draws in range(1, len(items) + 1):
        subsets = list(itertools.combinations(items, draws))
        expected = sum(len(set(subset)) for subset in subsets) / len(subsets)
        assert drift.expected_distinct(counts, draws=draws) == pytest.approx(expected, rel=1e-12)


def test_distinct_n_grams_do_not_fall_with_length():
    # "c d" once and "c d" twenty times: the plain ratio is 1 and 0.05; two of the 40 words are
    # equal with probability 19/39, so the expected number of distinct ones is 2 - 19/39
    texts = {"short": [["c", "d"]], "long": [["c", "d"], ["C", "D"]] * 10}
    distinct = drift.distinct_n_grams(texts, n=1)
    assert distinct == {"short": 1.0, "long": pytest.approx((2 - 19 / 39) / 2)}
    # within one text only: "d c" across two texts is no pair
    assert drift.distinct_n_grams(texts, n=2) == {"short": 1.0, "long": pytest.approx(1.0)}
    assert drift.distinct_n_grams({"a": [["x"]], "b": [[]]}, n=1) == {"a": 1.0, "b": None}


def test_results_are_stored_and_read():
    row = DriftMetrics(
        policy="dpo", reference="sft", kl=1.25, kl_ci=Interval(1.0, 1.5), kl_per_token=0.05,
        entropy=0.9, missing_eos=0.01, mean_tokens=20.5, mean_words=15.5, distinct_1=0.4,
        distinct_2=None,
    )  # fmt: skip
    metrics = EvaluationMetrics(drift=(row,)).to_metrics()
    assert EvaluationMetrics.from_metrics(metrics).drift == (row,)
    table = tables.drift_table([row])
    assert table.rows == [
        ("dpo", "1.25", "1.00 to 1.50", "0.050", "0.90", "1.0 %", "0.40", "–")
    ]  # fmt: skip
