"""Length control against values by hand, scikit-learn, SciPy and judges of known bias."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.testing import assert_close

from align.functional.length_control import length_controlled_win_rate
from align.functional.winrate import win_rate


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def two_lengths(p_longer: float, p_shorter: float, shorter: int = 1) -> tuple[Tensor, Tensor]:
    """Win rates and lengths: ten cases 30 tokens longer, ``10 * shorter`` 30 tokens shorter."""
    won = [p_longer] * 10 + [p_shorter] * 10 * shorter
    return float64(won), float64([30.0] * 10 + [-30.0] * 10 * shorter)


def test_length_control_by_hand():
    # Two lengths, two parameters: the fit is exact, quality + bias * t = logit(0.8) = log 4 and
    # quality - bias * t = logit(0.5) = 0, so quality = log(4) / 2 = log 2 and sigmoid(log 2) = 2/3.
    # Raw: 0.65.
    won, differences = two_lengths(0.8, 0.5)
    assert_close(win_rate(won), float64(0.65))
    assert_close(length_controlled_win_rate(won, differences, ridge=1e-9), float64(2 / 3))


def test_length_control_does_not_depend_on_how_often_each_length_occurs():
    # Three times as many shorter completions: the raw rate moves to (8 + 15) / 40, the exact fit
    # does not.
    won, differences = two_lengths(0.8, 0.5, shorter=3)
    assert_close(win_rate(won), float64(0.575))
    # |t| is the same for both lengths: 30 / std
    assert_close(length_controlled_win_rate(won, differences, ridge=1e-9), float64(2 / 3))


def test_length_control_recovers_the_quality_from_the_model_it_assumes():
    lengths = np.random.default_rng(0).normal(40, 100, 50).round()
    regressor = np.tanh(lengths / np.std(lengths, ddof=1))
    won = 1 / (1 + np.exp(-(logit(0.6) + 1.7 * regressor)))
    controlled = length_controlled_win_rate(float64(won), float64(lengths), ridge=1e-9)
    assert_close(controlled, float64(0.6))
    assert win_rate(float64(won)) > 0.68


@pytest.mark.parametrize("ridge", [0.01, 3.0, 300.0])
def test_length_control_agrees_with_scikit_learn(ridge):
    rng = np.random.default_rng(1)
    lengths = rng.normal(20, 80, (60, 2))
    lengths[:5] = 0
    won = rng.choice([0.0, 0.25, 0.5, 1.0], (60, 2)) * (rng.random((60, 2)) < 0.4 + 0.002 * lengths)
    regressor = np.tanh(lengths / lengths.std(ddof=1)).reshape(-1, 1)
    design = np.hstack([np.ones_like(regressor), regressor])
    # a fractional outcome is a win with its weight and a loss with the rest
    model = LogisticRegression(C=1 / ridge, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(
        np.vstack([design, design]),
        np.repeat([1, 0], won.size),
        sample_weight=np.concatenate([won.reshape(-1), 1 - won.reshape(-1)]),
    )
    expected = model.predict_proba([[1.0, 0.0]])[0, 1]
    controlled = length_controlled_win_rate(float64(won), float64(lengths), ridge=ridge)
    assert_close(controlled, float64(expected), rtol=0, atol=1e-6)


def test_a_win_rate_due_to_length_alone_becomes_one_half():
    rng = np.random.default_rng(2)
    lengths = rng.normal(60, 50, 4000)
    judged = rng.random(4000) < 1 / (1 + np.exp(-2.0 * np.tanh(lengths / lengths.std())))
    won, differences = float64(judged.astype(float)), float64(lengths)
    assert win_rate(won) > 0.7
    assert float(length_controlled_win_rate(won, differences)) == pytest.approx(0.5, abs=0.05)


def test_swapping_the_policies_gives_one_minus_the_length_controlled_win_rate():
    rng = np.random.default_rng(3)
    won = float64(rng.choice([0.0, 0.5, 1.0], (40, 3), p=[0.2, 0.2, 0.6]))
    differences = float64(rng.normal(10, 30, (40, 3)))
    forward = length_controlled_win_rate(won, differences)
    assert_close(forward, 1 - length_controlled_win_rate(1 - won, -differences))
    assert forward > 0.55


def test_without_length_differences_the_win_rate_does_not_change():
    won = torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    assert_close(length_controlled_win_rate(won, torch.zeros(2, 2)), float64(0.875), rtol=0, atol=0)
    assert_close(length_controlled_win_rate(torch.ones(3), torch.zeros(3)), float64(1.0))


def test_length_control_does_not_depend_on_the_unit_of_length():
    won = torch.rand(30, generator=generator(0))
    differences = torch.randn(30, generator=generator(1))
    assert_close(
        length_controlled_win_rate(won, differences),
        length_controlled_win_rate(won, 4 * differences),
    )


def test_a_policy_that_always_wins_stays_slightly_below_one():
    # The lengths are symmetric, so the bias is 0 and quality q solves
    # 100 * sigmoid(-q) = ridge * q.
    differences = torch.tensor([-5.0, 5.0]).repeat(50)
    quality = brentq(lambda q: 100 / (1 + math.exp(q)) - 0.01 * q, 0, 50)
    controlled = length_controlled_win_rate(torch.ones(100), differences, ridge=0.01)
    assert_close(controlled, float64(1 / (1 + math.exp(-quality))))
    assert 0.999 < controlled < 1


@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-8])
def test_length_control_converges_where_length_separates_wins_from_losses(ridge):
    differences = torch.linspace(-50, 50, 100)
    controlled = length_controlled_win_rate((differences > 0).float(), differences, ridge=ridge)
    assert_close(controlled, float64(0.5))


@pytest.mark.parametrize("lengths", [[7.0, 7.0], [7.0], [1000.0, 1000.0, 1000.001]])
def test_lengths_that_all_differ_by_the_same_amount_are_refused(lengths):
    with pytest.raises(ValueError, match=r"cannot separate length from quality, found (7|1000) to"):
        length_controlled_win_rate(torch.ones(len(lengths)), float64(lengths))


@pytest.mark.parametrize("won", [[12.0, 0.0], [1.0, -3.0]])
def test_outcomes_outside_0_to_1_are_refused(won):
    with pytest.raises(ValueError, match=r"expected 0 to 1, found (0 to 12|-3 to 1)"):
        length_controlled_win_rate(torch.tensor(won), torch.tensor([1.0, 0.0]))
