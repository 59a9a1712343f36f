"""The law of over-optimization: the gold score against the distance from the initial policy.

A policy that is trained on a reward model gains gold score at first and loses it later. Against the
distance ``d = sqrt(KL)`` from the initial policy, the gain is about ``d * (alpha - beta * log d)``.
All computations are in float64 on the CPU, and nothing draws from the global random state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.intervals import Estimate, Interval, check_confidence


def overoptimization_gain(
    distance: Float[Tensor, " points"], *, alpha: float, beta: float
) -> Float[Tensor, " points"]:
    """Gold score above that of the initial policy: ``d * (alpha - beta * log d)``; 0 at 0.

    >>> overoptimization_gain(torch.tensor([0.0, 1.0, math.e]), alpha=0.3, beta=0.1)
    tensor([0.0000, 0.3000, 0.5437])

    Source: Gao et al. 2022, arXiv:2210.10760, eq. 2 (reinforcement learning).
    """
    return alpha * distance - beta * torch.special.xlogy(distance, distance)


@dataclass(frozen=True, slots=True)
class OveroptimizationFit:
    """The law of over-optimization, fitted to gold scores at several distances."""

    alpha: Estimate
    """Gain at distance 1."""
    beta: Estimate
    """Fall of the gain per distance when the distance grows by the factor e."""
    peak: Estimate
    """Distance of the highest gain, ``exp(alpha / beta - 1)``; infinite where it never falls."""
    peak_gain: Estimate
    """The highest gain, ``beta * peak``; infinite where it never falls."""
    r_squared: float
    """Share of the squared gains that the law explains."""
    resampled: Float[Tensor, "resamples 2"]
    """``alpha`` and ``beta`` of each bootstrap resample."""
    confidence: float

    def gain(self, distance: float) -> float:
        """Gain at a distance, by the fitted law."""
        return distance * (self.alpha.value - self.beta.value * math.log(distance))

    def gain_interval(self, distance: float) -> Interval:
        """Interval of the gain at a distance, from the bootstrap."""
        basis = torch.tensor([distance, -math.log(distance) * distance]).double()
        return _percentiles(self.resampled @ basis, self.confidence)


def fit_overoptimization(
    kl: Float[Tensor, "runs prompts points"],
    gains: Float[Tensor, "runs prompts points"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> OveroptimizationFit:
    """Least squares fit of the law, with bootstrap intervals over runs and prompts.

    ``kl`` is the log-ratio of a completion between policy and initial policy, ``gains`` its gold
    score minus that of the initial policy on the same prompt. Runs share their prompts. A point is
    the mean over the prompts of a run: ``(sqrt(mean kl), mean gain)``; a mean KL below 0, which is
    sampling noise, counts as 0.

    A resample draws runs and, independently, prompts, both with replacement. With one run the
    intervals cover the choice of prompts only; with few runs they are too narrow.

    Source: Gao et al. 2022, arXiv:2210.10760, eq. 2; resampling of crossed factors: Owen 2007, The
    pigeonhole bootstrap, Annals of Applied Statistics 1, 386 to 411.
    """
    check_confidence(confidence)
    kl, gains = (each.detach().to("cpu", torch.float64) for each in (kl, gains))
    if not bool((kl.isfinite() & gains.isfinite()).all()):
        raise ValueError("expected finite values of KL and gains")
    runs, prompts, _ = kl.shape
    (estimate,), r_squared = _least_squares(
        kl.mean(1)[None], gains.mean(1)[None], torch.ones(1, runs).double()
    )
    generator = torch.Generator().manual_seed(seed)
    run_counts = _resample(runs, resamples, generator)
    shares = _resample(prompts, resamples, generator) / prompts
    mean_kl, mean_gains = (torch.einsum("sp,rpt->srt", shares, each) for each in (kl, gains))
    resampled, _ = _least_squares(mean_kl, mean_gains, run_counts)

    def with_interval(value: Tensor, values: Tensor) -> Estimate:
        return Estimate(float(value), _percentiles(values, confidence))

    peak, peaks = _peaks(estimate[None])[0], _peaks(resampled)
    return OveroptimizationFit(
        alpha=with_interval(estimate[0], resampled[:, 0]),
        beta=with_interval(estimate[1], resampled[:, 1]),
        peak=with_interval(peak, peaks),
        peak_gain=with_interval(
            _peak_gains(estimate[None], peak[None])[0], _peak_gains(resampled, peaks)
        ),
        r_squared=r_squared,
        resampled=resampled,
        confidence=confidence,
    )


def _resample(size: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "s n"]:
    """How often each of ``size`` observations is drawn in each resample."""
    drawn = torch.randint(size, (resamples, size), generator=generator)
    return (
        torch.zeros(resamples, size)
        .double()
        .scatter_add_(1, drawn, torch.ones(1).double().expand(resamples, size))
    )


def _least_squares(
    kl: Float[Tensor, "s runs points"],
    gains: Float[Tensor, "s runs points"],
    weights: Float[Tensor, "s runs"],
) -> tuple[Float[Tensor, "s 2"], float]:
    """Alpha and beta of each sample; and the explained share of the squares of the first one."""
    distance = kl.clamp(min=0).sqrt()
    basis = torch.stack([distance, -torch.special.xlogy(distance, distance)], dim=-1)
    weighted = basis * weights[:, :, None, None]
    products = torch.einsum("srti,srtj->sij", weighted, basis)
    if bool(
        (torch.linalg.det(products) <= 1e-12 * products.diagonal(dim1=1, dim2=2).prod(1)).any()
    ):
        raise ValueError("expected at least two different distances above 0")
    solution = torch.linalg.solve(products, torch.einsum("srti,srt->si", weighted, gains))
    residuals = gains[0] - basis[0] @ solution[0]
    return solution, 1 - float(residuals.square().sum() / gains[0].square().sum())


def _peaks(fits: Float[Tensor, "fits 2"]) -> Float[Tensor, " fits"]:
    """Distance of the highest gain of each fit; infinite where beta is not positive."""
    alpha, beta = fits.unbind(1)
    return torch.where(beta > 0, (alpha / beta.clamp(min=1e-300) - 1).exp(), torch.inf)


def _peak_gains(
    fits: Float[Tensor, "fits 2"], peaks: Float[Tensor, " fits"]
) -> Float[Tensor, " fits"]:
    """The highest gain of each fit: ``beta * peak``, infinite where it never falls."""
    return torch.where(fits[:, 1] > 0, fits[:, 1] * peaks, torch.inf)


def _percentiles(values: Float[Tensor, " resamples"], confidence: float) -> Interval:
    """The central share of the values, as far as they are; an end may be infinite."""
    ordered = values.sort().values
    tail = (1 - confidence) / 2
    low, high = (round(share * (len(ordered) - 1)) for share in (tail, 1 - tail))
    return Interval(float(ordered[low]), float(ordered[high]))
