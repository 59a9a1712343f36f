"""Agreement, biases and power against values by hand, scikit-learn and simulation."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from align.functional.agreement import (
    cohen_kappa,
    consistency,
    detectable_difference,
    length_bias,
    position_bias,
    self_agreement,
)


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
