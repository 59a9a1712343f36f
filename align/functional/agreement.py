"""How far a judge can be trusted: agreement, position bias, length bias, power.

A preference is 1 if the policy's completion is the better one, 0.5 for a tie and 0 otherwise; NaN
is missing and left out. ``forward`` has the preferences for the policy when its completion is read
first, and ``backward`` those when it is read second.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.distributions import normal_quantile
from align.functional.intervals import (
    ROUNDING,
    Estimate,
    Interval,
    proportion_interval,
    share_interval,
)


def decisions(preferences: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round preferences to a decision: 1 above one half, 0.5 at one half, 0 below; NaN stays."""
    decided = (torch.sign(preferences.double() - 0.5) + 1) / 2
    return decided.masked_fill(preferences.isnan(), math.nan)  # sign(NaN) is 0


def cohen_kappa(
    first: Float[Tensor, "prompts *rest"],
    second: Float[Tensor, "prompts *rest"],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Agreement of two judges beyond chance: 1 for equal decisions, 0 for independent ones.

    ``(p - e) / (1 - e)``, where p is the share of equal decisions and e that of independent judges
    with the same frequencies of win, tie and loss. NaN where both judges always give one and the
    same decision. The interval is that of :func:`align.functional.intervals.proportion_interval`
    for ``(1 + kappa) / 2``, with the influence of each prompt on it.

    Source: Cohen 1960, Educational and Psychological Measurement 20, 37 to 46; influences: Fleiss,
    Cohen and Everitt 1969, Psychological Bulletin 72, 323 to 327, eq. 13.
    """
    tables = _tables(first, second)
    shares = tables.sum(dim=0) / tables.sum()
    rows, columns = shares.sum(dim=1), shares.sum(dim=0)
    agreed, chance = float(shares.trace()), float(rows @ columns)
    if chance >= 1 - ROUNDING:
        return Estimate(math.nan, Interval(math.nan, math.nan))
    kappa = (agreed - chance) / (1 - chance)
    # Derivative of kappa by the share of each pair of decisions.
    slopes = torch.eye(3, dtype=torch.float64) / (1 - chance)
    slopes = slopes - (1 - agreed) / (1 - chance) ** 2 * (columns[:, None] + rows[None, :])
    slopes = slopes - (slopes * shares).sum()
    influences = (tables * slopes).sum(dim=(1, 2)) * len(tables) / tables.sum()
    low, high = share_interval((1 + kappa) / 2, influences / 2, confidence=confidence)
    return Estimate(kappa, Interval(2 * low - 1, 2 * high - 1))


def _tables(first: Tensor, second: Tensor) -> Float[Tensor, "prompts 3 3"]:
    """How often each pair of decisions occurs, by prompt."""
    levels = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    rows = decisions(first).flatten(start_dim=1) if first.dim() > 1 else decisions(first)[:, None]
    columns = decisions(second).reshape(rows.shape)
    valid = ~(rows.isnan() | columns.isnan())
    if not bool(valid.any()):
        raise ValueError("expected pairs with two decisions, found none")
    one = (rows[..., None] == levels).double() * valid[..., None]
    other = (columns[..., None] == levels).double()
    tables = torch.einsum("nki,nkj->nij", one, other)
    return tables[tables.sum(dim=(1, 2)) > 0]


def krippendorff_alpha(
    values: Float[Tensor, "units annotators"], *, confidence: float = 0.95
) -> Estimate:
    """Agreement of any number of annotators beyond chance; NaN where one gave no value.

    ``1 - D / E``: D is the mean squared difference of values of one unit, E that of any two values.
    Units with fewer than two values are left out. With two kinds of values it is the alpha for
    nominal data as well. NaN where fewer than two units remain, or all values are equal. The
    interval is that of :func:`align.functional.intervals.proportion_interval` for
    ``(1 + alpha) / 2``, with the influence of each unit on it.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section D, with the
    difference function of interval data.
    """
    rows = values.detach().to("cpu", torch.float64)
    rows = rows[(~rows.isnan()).sum(dim=1) >= 2]
    counts = (~rows.isnan()).sum(dim=1).double()
    sums, squares = rows.nansum(dim=1), rows.square().nansum(dim=1)
    n, total, total_squares = float(counts.sum()), float(sums.sum()), float(squares.sum())
    expected = 2 * (n * total_squares - total**2)  # of all ordered pairs of values
    if len(rows) < 2 or expected <= ROUNDING * max(1.0, n * total_squares):
        return Estimate(math.nan, Interval(math.nan, math.nan))
    observed = 2 * (counts * squares - sums**2) / (counts - 1)  # of the ordered pairs of each unit
    ratio = float(observed.sum()) / expected
    alpha = 1 - (n - 1) * ratio
    # Derivative of alpha by the number of times that each unit occurs.
    of_expected = 2 * (counts * total_squares + n * squares - 2 * total * sums)
    slopes = -(counts * ratio + (n - 1) * (observed - ratio * of_expected) / expected)
    low, high = share_interval((1 + alpha) / 2, len(rows) * slopes / 2, confidence=confidence)
    return Estimate(alpha, Interval(2 * low - 1, 2 * high - 1))


def consistency(
    forward: Float[Tensor, "prompts *rest"],
    backward: Float[Tensor, "prompts *rest"],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Share of the pairs with the same decision in both orders."""
    same = (decisions(forward) == decisions(backward)).double()
    same = same.masked_fill(forward.isnan() | backward.isnan(), math.nan)
    return _share(same, confidence)


def position_bias(
    forward: Float[Tensor, "prompts *rest"],
    backward: Float[Tensor, "prompts *rest"],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Win rate of the completion that is read first; one half without bias.

    Each pair is read in both orders, so the quality of the completions cancels.
    """
    return _share((forward.double() + 1 - backward.double()) / 2, confidence)


def length_bias(
    outcomes: Float[Tensor, "prompts *rest"],
    length_differences: Float[Tensor, "prompts *rest"],
    *,
    confidence: float = 0.95,
) -> Estimate | None:
    """Win rate of the longer completion; pairs of equal length are left out.

    None where all lengths are equal. Longer completions may deserve to win: the rate of people on
    the same pairs is what to compare with.
    """
    longer = torch.where(length_differences > 0, outcomes.double(), 1 - outcomes.double())
    longer = longer.masked_fill(length_differences == 0, math.nan)
    return None if bool(longer.isnan().all()) else _share(longer, confidence)


def self_agreement(
    preferences: Float[Tensor, "prompts *rest verdicts"], *, confidence: float = 0.95
) -> Estimate | None:
    """Probability that two verdicts about one pair are the same decision.

    The mean over all pairs of verdicts about the same pair in the same order; None with fewer than
    two.
    """
    decided = decisions(preferences)
    first, second = torch.triu_indices(decided.shape[-1], decided.shape[-1], offset=1)
    same = (decided[..., first] == decided[..., second]).double()
    same = same.masked_fill(decided[..., first].isnan() | decided[..., second].isnan(), math.nan)
    return None if same.numel() == 0 or bool(same.isnan().all()) else _share(same, confidence)


def detectable_difference(
    n_prompts: int, *, deviation: float = 0.5, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Smallest distance of the win rate from one half that an evaluation probably detects.

    A policy that is so much better has an interval without one half with probability ``power``.
    ``deviation`` is the standard deviation of the mean outcomes of prompts; 0.5 for one completion
    per prompt without ties. The result is never less than half the width of the interval if all
    prompts are ties.

    Source: Cohen 1988, Statistical Power Analysis for the Behavioral Sciences, section 2.4.
    """
    quantiles = normal_quantile((1 + confidence) / 2) + normal_quantile(power)
    drawn = ((1 - confidence) / 2) ** (1 / n_prompts)
    return max(quantiles * deviation / math.sqrt(n_prompts), (1 - drawn) / 2)


def _share(values: Float[Tensor, "prompts *rest"], confidence: float) -> Estimate:
    """Mean of values in [0, 1] with its interval."""
    return Estimate(float(values.nanmean()), proportion_interval(values, confidence=confidence))
