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

from align.functional.intervals import ROUNDING, Interval, batches, prompt_means


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


def win_rate_p_value(
    outcomes: Float[Tensor, "prompts *rest"], *, resamples: int = 2**14, seed: int = 0
) -> Float[Tensor, ""]:
    """Two-sided p-value for a win rate of one half, by the studentized bootstrap over prompts.

    The mean of each prompt's outcomes is one observation. Their t statistic is compared with those
    of resamples around the observed mean, in each tail, so their distribution may be skewed: at 20
    prompts with one loss of all completions for five narrow wins, 3 % of the p-values are below
    0.05; of :func:`paired_permutation_p_value`, which assumes a symmetric distribution, 13 %.

    The p-value is at least ``2 * (0.5 / rate) ** prompts``, where rate is that of the better
    policy: as in :func:`proportion_interval`, prompts with other outcomes may exist. It is never 0.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, sections 12.5 and 16.4.
    """
    prompts = prompt_means(outcomes)
    n, mean = len(prompts.means), prompts.mean
    least = 2 * (0.5 / max(mean, 1 - mean)) ** n
    distances = prompts.weights * (prompts.means - 0.5)
    observed = float(_t_statistics(distances[None]))
    generator = torch.Generator().manual_seed(seed)
    above = below = 0
    for batch in batches(resamples, n):
        drawn = torch.randint(n, (len(batch), n), generator=generator)
        statistics = _t_statistics((distances - distances.mean())[drawn])
        above += int((statistics >= observed - ROUNDING).sum())
        below += int((statistics <= observed + ROUNDING).sum())
    p_value = 2 * (min(above, below) + 1) / (resamples + 1)
    return torch.tensor(min(1.0, max(least, p_value)), dtype=torch.float64)


def _t_statistics(rows: Tensor) -> Tensor:
    """Mean over standard error of each row; infinite where all values are equal and not 0."""
    means = rows.mean(dim=1)
    means = torch.where(means.abs() > ROUNDING, means, 0.0)
    errors = rows.std(dim=1, correction=0) / math.sqrt(rows.shape[1])
    errors = torch.where(errors > ROUNDING, errors, 0.0)
    return torch.where(means == 0, 0.0, means / errors)


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
