"""Prediction-powered means against values by hand, limits and simulation."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import t
from torch import Tensor

from align.functional import intervals
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


def test_labels_outside_0_to_1_are_refused():
    with pytest.raises(ValueError, match="labels: expected 0 to 1, found 1 to 5"):
        prediction_powered_mean(torch.tensor([1.0, 5.0]), torch.ones(2), torch.ones(9))


def judged(labels: int, others: int, rate: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, and a judge that is right about 90 % of the wins and 80 % of the losses."""
    rng = np.random.default_rng([seed, 5])
    won = rng.random(labels + others) < rate
    judged = np.where(won, rng.random(len(won)) < 0.9, rng.random(len(won)) < 0.2)
    true, predicted = torch.from_numpy(won).double(), torch.from_numpy(judged).double()
    return true[:labels], predicted[:labels], predicted[labels:]


def test_the_mean_agrees_with_the_weight_of_least_variance_by_search():
    labels, predicted, others = judged(60, 60, 0.7, seed=0)
    everything = torch.cat([predicted, others]).var()

    def squared_error(weight: float) -> float:
        # Var(mean(labels)) - 2 w Cov / n + w^2 Var(predictions) (1 / n + 1 / N), n = N
        covariance = np.cov(labels, predicted)[0, 1]
        by_weight = weight**2 * float(everything) * (1 / 60 + 1 / 60)
        return float(labels.var()) / 60 - 2 * weight * covariance / 60 + by_weight

    weight = minimize_scalar(squared_error, bounds=(0, 1), method="bounded").x
    expected = labels.mean() + weight * (others.mean() - predicted.mean())
    result = prediction_powered_mean(labels, predicted, others)
    assert result.value == pytest.approx(float(expected), abs=1e-6)
    # about symmetric: its half width is Student's quantile times the standard error
    low, high = result.interval
    half = t(59).ppf(0.975) * math.sqrt(squared_error(weight))
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)


@pytest.fixture
def _cached_quantiles(monkeypatch):
    """Compute each quantile once: all evaluations have equally many labels."""
    monkeypatch.setattr(intervals, "t_quantile", cache(intervals.t_quantile))


def simulate(labels: int, rate: float, count: int) -> tuple[float, float]:
    """Coverage, and mean width over that of the interval of the labels alone."""
    covered, width, alone = 0, 0.0, 0.0
    for seed in range(count):
        sample = judged(labels, 10 * labels, rate, seed)
        low, high = prediction_powered_mean(*sample).interval
        covered += low <= rate <= high
        if seed % 10 == 0:
            width += high - low
            people = intervals.proportion_interval(sample[0])
            alone += people.high - people.low
    return covered / count, width / alone


@pytest.mark.usefixtures("_cached_quantiles")
def test_a_few_corrected_rates_contain_the_true_one_in_narrower_intervals():
    covered, width = simulate(30, 0.6, 100)
    # the correlation of the judge with the labels is 0.7: sqrt(1 - 0.7^2 * 10 / 11) = 0.74
    assert width == pytest.approx(0.74, abs=0.1)
    assert covered >= 0.88  # one standard error is 2.2 %


@pytest.mark.slow
@pytest.mark.usefixtures("_cached_quantiles")
@pytest.mark.parametrize(("labels", "rate"), [(20, 0.8)])
def test_corrected_rates_contain_the_true_one_in_93_to_97_of_100_samples(labels, rate):
    covered, width = simulate(labels, rate, 2000)
    assert 0.93 <= covered <= 0.97
    assert width < 0.85
