"""Win rates and their p-values.

All computations are in float64 on the CPU, and nothing draws from the global random state. An
outcome is 1 for a win, 0.5 for a tie, 0 for a loss, and NaN where it is missing. Prompts are
independent of each other, completions of one prompt are not: a prompt is one observation, however
many completions it has. Intervals are in :mod:`align.functional.intervals`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.intervals import Interval, batches, prompt_means, proportion_interval

SMALLEST_P_VALUE = 1e-12
"""Of :func:`win_rate_p_value`: smaller levels are lost in the rounding of a confidence."""


def outcomes(
    policy_scores: Float[Tensor, "prompts completions"],
    baseline_scores: Float[Tensor, "prompts completions"],
) -> Float[Tensor, "prompts completions"]:
    """Compare completion k of the policy with completion k of the baseline: 1 win, 0.5 tie, 0 loss.

    A NaN score makes its outcome NaN, so that an invalid verdict is not counted as a loss.
    """
    won = (policy_scores > baseline_scores).double() + 0.5 * (policy_scores == baseline_scores)
    return won.masked_fill(policy_scores.isnan() | baseline_scores.isnan(), math.nan)


def win_rate(outcomes: Float[Tensor, "prompts *rest"]) -> Float[Tensor, ""]:
    """Mean outcome: wins plus half the ties, as a fraction of all comparisons that are not NaN."""
    return outcomes.double().nanmean()


def missing_bounds(outcomes: Float[Tensor, "prompts *rest"]) -> Interval:
    """Win rate if every missing (NaN) outcome were a loss, and if every one were a win.

    Bounds on the rate of the complete sample, whatever the missing verdicts are; not a confidence
    interval.

    Source: Horowitz and Manski 2000, Journal of the American Statistical Association 95, 77 to 84.
    """
    rows = outcomes.detach().to("cpu", torch.float64)
    if rows.numel() == 0:
        raise ValueError(f"expected outcomes, found none: shape {tuple(rows.shape)}")
    return Interval(rows.nan_to_num(nan=0.0).mean().item(), rows.nan_to_num(nan=1.0).mean().item())


def win_rate_p_value(outcomes: Float[Tensor, "prompts *rest"]) -> Float[Tensor, ""]:
    """Two-sided p-value for a win rate of one half, which agrees with the interval of the rate.

    It is the smallest level at which :func:`align.functional.intervals.proportion_interval` of
    confidence ``1 - level`` excludes one half: below 0.05 where the 95 % interval does. Where all
    prompts are won, it is that of the sign test. Of :func:`paired_permutation_p_value`, which
    assumes a symmetric distribution, 13 % are below 0.05 at 20 prompts with one loss of all
    completions for five narrow wins; of these fewer than 1 %. It is at least 1e-12.

    Source: Casella and Berger 2002, Statistical Inference, section 9.2.1 (a test by inverting an
    interval).
    """

    def excludes_half(level: float) -> bool:
        low, high = proportion_interval(outcomes, confidence=1 - level)
        return not low <= 0.5 <= high

    excluded, included = 1.0, SMALLEST_P_VALUE
    if excludes_half(included):
        return torch.tensor(included, dtype=torch.float64)
    for _ in range(32):  # to a relative error of 1e-8
        level = math.sqrt(excluded * included)
        if excludes_half(level):
            excluded = level
        else:
            included = level
    return torch.tensor(excluded, dtype=torch.float64)


def paired_permutation_p_value(
    differences: Float[Tensor, "prompts *rest"],
    *,
    resamples: int = 2**14,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """Two-sided p-value for a mean difference of 0, by flipping the signs of prompts.

    The null hypothesis is that policy and baseline can be exchanged: a prompt's difference is as
    likely as its negative. That is more than a mean of 0, so a skewed distribution with that mean
    is rejected too often; use :func:`win_rate_p_value` for win rates. Several values of one prompt
    are averaged first and flip together. If ``2**prompts <= resamples`` (by
    default 14 prompts or fewer; those without a difference do not count), every flip is enumerated
    and the p-value is exact. Otherwise flips are drawn, and the observed one counts as one of them,
    so the p-value is never 0.

    Source: Fisher 1935, The Design of Experiments, section 21; Phipson and Smyth 2010,
    arXiv:1603.05766.
    """
    prompts = prompt_means(differences)
    means = (prompts.weights * prompts.means)[prompts.means != 0]
    exact = 2 ** len(means) <= resamples
    total = 2 ** len(means) if exact else resamples
    # Sums that are mathematically equal differ by round-off; they must count as equal.
    observed = means.sum().abs() - 1e-12 * means.abs().sum()
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for batch in batches(total, len(means)):
        if exact:
            flips = torch.arange(batch.start, batch.stop)[:, None] >> torch.arange(len(means)) & 1
        else:
            flips = torch.randint(2, (len(batch), len(means)), generator=generator)
        extreme += int(((1 - 2 * flips).double() @ means).abs().ge(observed).sum())
    p_value = extreme / total if exact else (extreme + 1) / (total + 1)
    return torch.tensor(p_value, dtype=torch.float64)
