"""Agreement, biases and power against values by hand, scikit-learn and simulation."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from align.functional import intervals
from align.functional.agreement import (
    cohen_kappa,
    consistency,
    detectable_difference,
    length_bias,
    position_bias,
    self_agreement,
)
from align.functional.intervals import proportion_interval


def test_kappa_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    first = rng.choice([0.0, 0.5, 1.0], (200, 2))
    second = np.where(rng.random((200, 2)) < 0.6, first, rng.choice([0.0, 0.5, 1.0], (200, 2)))
    names = {0.0: "lost", 0.5: "tie", 1.0: "won"}
    expected = cohen_kappa_score(
        [names[value] for value in first.flatten()], [names[value] for value in second.flatten()]
    )
    result = cohen_kappa(torch.from_numpy(first), torch.from_numpy(second))
    assert result.value == pytest.approx(expected)
    assert result.interval.low < expected < result.interval.high


def agreeing(prompts: int, agreement: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two judges of three completions per prompt; the second copies the first or draws."""
    rng = np.random.default_rng([seed, 7])
    rates = rng.beta(1.5, 1.5, (prompts, 1))
    first = (rng.random((prompts, 3)) < rates).astype(float)
    drawn = (rng.random((prompts, 3)) < 0.5).astype(float)
    second = np.where(rng.random((prompts, 3)) < agreement, first, drawn)
    return torch.from_numpy(first), torch.from_numpy(second)


def test_the_interval_of_kappa_is_as_wide_as_the_jackknife():
    first, second = agreeing(300, 0.6, seed=0)
    second[:, 0] = 1.0  # judges with different frequencies
    low, high = cohen_kappa(first, second).interval
    kept = [[k for k in range(300) if k != left_out] for left_out in range(300)]
    values = [cohen_kappa(first[rows], second[rows]).value for rows in kept]
    standard_error = math.sqrt(299 / 300 * np.square(values - np.mean(values)).sum())
    assert (high - low) / 2 == pytest.approx(1.968 * standard_error, rel=0.02)


def test_the_interval_of_kappa_at_full_agreement():
    # none of 20 prompts differs: 2 * 0.025 ** (1 / 20) - 1 = 0.663
    decided = torch.tensor([1.0, 0.0] * 10)
    assert cohen_kappa(decided, decided).interval == pytest.approx((0.663, 1.0), abs=1e-3)
    assert cohen_kappa(decided, 1 - decided).value == pytest.approx(-1.0)
    assert math.isnan(cohen_kappa(torch.ones(5), torch.ones(5)).value)


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "true"), [(20, 0.9)])
def test_the_interval_of_kappa_contains_it_in_93_to_97_of_100_samples(monkeypatch, prompts, true):
    monkeypatch.setattr(intervals, "t_quantile", cache(intervals.t_quantile))
    # Both judges decide evenly, so kappa is the share that the second copies.
    covered = 0
    for seed in range(2000):
        low, high = cohen_kappa(*agreeing(prompts, true, seed)).interval
        covered += low <= true <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_kappa_by_hand():
    # (won, won), (won, lost), (lost, lost), (lost, lost): agreed 3/4; chance 1/2 * 1/4 + 1/2 * 3/4
    # = 1/2; kappa (3/4 - 1/2) / (1 - 1/2) = 1/2. The missing pair is left out; 0.9 is a win.
    first = torch.tensor([1.0, 0.9, 0.0, 0.2, 1.0])
    second = torch.tensor([1.0, 0.0, 0.0, 0.0, math.nan])
    assert cohen_kappa(first, second).value == pytest.approx(0.5)


def test_consistency_and_position_bias_by_hand():
    # Preferences for the policy, read first and read second. The judge prefers the first completion
    # in pairs 2 and 4, a flip each; pair 5 is missing.
    forward = torch.tensor([1.0, 1.0, 0.0, 1.0, math.nan])
    backward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0])
    assert consistency(forward, backward).value == pytest.approx(2 / 4)
    # the first completion wins 1, 0 / 1, 1 / 0, 1 / 1, 1 of the eight times: 6 / 8
    assert position_bias(forward, backward).value == pytest.approx(6 / 8)
    assert position_bias(1 - backward, 1 - forward).value == pytest.approx(6 / 8)


def test_length_bias_by_hand():
    # the longer completion wins 1, ties, wins (the policy is shorter and loses); equal: left out
    outcomes = torch.tensor([1.0, 0.5, 0.0, 0.0])
    differences = torch.tensor([10.0, 5.0, -3.0, 0.0])
    assert length_bias(outcomes, differences).value == pytest.approx(2.5 / 3)
    assert length_bias(outcomes, torch.zeros(4)) is None


def test_self_agreement_by_hand():
    # three verdicts: won, won, lost: one pair of three agrees; tie, tie, missing: 1 of 1
    verdicts = torch.tensor([[1.0, 0.8, 0.0], [0.5, 0.5, math.nan]])
    assert self_agreement(verdicts).value == pytest.approx(2 / 4)
    assert self_agreement(verdicts[:, :1]) is None


def test_the_detectable_difference_by_hand():
    # (1.95996 + 0.84162) * 0.5 / sqrt(100)
    assert detectable_difference(100) == pytest.approx(0.140079, abs=1e-6)
    assert detectable_difference(400) == pytest.approx(0.140079 / 2, abs=1e-6)
    # ties alone: half of 1 - 0.025 ** (1 / 50)
    assert detectable_difference(50, deviation=0.0) == pytest.approx(0.0356, abs=1e-4)


@pytest.mark.parametrize("prompts", [50, 200])
def test_the_detectable_difference_is_detected_in_about_80_of_100_evaluations(monkeypatch, prompts):
    monkeypatch.setattr(intervals, "t_quantile", cache(intervals.t_quantile))
    rng = np.random.default_rng(0)
    rate = 0.5 + detectable_difference(prompts)
    detected = 0
    for _ in range(300):
        won = torch.from_numpy((rng.random(prompts) < rate).astype(float))
        detected += proportion_interval(won).low > 0.5
    # one standard error is sqrt(0.8 * 0.2 / 300) = 2.3 %; numbers of wins are whole: 3 % at 50
    assert detected / 300 == pytest.approx(0.8, abs=0.08)
