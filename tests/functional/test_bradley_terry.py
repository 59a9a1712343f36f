"""Win matrices, strengths and adjusted p-values against values by hand and scikit-learn."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from align.functional import intervals
from align.functional.bradley_terry import bradley_terry_strengths, holm_adjusted, win_matrix
from align.functional.intervals import proportion_interval


def compared(pairs, policies: int) -> torch.Tensor:
    """Outcomes of (i, j): values; NaN elsewhere."""
    prompts = len(next(iter(pairs.values())))
    outcomes = torch.full((policies, policies, prompts), math.nan)
    for (i, j), values in pairs.items():
        outcomes[i, j] = torch.tensor(values)
    return outcomes


def test_a_win_matrix_by_hand():
    # policy 0 against 1: 1, 1/2, 0, missing: 1.5 / 3; against 2: 3 / 4; 1 and 2 were not compared
    outcomes = compared({(0, 1): [1, 0.5, 0, math.nan], (2, 0): [0, 0, 0, 1]}, 3)
    expected = [[0.5, 0.5, 0.75], [0.5, 0.5, math.nan], [0.25, math.nan, 0.5]]
    np.testing.assert_allclose(win_matrix(outcomes), expected)


def test_the_strength_of_two_policies_is_the_log_odds_of_their_win_rate():
    # 3 of 4 won: log 3; so are the ends of the interval
    won = torch.tensor([[1.0, 1.0], [1.0, 0.5], [1.0, 0.0], [0.5, 1.0]] * 10)
    outcomes = torch.full((2, 2, 40, 2), math.nan)
    outcomes[1, 0] = won
    strengths = bradley_terry_strengths(outcomes, ridge=1e-9)
    assert strengths.values == pytest.approx((0.0, math.log(3)))
    expected = [math.log(end / (1 - end)) for end in proportion_interval(won)]
    assert strengths.intervals[1] == pytest.approx(expected, abs=1e-6)
    assert strengths.intervals[0] == (0.0, 0.0)


@pytest.mark.parametrize("won", [1.0, 0.0])
def test_the_strength_of_a_policy_that_always_wins_or_loses_is_finite(won):
    strengths = bradley_terry_strengths(compared({(1, 0): [won] * 20}, 2))
    low, high = strengths.intervals[1]
    assert low < strengths.values[1] < high
    assert all(map(math.isfinite, (low, high)))
    # 0.025 ** (1 / 20) = 0.8316: log-odds 1.597
    assert (low if won else -high) == pytest.approx(1.597, abs=0.01)


def round_robin(true: list[float], prompts: int, seed: int) -> torch.Tensor:
    """Outcomes of all pairs, two completions per prompt; a prompt favors each policy more or less.

    The log-odds are divided by sqrt(1 + 0.6^2 / 1.7^2) on average, because they vary by prompt with
    a standard deviation of 0.6 = 0.42 * sqrt(2).
    """
    rng = np.random.default_rng([seed, 6])
    quality = np.array(true)[:, None] + 0.42 * rng.standard_normal((len(true), prompts))
    outcomes = torch.full((len(true), len(true), prompts, 2), math.nan)
    for i, j in itertools.combinations(range(len(true)), 2):
        chances = 1 / (1 + np.exp(quality[j] - quality[i]))
        outcomes[i, j] = torch.from_numpy(rng.random((prompts, 2)) < chances[:, None]).double()
    return outcomes


def test_the_intervals_are_as_wide_as_those_of_a_bootstrap_over_prompts():
    outcomes = round_robin([0.0, 0.5, 1.0], 200, seed=0)
    strengths = bradley_terry_strengths(outcomes)
    rng = np.random.default_rng(0)
    resampled = np.array(
        [
            bradley_terry_strengths(outcomes[:, :, rng.integers(200, size=200)]).values
            for _ in range(150)
        ]
    )
    for policy in (1, 2):
        low, high = strengths.intervals[policy]
        # one standard error of a standard deviation of 150 draws is 1 / sqrt(300) = 6 %
        assert (high - low) / 3.92 == pytest.approx(resampled[:, policy].std(), rel=0.18)


@pytest.mark.slow
def test_the_intervals_contain_the_true_strength_in_93_to_97_of_100_evaluations(monkeypatch):
    monkeypatch.setattr(intervals, "t_quantile", cache(intervals.t_quantile))
    true = [0.0, 0.5, 2.5]
    # The strengths of a sample without end; the log-odds vary by prompt, so they are not ``true``.
    expected = bradley_terry_strengths(round_robin(true, 50_000, seed=10_000)).values
    covered = [0, 0, 0]
    for seed in range(2000):
        strengths = bradley_terry_strengths(round_robin(true, 20, seed)).intervals
        for policy, (low, high) in enumerate(strengths):
            covered[policy] += low <= expected[policy] <= high
    assert all(0.93 <= count / 2000 <= 0.97 for count in covered[1:])


@pytest.mark.parametrize("ridge", [0.01, 5.0])
def test_strengths_agree_with_a_logistic_regression_of_scikit_learn(ridge):
    rng = np.random.default_rng(0)
    true = np.array([0.0, 1.0, -0.5, 2.0])
    pairs, rows, won = {}, [], []
    for i in range(4):
        for j in range(i + 1, 4):
            chances = 1 / (1 + np.exp(true[j] - true[i]))
            pairs[i, j] = rng.choice([1.0, 0.5, 0.0], 60, p=[chances, 0.0, 1 - chances]).tolist()
            pairs[i, j][:6] = [0.5] * 6
            rows += [np.eye(4)[i] - np.eye(4)[j]] * 60
            won += pairs[i, j]
    design, won = np.array(rows), np.array(won)
    model = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(
        np.vstack([design, design]),
        np.repeat([1, 0], len(won)),
        sample_weight=np.concatenate([won, 1 - won]),
    )
    expected = model.coef_[0] - model.coef_[0][2]
    strengths = bradley_terry_strengths(compared(pairs, 4), baseline=2, ridge=ridge).values
    assert strengths == pytest.approx(expected, abs=1e-5)


def test_policies_without_a_path_of_comparisons_are_refused():
    with pytest.raises(ValueError, match=r"policies \[2, 3\] have no comparison that leads to 0"):
        bradley_terry_strengths(compared({(0, 1): [1.0, 0.0], (2, 3): [1.0, 0.0]}, 4))


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, never smaller than the one before
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjusted([]) == []
