"""The law of over-optimization: exact recovery, numpy's least squares, and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.functional.overoptimization import fit_overoptimization, overoptimization_gain

POINTS = torch.tensor([0.0, 0.3, 1.0, 2.5, 6.0, 12.0])
"""KL of the points of a run."""


def law(kl: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.tensor(
        [math.sqrt(k) * (alpha - beta * math.log(math.sqrt(k))) if k else 0.0 for k in kl.tolist()]
    )


def noisy(
    runs: int, prompts: int, *, seed: int, between_runs: float = 0.0
) -> tuple[Tensor, Tensor]:
    """KL and gains around the law with alpha 0.3 and beta 0.12, with noise of prompts and runs."""
    generator = torch.Generator().manual_seed(seed)
    shape = runs, prompts, len(POINTS)
    kl = POINTS * (1 + 0.2 * torch.randn(shape, generator=generator))
    of_prompts = 0.3 * torch.randn(1, prompts, 1, generator=generator)
    gains = law(POINTS, 0.3, 0.12) + (POINTS > 0) * (
        of_prompts + 0.2 * torch.randn(shape, generator=generator)
    )
    gains += between_runs * POINTS.sqrt() * torch.randn(runs, 1, 1, generator=generator)
    return kl, gains


def test_exact_points_give_alpha_beta_and_the_peak():
    kl = POINTS.expand(2, 4, -1)
    gains = law(POINTS, 0.3, 0.12).expand(2, 4, -1)
    fit = fit_overoptimization(kl, gains, resamples=50)
    # d R / d d = alpha - beta - beta log d = 0 at d = exp(0.3 / 0.12 - 1) = exp(1.5)
    assert fit.alpha.value == pytest.approx(0.3, abs=1e-6)
    assert fit.beta.value == pytest.approx(0.12, abs=1e-6)
    assert fit.peak.value == pytest.approx(math.exp(1.5), rel=1e-5)
    assert fit.peak_gain.value == pytest.approx(0.12 * math.exp(1.5), rel=1e-5)
    assert fit.r_squared == pytest.approx(1.0)
    for each in (fit.alpha, fit.beta, fit.peak):
        assert each.interval == pytest.approx((each.value, each.value), rel=1e-5)


def test_no_distance_gains_more_than_the_peak():
    distances = torch.linspace(0.01, 20, 4000)
    gains = overoptimization_gain(distances, alpha=0.3, beta=0.12)
    fit = fit_overoptimization(
        (distances**2)[None, None], gains[None, None], resamples=1
    )  # the peak of a fine grid is that of the formula
    assert distances[gains.argmax()].item() == pytest.approx(fit.peak.value, abs=0.01)
    assert gains.max().item() == pytest.approx(fit.peak_gain.value, abs=1e-5)


def test_the_fit_is_the_least_squares_fit_of_numpy():
    kl, gains = noisy(3, 20, seed=0)
    fit = fit_overoptimization(kl, gains, resamples=1)
    distance = np.sqrt(np.maximum(kl.double().mean(1).numpy().ravel(), 0))
    logs = np.log(distance, where=distance > 0, out=np.zeros_like(distance))
    basis = np.stack([distance, -distance * logs], axis=1)
    target = gains.double().mean(1).numpy().ravel()
    (alpha, beta), residuals, *_ = np.linalg.lstsq(basis, target, rcond=None)
    assert (fit.alpha.value, fit.beta.value) == pytest.approx((alpha, beta))
    assert fit.r_squared == pytest.approx(1 - residuals[0] / (target**2).sum())


def test_intervals_over_prompts_cover_the_truth_as_often_as_stated():
    covered = 0
    for seed in range(100):
        fit = fit_overoptimization(*noisy(1, 60, seed=seed), resamples=200, confidence=0.9)
        covered += fit.alpha.interval.low <= 0.3 <= fit.alpha.interval.high
    assert 82 <= covered <= 98  # 90 +- 3 standard errors of 100 draws, 2.6 with rounding


def test_runs_that_differ_widen_the_interval():
    def width(between_runs: float) -> float:
        kl, gains = noisy(5, 60, seed=3, between_runs=between_runs)
        interval = fit_overoptimization(kl, gains, resamples=300).alpha.interval
        return interval.high - interval.low

    # five runs with standard deviation 0.2 each: at least 2 * 1.96 * 0.2 / sqrt(5) * 0.5 wide
    assert width(0.2) > max(2 * width(0.0), 0.17)


def test_a_gain_that_never_falls_has_no_finite_peak():
    kl = POINTS.expand(1, 3, -1)
    fit = fit_overoptimization(kl, 0.1 * POINTS.expand(1, 3, -1), resamples=10)
    assert fit.beta.value < 0
    assert fit.peak.value == fit.peak_gain.value == fit.peak.interval.high == math.inf


def test_the_band_of_the_curve_is_that_of_the_resampled_laws():
    fit = fit_overoptimization(*noisy(2, 40, seed=1), resamples=500)
    gains = [overoptimization_gain(torch.tensor([2.0]), alpha=a, beta=b).item()
             for a, b in fit.resampled.tolist()]  # fmt: skip
    low, high = np.quantile(gains, [0.025, 0.975], method="nearest")
    assert fit.gain_interval(2.0) == pytest.approx((low, high), abs=2e-3)
    assert fit.gain_interval(1.0) == pytest.approx(fit.alpha.interval)  # log 1 = 0


def test_a_single_distance_is_refused():
    kl = torch.full((1, 4, 3), 2.0)
    with pytest.raises(ValueError, match="two different distances"):
        fit_overoptimization(kl, kl)


def test_the_law_by_hand():
    gains = overoptimization_gain(torch.tensor([0.0, 1.0, 4.0]), alpha=0.5, beta=0.25)
    assert_close(gains, torch.tensor([0.0, 0.5, 4 * (0.5 - 0.25 * math.log(4))]))
