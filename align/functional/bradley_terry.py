"""Several policies at once: win matrix, Bradley-Terry strengths, adjusted p-values.

``outcomes[i, j]`` are those of policy i against policy j, by prompt: 1 for a win, 0.5 for a tie, 0
for a loss, NaN where the two were not compared. It suffices to give one of ``[i, j]`` and
``[j, i]``; the other one is one minus it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.intervals import Interval, batches, check_confidence


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
    """Confidence interval of each strength, by bootstrap over prompts; 0 to 0 for the baseline."""


def bradley_terry_strengths(
    outcomes: Float[Tensor, "policies policies prompts *rest"],
    *,
    baseline: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    ridge: float = 0.01,
) -> Strengths:
    """Strengths such that policy i beats policy j with probability ``sigmoid(s[i] - s[j])``.

    The loss is the summed cross-entropy of all comparisons plus ``ridge / 2 * sum(s**2)`` for
    strengths with mean 0, which keeps the strength of a policy that always wins finite. A tie is
    half a win and half a loss. A resample draws whole prompts with all comparisons on them.

    Source: Bradley and Terry 1952, Biometrika 39, 324 to 345; fitted by Newton's method.

    Raises:
        ValueError: Some policies are not connected with the baseline by comparisons.
    """
    check_confidence(confidence)
    wins, counts = _sums(outcomes)
    _check_connected(counts.sum(dim=0), baseline)
    values = _fit(wins.sum(dim=0)[None], counts.sum(dim=0)[None], ridge)
    prompts = len(wins)
    generator = torch.Generator().manual_seed(seed)
    resampled = []
    for batch in batches(resamples, max(prompts, wins[0].numel())):
        drawn = torch.randint(prompts, (len(batch), prompts), generator=generator)
        times = torch.zeros(len(batch), prompts, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        resampled.append(
            _fit(
                torch.einsum("rn,nij->rij", times, wins),
                torch.einsum("rn,nij->rij", times, counts),
                ridge,
            )
        )
    relative = torch.cat(resampled)
    relative = relative - relative[:, baseline : baseline + 1]
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    lows, highs = torch.quantile(relative, tails, dim=0).tolist()
    values = values[0] - values[0, baseline]
    intervals = tuple(map(Interval, lows, highs))
    return Strengths(tuple(values.tolist()), intervals)


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


def _fit(wins: Tensor, counts: Tensor, ridge: float) -> Tensor:
    """Strengths with mean 0 of each matrix: ``[resamples, policies]``."""
    strengths = torch.zeros(wins.shape[:2], dtype=torch.float64)
    penalty = ridge * torch.eye(wins.shape[1], dtype=torch.float64)
    for _ in range(100):
        chances = torch.sigmoid(strengths[:, :, None] - strengths[:, None, :])
        gradient = (wins - counts * chances).sum(dim=2) - ridge * strengths
        if gradient.abs().max() <= 1e-11 * max(1.0, float(counts.sum(dim=(1, 2)).max())):
            break
        curvature = counts * chances * (1 - chances)
        hessian = torch.diag_embed(curvature.sum(dim=2)) - curvature + penalty
        step = torch.linalg.solve(hessian, gradient)
        strengths = strengths + step.clamp(-4, 4)
    return strengths
