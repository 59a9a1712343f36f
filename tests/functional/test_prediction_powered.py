"""Prediction-powered means against values by hand, limits and simulation."""

import math

import pytest
import torch

from align.functional.prediction_powered import prediction_powered_mean


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_prediction_powered_mean_by_hand():
    # labels 1, 1, 0, 0; predictions of them 1, 1, 1, 0; of others 1, 0 (four times each).
    # covariance (0.5 * 0.25 + 0.5 * 0.25 - 0.5 * 0.25 + 0.5 * 0.75) / 3 = 1/6; variance of the
    # twelve predictions (7 ones): 7/12 * 5/12 * 12 / 11 = 35/132; weight = (1/6) / ((1 + 4/8) *
    # 35/132) = 44/105; mean 1/2 + 44/105 * (1/2 - 3/4) = 1/2 - 11/105
    labels, judged = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    result = prediction_powered_mean(labels, judged, torch.tensor([1.0, 0.0] * 4))
    assert result.value == pytest.approx(0.5 - 11 / 105)


def test_constant_predictions_leave_the_labels_alone():
    labels = torch.rand(50, generator=generator(0))
    result = prediction_powered_mean(labels, torch.ones(50), torch.ones(500))
    assert result.value == pytest.approx(float(labels.mean()))


def test_a_missing_label_leaves_its_prompt_out():
    labels, judged = torch.rand(2, 20, generator=generator(1))
    others = torch.rand(100, generator=generator(2))
    labels[4], judged[7] = math.nan, math.nan
    kept = [i for i in range(20) if i not in (4, 7)]
    assert prediction_powered_mean(labels, judged, others) == prediction_powered_mean(
        labels[kept], judged[kept], others
    )


def test_one_label_is_refused():
    with pytest.raises(ValueError, match="at least two prompts, found 1"):
        prediction_powered_mean(torch.ones(1), torch.ones(1), torch.ones(9))
