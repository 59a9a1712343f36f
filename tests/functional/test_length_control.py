"""Length control against values by hand, scikit-learn, SciPy and judges of known bias."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.testing import assert_close

from align.functional.length_control import length_controlled_win_rate, length_controlled_win_rates
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


# --- several comparisons over the same prompts ---


def judged(
    qualities: list[float], bias: float, prompts: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Outcomes of a judge that prefers longer completions, length differences, unbiased rates."""
    rng = np.random.default_rng([seed, 8])
    difficulties = rng.normal(0, 1.2, prompts)
    lengths = rng.normal(
        np.linspace(-150, 250, len(qualities))[:, None], 120, (len(qualities), prompts)
    )
    regressor = np.tanh(lengths / lengths.std(axis=1, ddof=1, keepdims=True))
    quality = np.array(qualities)[:, None] + difficulties
    won = rng.random(lengths.shape) < 1 / (1 + np.exp(-(quality + bias * regressor)))
    unbiased = (1 / (1 + np.exp(-quality))).mean(axis=1)
    return float64(won.astype(float)), float64(lengths), float64(unbiased)


def test_of_a_single_comparison_the_difficulty_is_left_out():
    won, lengths, _ = judged([0.4], 1.0, 80, seed=0)
    control = length_controlled_win_rates(won, lengths)
    assert_close(
        control.rates[0], length_controlled_win_rate(won[0], lengths[0]), rtol=1e-9, atol=0
    )
    assert_close(control.difficulties, torch.zeros(80, dtype=torch.float64))


def logistic(design: np.ndarray, won: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Logistic regression by scikit-learn with one ridge per column: columns are scaled by it."""
    scaled = design / np.sqrt(ridge)
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(
        np.vstack([scaled, scaled]),
        np.repeat([1, 0], len(won)),
        sample_weight=np.concatenate([won, 1 - won]),
    )
    return model.coef_[0] / np.sqrt(ridge)


@pytest.mark.parametrize(("ridge", "difficulty_ridge"), [(0.01, 1.0), (2.0, 0.3)])
def test_joint_length_control_agrees_with_scikit_learn_and_scipy(ridge, difficulty_ridge):
    won, lengths, _ = judged([-1.0, 0.2, 0.9], 1.5, 40, seed=1)
    won[0, :5] = 0.5
    won[1, 7] = math.nan
    valid = ~won.isnan().numpy()
    regressor = np.zeros(won.shape)
    for m in range(3):
        own = lengths[m].numpy()[valid[m]]
        regressor[m, valid[m]] = np.tanh(own / own.std(ddof=1))
    policy, prompt = np.nonzero(valid)
    intercepts, slopes = np.eye(3)[policy], np.eye(3)[policy] * regressor[valid][:, None]
    design = np.hstack([intercepts, slopes, np.eye(40)[prompt]])
    penalties = np.array([ridge] * 6 + [difficulty_ridge] * 40)
    effects = logistic(design, won.numpy()[valid], penalties)[6:]
    difficulties = effects - effects.mean()

    control = length_controlled_win_rates(
        won, lengths, ridge=ridge, difficulty_ridge=difficulty_ridge
    )
    assert_close(control.difficulties, float64(difficulties), rtol=0, atol=1e-5)
    for m in range(3):
        own = difficulties[valid[m]]
        columns = np.stack([np.ones_like(own), regressor[m, valid[m]], own], axis=1)
        outcomes = won[m].numpy()[valid[m]]

        def loss(weights, columns=columns, outcomes=outcomes):
            scores = columns @ weights
            ridges = ridge * (weights[:2] ** 2).sum() + 30.0 * (weights[2] - 1) ** 2
            return (np.logaddexp(0, scores) - outcomes * scores).sum() + ridges / 2

        quality, bias, slope = minimize(loss, [0.0, 0.0, 1.0], tol=1e-12).x
        expected = (1 / (1 + np.exp(-(quality + slope * own)))).mean()
        assert_close(control.rates[m], float64(expected), rtol=0, atol=1e-5)
        assert_close(control.length_effects[m], float64(bias), rtol=0, atol=1e-4)


def test_joint_length_control_recovers_the_unbiased_rates_of_a_biased_judge():
    qualities = [-2.0, -1.0, -0.3, 0.2, 0.8, 1.5]
    won, lengths, unbiased = judged(qualities, 1.5, 800, seed=2)
    control = length_controlled_win_rates(won, lengths)
    # one standard error of a rate is at most sqrt(0.25 / 800) = 1.8 %, and more with a regressor
    assert_close(control.rates, unbiased, rtol=0, atol=0.06)
    raw = won.mean(dim=1)
    assert float((raw - unbiased).abs().max()) > 0.12
    assert float(control.length_effects.mean()) == pytest.approx(1.5, abs=0.4)


@pytest.mark.parametrize("policies", [2, 3])
def test_few_comparisons_do_not_fit_the_difficulty_to_their_own_noise(policies):
    errors = []
    for seed in range(12):
        won, lengths, unbiased = judged([-1.5, 1.5, 0.0][:policies], 1.2, 400, seed=seed)
        errors.append(length_controlled_win_rates(won, lengths).rates - unbiased)
    # one standard error is at most 4 % / sqrt(12) = 1.2 %; without the ridge of the slope, the
    # rates of two are off by 4 to 5 points
    assert float(torch.stack(errors).mean(dim=0).abs().max()) < 0.03


def test_swapping_all_policies_with_the_baseline_mirrors_the_joint_rates():
    won, lengths, _ = judged([-1.0, 0.5, 1.0], 1.0, 60, seed=3)
    forward = length_controlled_win_rates(won, lengths)
    backward = length_controlled_win_rates(1 - won, -lengths)
    assert_close(backward.rates, 1 - forward.rates)
    assert_close(backward.difficulties, -forward.difficulties)


def test_a_comparison_whose_lengths_differ_by_one_amount_has_no_joint_rate():
    won, lengths, _ = judged([0.0, 0.5], 1.0, 40, seed=4)
    lengths[1] = 30.0
    rates = length_controlled_win_rates(won, lengths).rates
    assert rates.isnan().tolist() == [False, True]
    lengths[1] = 0.0  # equal lengths: the rate is the raw one, but for the ridge
    equal = length_controlled_win_rates(won, lengths).rates[1]
    assert_close(equal, won[1].mean(), rtol=0, atol=1e-3)


def test_a_comparison_without_outcomes_is_refused():
    won = torch.stack([torch.ones(5), torch.full((5,), math.nan)])
    with pytest.raises(ValueError, match="a comparison has no outcome that is not NaN"):
        length_controlled_win_rates(won, torch.arange(10.0).view(2, 5))
