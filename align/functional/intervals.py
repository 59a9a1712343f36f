"""Confidence intervals of means over prompts.

Prompts are independent of each other, completions of one prompt are not: a prompt is one
observation, however many completions it has. NaN values are missing and left out. All computations
are in float64 on the CPU, and nothing draws from the global random state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.distributions import beta_quantile, normal_cdf, t_quantile

ROUNDING = 1e-12
"""Differences that are round-off: sums that are mathematically equal differ by less."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A number with its confidence interval."""

    value: float
    interval: Interval


class PromptMeans(NamedTuple):
    """The mean value of each prompt, and how much each prompt counts."""

    means: Float[Tensor, " prompts"]
    weights: Float[Tensor, " prompts"]
    """Number of values of the prompt over the mean number; 1 where nothing is missing."""

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return float((self.weights * self.means).mean())


def prompt_means(values: Float[Tensor, "prompts *rest"]) -> PromptMeans:
    """Average the values of each prompt without NaN; prompts without a value are left out.

    Raises:
        ValueError: There are no values, or some are infinite.
    """
    if values.numel() == 0:
        raise ValueError(f"expected values, found none: shape {tuple(values.shape)}")
    rows = values.detach().to("cpu", torch.float64).reshape(len(values), -1)
    if infinite := int(rows.isinf().sum()):
        raise ValueError(f"expected finite values; {infinite} of {rows.numel()} are infinite")
    counts = (~rows.isnan()).sum(dim=1).double()
    rows, counts = rows[counts > 0], counts[counts > 0]
    if len(rows) == 0:
        raise ValueError(f"expected values; all {values.numel()} are NaN")
    if bool((counts == rows.shape[1]).all()):
        return PromptMeans(rows.mean(dim=1), torch.ones_like(counts))
    return PromptMeans(rows.nansum(dim=1) / counts, counts / counts.mean())


def bootstrap_interval(
    values: Float[Tensor, "prompts *rest"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval for the mean of ``values``, by the expanded percentile bootstrap over prompts.

    A resample draws whole prompts with all their completions (a cluster bootstrap). For the
    difference between two policies on the same prompts, pass the difference of their outcomes.
    Percentiles of resamples lie too close together by the factor ``sqrt((n - 1) / n)`` and ignore
    that the variance is estimated; percentiles of Student's t distribution correct both.

    The interval relies on about five prompts that differ from the others. Where all prompts agree
    its width is 0: for values in [0, 1] use :func:`proportion_interval`.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; clusters:
    Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8; expansion:
    Hesterberg 2014, arXiv:1411.5279, section 5.3.
    """
    low, high = expanded_tails(len(prompt_means(values).means), confidence)
    means, weights = prompt_means(values)
    generator = torch.Generator().manual_seed(seed)
    resampled = []
    for batch in batches(resamples, len(means)):
        drawn = torch.randint(len(means), (len(batch), len(means)), generator=generator)
        resampled.append((weights * means)[drawn].mean(dim=1) / weights[drawn].mean(dim=1))
    tails = torch.tensor([low, high], dtype=torch.float64)
    return Interval(*torch.quantile(torch.cat(resampled), tails).tolist())


def expanded_tails(observations: int, confidence: float) -> Interval:
    """Levels of the percentiles of resamples that form an interval of this confidence.

    Source: Hesterberg 2014, arXiv:1411.5279, section 5.3.
    """
    check_confidence(confidence)
    if observations == 1:
        return Interval(0.0, 1.0)
    expansion = math.sqrt(observations / (observations - 1))
    tail = normal_cdf(-expansion * t_quantile((1 + confidence) / 2, observations - 1.0))
    return Interval(tail, 1 - tail)


def proportion_interval(
    values: Float[Tensor, "prompts *rest"], *, confidence: float = 0.95
) -> Interval:
    """Interval for a mean of values in [0, 1], such as a win rate; never of width 0.

    The interval of Wilson for as many independent wins and losses as have the variance of the
    prompt means: ``prompts / ratio``, where ``ratio`` is that variance over ``rate * (1 - rate)``.
    Near 0 and 1 few prompts determine the variance. The ratio is therefore moved toward 1, its
    value for equal outcomes within each prompt: its logarithm is multiplied by ``d / (d + 1)``,
    where d is the number of degrees of freedom of the variance, estimated from the kurtosis.

    An end within the limit that applies where all prompts are won (or all lost) can be missed on
    one side only. There, the whole error probability belongs to that side, by a Beta distribution.

    If all prompts have one mean, others may exist, but at most a share q of them, so that none is
    drawn with probability ``(1 - q) ** prompts = (1 - confidence) / 2``. The ends are the means if
    all of these were lost and won. If all prompts are won, that is the interval of Clopper and
    Pearson.

    >>> ends = proportion_interval(torch.ones(55, 1))  # 0.025 ** (1 / 55)
    >>> ties = proportion_interval(torch.full((55, 1), 0.5))  # 0.5 * 0.9351, and as far above 0.5
    >>> [round(end, 4) for end in (*ends, *ties)]
    [0.9351, 1.0, 0.4676, 0.5324]

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209 to 212; clusters:
    Korn and Graubard 1998, Survey Methodology 24, 193 to 201; both sides: Blaker 2000, Canadian
    Journal of Statistics 28, 783 to 798; Clopper and Pearson 1934, Biometrika 26, 404 to 413.
    """
    means, weights = prompt_means(values)
    if float(means.min()) < 0 or float(means.max()) > 1:
        raise ValueError(f"expected values in [0, 1], found {means.min():g} to {means.max():g}")
    mean = float((weights * means).mean())
    return share_interval(mean, weights * (means - mean), confidence=confidence)


def share_interval(
    rate: float,
    influences: Float[Tensor, " prompts"],
    *,
    confidence: float,
    further_variance: float = 0.0,
) -> Interval:
    """Interval of :func:`proportion_interval` for any estimate of a rate in [0, 1].

    The squared standard error of the rate is the variance of the prompts' influences over their
    number. ``further_variance`` is added to that variance.
    """
    check_confidence(confidence)
    n, rate = len(influences), min(1.0, max(0.0, rate))
    distances = influences - influences.mean()
    squares = float(distances.square().mean())
    if squares <= ROUNDING**2:
        drawn = ((1 - confidence) / 2) ** (1 / n)
        return Interval(rate * drawn, 1 - (1 - rate) * drawn)
    # The variance of a sample variance is about variance**2 * (kurtosis - 1) / n; that of a
    # chi-squared variable over its d degrees of freedom is 2 / d.
    kurtosis = float((distances**4).mean()) / squares**2
    degrees = min(n - 1.0, 2 * n / max(kurtosis - 1, ROUNDING))
    variance = squares * n / (n - 1) + further_variance
    ratio = variance / max(rate * (1 - rate), ROUNDING)
    size = n / ratio ** (degrees / (degrees + 1))
    share = t_quantile((1 + confidence) / 2, n - 1.0) ** 2 / size
    center = (rate + share / 2) / (1 + share)
    margin = math.sqrt(share * (rate * (1 - rate) + share / 4)) / (1 + share)
    low = 1 - _nearest_end(1 - center + margin, 1 - rate, size, confidence)
    return Interval(low, _nearest_end(center + margin, rate, size, confidence))


def _nearest_end(high: float, rate: float, size: float, confidence: float) -> float:
    """Upper end; one-sided where a rate of 1 is likelier than ``(1 - confidence) / 2``."""
    limit = ((1 - confidence) / 2) ** (1 / size)
    if high <= limit:
        return high
    one_sided = beta_quantile(confidence, rate * size + 0.5, (1 - rate) * size + 0.5)
    return min(high, max(one_sided, limit))


def check_confidence(confidence: float) -> None:
    """Raise a ValueError where a confidence level is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")


def batches(total: int, width: int) -> Iterator[range]:
    """Split ``range(total)`` so that rows of ``width`` 8-byte numbers fill at most 8 MiB."""
    rows = max(1, 2**20 // max(1, width))
    for start in range(0, total, rows):
        yield range(start, min(start + rows, total))
