"""Length-controlled win rates as AlpacaEval 2 defines them.

A logistic regression explains the outcomes of a model by its quality, by the lengths of the two
completions, and by the difficulty of the instruction. The length-controlled win rate is the mean
of its predictions for equally long completions. Lengths may have any unit; AlpacaEval counts
characters. Outcomes may lie anywhere in [0, 1]. NaN outcomes are missing and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class NotEstimableError(ValueError):
    """A win rate at equal lengths cannot be estimated from these outcomes and lengths."""


def length_controlled_win_rate(
    outcomes: Float[Tensor, "*cases"],
    length_differences: Float[Tensor, "*cases"],
    *,
    ridge: float = 0.01,
) -> Float[Tensor, ""]:
    """Estimated win rate of one comparison if both completions were equally long.

    Fits ``P(win) = sigmoid(quality + bias * tanh(difference / std))``, where a difference is the
    policy's length minus the baseline's, and returns ``sigmoid(quality)``. The regressor is
    antisymmetric, so swapping policy and baseline gives one minus the result. If all lengths are
    equal, the result is the mean outcome.

    The loss is the summed cross-entropy plus ``ridge / 2 * (quality**2 + bias**2)`` (scikit-learn's
    ``C`` is ``1 / ridge``). The ridge keeps the fit finite where outcomes are perfectly separated;
    it lowers a win rate of 100 % slightly: with 100 prompts to 99.92 %. Difficulty is left out: it
    needs several comparisons, see :func:`length_controlled_win_rates`.

    Source: Dubois et al. 2024, arXiv:2404.04475, section 3; fitted by Newton's method.

    Raises:
        NotEstimableError: The fit does not converge, or all lengths differ by the same amount,
            which cannot separate length from quality.
        ValueError: An outcome lies outside [0, 1], or a length is not finite.
    """
    won, differences, valid = _checked(outcomes.flatten()[None], length_differences.flatten()[None])
    if not differences[valid].any():
        return won[valid].mean()
    lengths = _standardized(differences, valid)
    if bool(_inseparable(lengths, valid)):
        low, high = differences[valid].min(), differences[valid].max()
        raise NotEstimableError(
            f"length_differences: cannot separate length from quality, found {low:g} to {high:g}"
        )
    design = torch.stack([torch.ones_like(lengths), lengths], dim=-1)
    penalties = torch.full((2,), ridge, dtype=torch.float64)
    weights = _fit(design, won, valid, penalties, torch.zeros_like(penalties))
    return torch.sigmoid(weights[0, 0])


@dataclass(frozen=True, slots=True)
class LengthControl:
    """Length-controlled win rates of several comparisons over the same prompts."""

    rates: Float[Tensor, " comparisons"]
    """Win rates at equal lengths."""
    length_effects: Float[Tensor, " comparisons"]
    """Coefficients of the tanh of the standardized length difference; positive: longer wins."""
    difficulties: Float[Tensor, " prompts"]
    """Common effect of a prompt on the log-odds of all policies, with mean 0; positive: easier."""


def length_controlled_win_rates(
    outcomes: Float[Tensor, "comparisons prompts"],
    length_differences: Float[Tensor, "comparisons prompts"],
    *,
    ridge: float = 0.01,
    difficulty_ridge: float = 1.0,
    slope_ridge: float = 30.0,
) -> LengthControl:
    """Length-controlled win rates of several policies, each against a baseline on the same prompts.

    First, the difficulty of each prompt is estimated jointly:
    ``P(win) = sigmoid(quality[m] + bias[m] * tanh(difference / std[m]) + difficulty[x])`` with a
    ridge on the difficulties. Then each comparison is fitted alone, with a coefficient for the
    difficulty: ``sigmoid(quality + bias * tanh(difference / std) + slope * difficulty[x])``. Its
    win rate is the mean over its prompts of ``sigmoid(quality + slope * difficulty[x])``. A single
    comparison has no difficulties: its rate is that of :func:`length_controlled_win_rate`.

    The slope has a ridge around 1, its value in the first fit; those published with AlpacaEval's
    leaderboard are between 0.4 and 1.2. Without that ridge, the difficulties of two comparisons
    contain their own noise, and the rates of 800 prompts are 4 points off. With dozens of
    comparisons over 805 prompts it changes next to nothing.

    A comparison in which all lengths differ by the same amount has the rate NaN. With no difference
    in length at all, ``bias`` is 0.

    Source: Dubois et al. 2024, arXiv:2404.04475, section 3. AlpacaEval also adds annotations of its
    baseline with verbose and concise completions, with a weight of 0.2; that data is left out here.

    Raises:
        NotEstimableError: A fit does not converge.
        ValueError: The shapes differ, an outcome lies outside [0, 1], a comparison has none, or a
            length is not finite.
    """
    won, differences, valid = _checked(outcomes, length_differences)
    lengths = _standardized(differences, valid)
    prompts = won.shape[1]
    if len(won) == 1:
        difficulties = torch.zeros(prompts, dtype=torch.float64)
    else:
        difficulties = _difficulties(won, lengths, valid, ridge, difficulty_ridge)
    columns = [torch.ones_like(lengths), lengths, difficulties.expand_as(lengths)]
    penalties = torch.tensor([ridge, ridge, slope_ridge], dtype=torch.float64)
    centers = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    weights = _fit(torch.stack(columns, dim=-1), won, valid, penalties, centers)
    predicted = torch.sigmoid(weights[:, :1] + weights[:, 2:] * difficulties)
    rates = (predicted * valid).sum(dim=1) / valid.sum(dim=1)
    return LengthControl(
        rates.where(~_inseparable(lengths, valid), torch.nan), weights[:, 1], difficulties
    )


class _Cases(NamedTuple):
    """Outcomes and length differences as float64, 0 where missing, and which are not missing."""

    won: Tensor
    differences: Tensor
    valid: Tensor


def _checked(outcomes: Tensor, differences: Tensor) -> _Cases:
    """The cases, or a ValueError where they cannot be used."""
    if outcomes.shape != differences.shape:
        raise ValueError(
            f"length_differences: expected the shape of the outcomes, {list(outcomes.shape)}, "
            f"found {list(differences.shape)}"
        )
    if outcomes.numel() == 0:
        raise ValueError(f"expected outcomes, found none: shape {tuple(outcomes.shape)}")
    won = outcomes.detach().to("cpu", torch.float64)
    lengths = differences.detach().to("cpu", torch.float64)
    valid = ~won.isnan()
    if not bool(valid.any(dim=1).all()):
        raise ValueError("outcomes: a comparison has no outcome that is not NaN")
    if infinite := int((~lengths[valid].isfinite()).sum()):
        raise ValueError(f"expected finite values; {infinite} of {lengths.numel()} lengths are not")
    if won[valid].min() < 0 or won[valid].max() > 1:
        low, high = won[valid].min(), won[valid].max()
        raise ValueError(f"outcomes: expected 0 to 1, found {low:g} to {high:g}")
    return _Cases(won.where(valid, 0.0), lengths.where(valid, 0.0), valid)


def _standardized(differences: Tensor, valid: Tensor) -> Tensor:
    """Hyperbolic tangent of the differences over their standard deviation, by comparison."""
    counts = valid.sum(dim=1, keepdim=True)
    means = differences.sum(dim=1, keepdim=True) / counts
    squares = ((differences - means) * valid).square().sum(dim=1, keepdim=True)
    deviations = (squares / (counts - 1).clamp(min=1)).sqrt()
    # Equal differences: an infinite ratio where they are not 0, and 0 where they are.
    ratios = torch.where(differences == 0, 0.0, differences / deviations)
    return torch.tanh(ratios)


def _inseparable(lengths: Tensor, valid: Tensor) -> Bool[Tensor, " comparisons"]:
    """Whether all completions differ by the same length, which is not 0."""
    low = lengths.masked_fill(~valid, torch.inf).amin(dim=1)
    high = lengths.masked_fill(~valid, -torch.inf).amax(dim=1)
    return (low == high) & (low != 0)


def _fit(
    design: Tensor, won: Tensor, valid: Tensor, penalties: Tensor, centers: Tensor
) -> Float[Tensor, "comparisons columns"]:
    """Logistic regressions with a ridge around ``centers`` by Newton's method, one per row."""
    design = design * valid[..., None]
    weights = centers.expand(len(won), -1)
    for _ in range(100):
        fitted = torch.sigmoid(torch.einsum("mxc,mc->mx", design, weights))
        gradient = torch.einsum("mxc,mx->mc", design, won - fitted)
        gradient = gradient - penalties * (weights - centers)
        if gradient.abs().max() <= 1e-13 * won.shape[1]:
            return weights
        curvature = torch.einsum("mxc,mx,mxd->mcd", design, fitted * (1 - fitted), design)
        weights = weights + torch.linalg.solve(curvature + torch.diag(penalties), gradient)
    raise NotEstimableError(
        f"the logistic model did not converge; use a ridge above {penalties[0]:g}"
    )


def _difficulties(
    won: Tensor, lengths: Tensor, valid: Tensor, ridge: float, difficulty_ridge: float
) -> Float[Tensor, " prompts"]:
    """Joint fit of quality and length effect of each comparison and the effect of each prompt.

    Newton's method; the effects of the prompts are eliminated from the linear system, because no
    two of them occur in one observation.
    """
    comparisons, prompts = won.shape
    design = torch.stack([torch.ones_like(lengths), lengths], dim=-1) * valid[..., None]
    weights = torch.zeros(comparisons, 2, dtype=torch.float64)
    effects = torch.zeros(prompts, dtype=torch.float64)
    for _ in range(100):
        fitted = torch.sigmoid(torch.einsum("mxc,mc->mx", design, weights) + effects)
        residuals = (won - fitted) * valid
        weight_gradient = torch.einsum("mxc,mx->mc", design, residuals) - ridge * weights
        effect_gradient = residuals.sum(dim=0) - difficulty_ridge * effects
        largest = max(float(weight_gradient.abs().max()), float(effect_gradient.abs().max()))
        if largest <= 1e-12 * max(prompts, comparisons):
            return effects - effects.mean()
        variances = fitted * (1 - fitted) * valid
        own = torch.einsum("mxc,mx,mxd->mcd", design, variances, design)
        own = torch.block_diag(*(own + ridge * torch.eye(2, dtype=torch.float64)))
        cross = torch.einsum("mxc,mx->xmc", design, variances).reshape(prompts, -1)
        diagonal = variances.sum(dim=0) + difficulty_ridge
        reduced = own - cross.T @ (cross / diagonal[:, None])
        right = weight_gradient.flatten() - cross.T @ (effect_gradient / diagonal)
        step = torch.linalg.solve(reduced, right)
        effects = effects + (effect_gradient - cross @ step) / diagonal
        weights = weights + step.view(-1, 2)
    raise NotEstimableError("the joint logistic model did not converge; use a larger ridge")
