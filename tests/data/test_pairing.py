"""Pairs from scored completions: candidates, dropped pairs, noisy labels, subsampling."""

from __future__ import annotations

import math
from typing import Any

import pytest

from align.data import pairing
from align.errors import DataError


def rows(*texts: str, prompt: str = "p") -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": text}],
         "prompt_id": prompt, "n_tokens": 1, "finished": True}
        for text in texts
    ]  # fmt: skip


def words(result: pairing.PairingResult) -> list[str]:
    return [row["chosen"][0]["content"] + row["rejected"][0]["content"] for row in result.rows]


SCORES = [0.2, 0.9, 0.5, 0.1]  # of a, b, c, d


@pytest.mark.parametrize(
    ("how", "margin", "expected"),
    [
        pytest.param("best_worst", 0.0, ["bd"], id="best against worst"),
        pytest.param("best_worst", 0.9, [], id="their gap of 0.8 is below the margin"),
        pytest.param("all", 0.0, ["ba", "ca", "ad", "bc", "bd", "cd"], id="all pairs"),
        pytest.param(
            "all", 0.35, ["ba", "bc", "bd", "cd"], id="gaps of 0.3 and 0.1 are below the margin"
        ),
    ],
)
def test_pairs_by_hand(how, margin, expected):
    result = pairing.pairs_from_scores(rows(*"abcd"), SCORES, pairing=how, margin=margin)
    assert words(result) == expected
    n_dropped = {"best_worst": 1, "all": 6}[how] - len(expected)
    assert result.dropped == ({"gap below the margin": n_dropped} if n_dropped else {})
    assert result.agreement == bool(expected)


def test_best_random_pairs_the_best_with_any_other():
    seen = {
        words(pairing.pairs_from_scores(rows(*"abcd"), SCORES, pairing="best_random", seed=seed))[0]
        for seed in range(30)
    }
    assert seen == {"ba", "bc", "bd"}


def test_a_pair_has_the_columns_of_prepared_pairs_and_both_scores():
    (row,) = pairing.pairs_from_scores(rows(*"ab"), [0.0, 1.0], pairing="all").rows
    assert row == {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "prompt_id": "p",
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }


def test_prompts_are_not_mixed_and_completions_without_a_pair_are_counted():
    sampled = rows(*"ab", prompt="p") + rows(*"cc", prompt="q") + rows(*"de", prompt="r")
    result = pairing.pairs_from_scores(sampled, [1, 0, 1, 1, 0.5, 0.5], pairing="all")
    assert words(result) == ["ab"]
    assert result.dropped == {
        "same completion again": 1,
        "prompt with one completion": 1,
        "tie": 1,
    }


def test_noisy_labels_follow_bradley_terry():
    # sigmoid(2 * (0.9 - 0.2)) = 1 / (1 + e^-1.4) = 0.802
    sampled = [row for i in range(4000) for row in rows("a", "b", prompt=str(i))]
    result = pairing.pairs_from_scores(sampled, [0.2, 0.9] * 4000, pairing="all", slope=2.0, seed=1)
    share = words(result).count("ba") / 4000
    assert share == pytest.approx(1 / (1 + math.exp(-1.4)), abs=0.02)
    assert result.agreement == pytest.approx(share)


def test_noisy_labels_of_a_tie_are_random():
    sampled = [row for i in range(2000) for row in rows("a", "b", prompt=str(i))]
    result = pairing.pairs_from_scores(sampled, [0.5, 0.5] * 2000, pairing="all", slope=2.0)
    assert words(result).count("ab") / 2000 == pytest.approx(0.5, abs=0.04)
    assert result.agreement == 0.5


def test_max_pairs_subsamples_all_pairs_in_order():
    sampled = [row for i in range(50) for row in rows("a", "b", prompt=str(i))]
    result = pairing.pairs_from_scores(sampled, [0, 1] * 50, pairing="all", max_pairs=10, seed=3)
    ids = [int(row["prompt_id"]) for row in result.rows]
    assert len(ids) == 10
    assert ids == sorted(ids)
    assert max(ids) > 20
    assert result.dropped == {"above `max_pairs`": 40}


def test_the_seed_determines_noisy_labels():
    sampled = [row for i in range(50) for row in rows("a", "b", prompt=str(i))]

    def chosen_first(seed: int) -> list[str]:
        return words(
            pairing.pairs_from_scores(sampled, [0.4, 0.6] * 50, pairing="all", slope=1.0, seed=seed)
        )

    assert chosen_first(0) == chosen_first(0) != chosen_first(1)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param([0.0, 1.0], "ba", id="sigmoid(800) is 1"),
        pytest.param([1.0, 0.0], "ab", id="sigmoid(-800) is 0"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_noisy_labels_do_not_overflow(scores: list[float], expected: str, turned: bool):
    order = slice(None, None, -1 if turned else 1)
    result = pairing.pairs_from_scores(
        rows(*"ab")[order], scores[order], pairing="all", slope=800.0
    )
    assert words(result) == [expected]


def test_noisy_labels_have_the_probability_of_the_sigmoid_on_both_sides():
    # sigmoid(-1) = 1 / (1 + e) = 0.269 for the first of two; 0.02 is four standard errors
    for scores, expected in (([0.0, 1.0], 1 / (1 + math.e)), ([1.0, 0.0], 1 / (1 + 1 / math.e))):
        sampled = [row for i in range(8000) for row in rows("a", "b", prompt=str(i))]
        result = pairing.pairs_from_scores(sampled, scores * 8000, pairing="all", slope=1.0, seed=2)
        assert words(result).count("ab") / 8000 == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e308, -1e308])
@pytest.mark.parametrize("slope", [None, 2.0])
def test_a_score_that_orders_no_pair_is_an_error_with_its_completion(score, slope):
    with pytest.raises(DataError, match=r"the score of 'b' is .*scores must be finite"):
        pairing.pairs_from_scores(rows(*"abc"), [0.1, score, 0.3], pairing="all", slope=slope)


@pytest.mark.parametrize("score", [math.nan, math.inf, 1e308])
def test_a_public_row_with_a_score_that_orders_no_pair_is_dropped(score):
    scored = [pairing.Scored(0.1, "a"), pairing.Scored(score, "b"), pairing.Scored(0.3, "c")]
    (dropped,) = pairing.pair_completions("p", scored, pairing.PairingOptions())
    assert str(dropped) == "a score is not a finite number"
