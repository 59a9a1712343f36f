"""Confidence intervals of means over prompts.

Prompts are independent of each other, completions of one prompt are not: a prompt is one
observation, however many completions it has. NaN values are missing and left out. All computations
are in float64 on the CPU, and nothing draws from the global random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


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
    """Interval for the mean of ``values``, by the percentile bootstrap over prompts.

    A resample draws whole prompts with all their completions (a cluster bootstrap). For the
    difference between two policies on the same prompts, pass the difference of their outcomes.

    The interval relies on about five prompts that differ from the others. Where all prompts agree
    its width is 0: for values in [0, 1] use :func:`proportion_interval`.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; clusters:
    Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8.
    """
    check_confidence(confidence)
    means, weights = prompt_means(values)
    generator = torch.Generator().manual_seed(seed)
    resampled = []
    for batch in batches(resamples, len(means)):
        drawn = torch.randint(len(means), (len(batch), len(means)), generator=generator)
        resampled.append((weights * means)[drawn].mean(dim=1) / weights[drawn].mean(dim=1))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(resampled), tails).tolist()
    return Interval(low, high)


def proportion_interval(
    values: Float[Tensor, "prompts *rest"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval for a mean of outcomes in [0, 1]: :func:`bootstrap_interval`, never of width 0.

    Resamples contain no other values than the sample, which matters where nearly all prompts
    agree, such as on a tie. The interval therefore allows for outcomes that were not drawn: a share
    q of prompts with outcome 0 at its lower end and with 1 at its upper end. That none of them is
    drawn is as likely as each tail: ``(1 - q) ** prompts`` is ``(1 - confidence) / 2``. If all
    prompts are won or all are lost, this is the exact interval of Clopper and Pearson.

    >>> ends = proportion_interval(torch.ones(55, 1))  # 0.025 ** (1 / 55)
    >>> ties = proportion_interval(torch.full((55, 1), 0.5))  # 0.5 * 0.9351, and as far above 0.5
    >>> [round(end, 4) for end in (*ends, *ties)]
    [0.9351, 1.0, 0.4676, 0.5324]

    Source: Clopper and Pearson 1934, Biometrika 26 (4), 404 to 413.
    """
    low, high = bootstrap_interval(values, confidence=confidence, resamples=resamples, seed=seed)
    prompts = prompt_means(values)
    drawn = ((1 - confidence) / 2) ** (1 / len(prompts.means))
    mean = prompts.mean
    return Interval(min(low, mean * drawn), max(high, 1 - (1 - mean) * drawn))


def check_confidence(confidence: float) -> None:
    """Raise a ValueError where a confidence level is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")


def batches(total: int, width: int) -> Iterator[range]:
    """Split ``range(total)`` so that rows of ``width`` 8-byte numbers fill at most 8 MiB."""
    rows = max(1, 2**20 // max(1, width))
    for start in range(0, total, rows):
        yield range(start, min(start + rows, total))
