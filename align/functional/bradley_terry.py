"""Several policies at once: win matrix, Bradley-Terry strengths, adjusted p-values.

``outcomes[i, j]`` are those of policy i against policy j, by prompt: 1 for a win, 0.5 for a tie, 0
for a loss, NaN where the two were not compared. It suffices to give one of ``[i, j]`` and
``[j, i]``; the other one is one minus it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.intervals import Interval, check_confidence, share_interval


def win_matrix(
    outcomes: Float[Tensor, "policies policies prompts *rest"],
) -> Float[Tensor, "policies policies"]:
    """Win rate of the policy of each row against that of each column; NaN if not compared."""
    wins, counts = _sums(outcomes)
    rates = wins.sum(dim=0) / counts.sum(dim=0)
    return rates.fill_diagonal_(0.5)


@dataclass(frozen=True, slots=True)
class Strengths:
    """Bradley-Terry strengths of several policies."""

    values: tuple[float, ...]
    """Log-odds of winning against the baseline, whose strength is 0."""
    intervals: tuple[Interval, ...]
    """Confidence interval of each strength; 0 to 0 for the baseline."""


def bradley_terry_strengths(
    outcomes: Float[Tensor, "policies policies prompts *rest"],
    *,
    baseline: int = 0,
    confidence: float = 0.95,
    ridge: float = 0.01,
) -> Strengths:
    """Strengths such that policy i beats policy j with probability ``sigmoid(s[i] - s[j])``.

    The loss is the summed cross-entropy of all comparisons plus ``ridge / 2 * sum(s**2)`` for
    strengths with mean 0, which keeps the strength of a policy that always wins finite. A tie is
    half a win and half a loss.

    The interval is the log-odds of that of :func:`align.functional.intervals.proportion_interval`
    for the probability of beating the baseline. A prompt with all comparisons on it is one
    observation; its influence is that on the solution of the likelihood equations. With two
    policies, the intervals are those of the win rate, in log-odds.

    Source: Bradley and Terry 1952, Biometrika 39, 324 to 345; fitted by Newton's method. Clusters:
    Liang and Zeger 1986, Biometrika 73, 13 to 22, eq. 5.

    Raises:
        ValueError: Some policies are not connected with the baseline by comparisons.
    """
    check_confidence(confidence)
    wins, counts = _sums(outcomes)
    _check_connected(counts.sum(dim=0), baseline)
    strengths, hessian = _fit(wins.sum(dim=0), counts.sum(dim=0), ridge)
    chances = torch.sigmoid(strengths[:, None] - strengths[None, :])
    scores = (wins - counts * chances).sum(dim=2)
    influences = len(wins) * torch.linalg.solve(hessian, scores.T)
    influences = influences - influences[baseline]
    values = (strengths - strengths[baseline]).tolist()
    intervals = []
    for policy, value in enumerate(values):
        if policy == baseline:
            intervals.append(Interval(0.0, 0.0))
            continue
        rate = float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)))
        ends = share_interval(rate, rate * (1 - rate) * influences[policy], confidence=confidence)
        intervals.append(Interval(*(math.log(end / (1 - end)) for end in map(_inside, ends))))
    return Strengths(tuple(values), tuple(intervals))


def _inside(share: float) -> float:
    """The share, at least 1e-15 away from 0 and 1, so that its log-odds are finite."""
    return min(1 - 1e-15, max(1e-15, share))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, so that few are too small by chance.

    The chance that any adjusted p-value of a true null hypothesis lies below a level is at most
    that level, however the tests depend on each other.

    >>> [round(p, 6) for p in holm_adjusted([0.01, 0.04, 0.03])]  # 3 * 0.01, 2 * 0.03, that
    [0.03, 0.06, 0.06]

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65 to 70.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def _sums(outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Wins and numbers of comparisons of each prompt, ``[prompts, policies, policies]``."""
    if outcomes.dim() < 3 or outcomes.shape[0] != outcomes.shape[1] or outcomes.numel() == 0:
        raise ValueError(
            "outcomes: expected the shape [policies, policies, prompts], "
            f"found {list(outcomes.shape)}"
        )
    rows = outcomes.detach().to("cpu", torch.float64).reshape(*outcomes.shape[:3], -1)
    rows = torch.where(rows.isnan(), 1 - rows.transpose(0, 1), rows)
    if not bool(((rows >= 0) & (rows <= 1) | rows.isnan()).all()):
        raise ValueError("outcomes: expected 0 to 1")
    wins, counts = rows.nansum(dim=3), (~rows.isnan()).sum(dim=3).double()
    off = 1 - torch.eye(len(rows), dtype=torch.float64)[..., None]
    return (wins * off).permute(2, 0, 1), (counts * off).permute(2, 0, 1)


def _check_connected(counts: Tensor, baseline: int) -> None:
    reached = {baseline}
    while new := {
        j for i in reached for j in range(len(counts)) if counts[i, j] > 0 and j not in reached
    }:
        reached |= new
    if apart := sorted(set(range(len(counts))) - reached):
        raise ValueError(f"outcomes: policies {apart} have no comparison that leads to {baseline}")


def _fit(wins: Tensor, counts: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Strengths with mean 0, and the second derivative of the loss at them."""
    strengths = torch.zeros(len(wins), dtype=torch.float64)
    for _ in range(100):
        chances = torch.sigmoid(strengths[:, None] - strengths[None, :])
        gradient = (wins - counts * chances).sum(dim=1) - ridge * strengths
        curvature = counts * chances * (1 - chances)
        hessian = torch.diag(curvature.sum(dim=1) + ridge) - curvature
        if gradient.abs().max() <= 1e-11 * max(1.0, float(counts.sum())):
            return strengths, hessian
        strengths = strengths + torch.linalg.solve(hessian, gradient).clamp(-4, 4)
    raise ValueError(f"the strengths did not converge; use a ridge above {ridge:g}")
