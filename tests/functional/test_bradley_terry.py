"""Win matrices, strengths and adjusted p-values against values by hand and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from align.functional.bradley_terry import bradley_terry_strengths, holm_adjusted, win_matrix


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


def test_the_strength_of_two_policies_is_the_log_odds():
    # 3 of 4 won: log 3
    outcomes = compared({(1, 0): [1.0, 1.0, 1.0, 0.0] * 25}, 2)
    strengths = bradley_terry_strengths(outcomes, ridge=1e-9, resamples=200)
    assert strengths.values == pytest.approx((0.0, math.log(3)))
    low, high = strengths.intervals[1]
    # standard error sqrt(1 / (100 * 0.75 * 0.25)) = 0.231; a tenth of it is the resampling's error
    assert (low, high) == pytest.approx((math.log(3) - 0.45, math.log(3) + 0.45), abs=0.1)
    assert strengths.intervals[0] == (0.0, 0.0)


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
    strengths = bradley_terry_strengths(
        compared(pairs, 4), baseline=2, ridge=ridge, resamples=10
    ).values
    assert strengths == pytest.approx(expected, abs=1e-5)


def test_policies_without_a_path_of_comparisons_are_refused():
    with pytest.raises(ValueError, match=r"policies \[2, 3\] have no comparison that leads to 0"):
        bradley_terry_strengths(compared({(0, 1): [1.0, 0.0], (2, 3): [1.0, 0.0]}, 4))


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, never smaller than the one before
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjusted([]) == []
