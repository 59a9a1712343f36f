"""Pairs from scored completions, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from align.data import pairing


def rows(*texts: str, prompt: str = "p") -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": text}],
         "prompt_id": prompt, "n_tokens": 1, "finished": True}
        for text in texts
    ]  # fmt: skip


def words(found: pairing.PairingResult) -> list[str]:
    return [row["chosen"][0]["content"] + row["rejected"][0]["content"] for row in found.rows]


SCORES = [0.2, 0.9, 0.5, 0.1]  # of a, b, c, d


@pytest.mark.parametrize(
    ("how", "margin", "expected"),
    [
        pytest.param("best_worst", 0.0, ["bd"], id="best against worst"),
        pytest.param("best_worst", 0.9, [], id="their gap of 0.8 is below the margin"),
        pytest.param("all", 0.0, ["ba", "ca", "ad", "bc", "bd", "cd"], id="each against each"),
        pytest.param("all", 0.35, ["ba", "bc", "bd", "cd"], id="gaps of 0.3 and 0.1 go"),
    ],
)
def test_pairs_by_hand(how, margin, expected):
    found = pairing.pairs_from_scores(rows(*"abcd"), SCORES, pairing=how, margin=margin)
    assert words(found) == expected
    lost = {"best_worst": 1, "all": 6}[how] - len(expected)
    assert found.dropped == ({"gap below the margin": lost} if lost else {})
    assert found.agreement == bool(expected)


def test_the_best_meets_any_other_at_random():
    seen = {
        words(pairing.pairs_from_scores(rows(*"abcd"), SCORES, pairing="best_random", seed=seed))[0]
        for seed in range(30)
    }
    assert seen == {"ba", "bc", "bd"}


def test_a_pair_has_what_prepared_pairs_have_and_both_scores():
    (row,) = pairing.pairs_from_scores(rows(*"ab"), [0.0, 1.0], pairing="all").rows
    assert row == {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "prompt_id": "p",
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }


def test_prompts_are_not_mixed_and_what_makes_no_pair_is_counted():
    some = rows(*"ab", prompt="p") + rows(*"cc", prompt="q") + rows(*"de", prompt="r")
    found = pairing.pairs_from_scores(some, [1, 0, 1, 1, 0.5, 0.5], pairing="all")
    assert words(found) == ["ab"]
    assert found.dropped == {
        "same completion again": 1,
        "prompt with one completion": 1,
        "tie": 1,
    }


def test_noisy_labels_follow_bradley_terry():
    # sigmoid(2 * (0.9 - 0.2)) = 1 / (1 + e^-1.4) = 0.802
    some = [row for i in range(4000) for row in rows("a", "b", prompt=str(i))]
    found = pairing.pairs_from_scores(some, [0.2, 0.9] * 4000, pairing="all", slope=2.0, seed=1)
    share = words(found).count("ba") / 4000
    assert share == pytest.approx(1 / (1 + math.exp(-1.4)), abs=0.02)
    assert found.agreement == pytest.approx(share)


def test_noisy_labels_of_a_tie_are_a_coin():
    some = [row for i in range(2000) for row in rows("a", "b", prompt=str(i))]
    found = pairing.pairs_from_scores(some, [0.5, 0.5] * 2000, pairing="all", slope=2.0)
    assert words(found).count("ab") / 2000 == pytest.approx(0.5, abs=0.04)
    assert found.agreement == 0.5


def test_no_more_pairs_than_asked_drawn_from_all():
    some = [row for i in range(50) for row in rows("a", "b", prompt=str(i))]
    found = pairing.pairs_from_scores(some, [0, 1] * 50, pairing="all", max_pairs=10, seed=3)
    ids = [int(row["prompt_id"]) for row in found.rows]
    assert len(ids) == 10
    assert ids == sorted(ids)
    assert max(ids) > 20
    assert found.dropped == {"above `max_pairs`": 40}


def test_the_seed_decides():
    some = [row for i in range(50) for row in rows("a", "b", prompt=str(i))]

    def found(seed: int) -> list[str]:
        return words(
            pairing.pairs_from_scores(some, [0.4, 0.6] * 50, pairing="all", slope=1.0, seed=seed)
        )

    assert found(0) == found(0) != found(1)


@pytest.mark.parametrize("x", [-800.0, -1.0, 0.0, 2.0, 800.0])
def test_the_sigmoid_does_not_overflow(x):
    expected = 0.0 if x < -700 else 1 / (1 + math.exp(-x))
    assert pairing._sigmoid(x) == pytest.approx(expected)
