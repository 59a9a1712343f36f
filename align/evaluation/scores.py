"""Win rate from scores or outcomes: for ``evaluate``, the Python API, and files of annotations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from align.errors import DataError
from align.evaluation.results import Interval
from align.functional import winrate
from align.functional.intervals import prompt_means, proportion_interval
from align.functional.length_control import (
    NotEstimableError,
    length_controlled_win_rate,
    length_controlled_win_rates,
)


@dataclass(frozen=True, slots=True)
class WinRate:
    """Win rate of a policy against a baseline."""

    rate: float
    """Wins plus half the ties, as a fraction of all comparisons."""
    interval: Interval
    """Confidence interval of ``rate``: Wilson's, for as many outcomes as the prompts are worth."""
    length_controlled: float | None
    """Win rate at equal lengths; None without lengths, or if all pairs differ alike in length."""
    p_value: float
    """Two-sided p-value of a win rate of one half, which agrees with ``interval``."""
    n_prompts: int
    """Prompts with at least one outcome."""
    invalid: int = 0
    """Comparisons without an outcome, left out of all rates."""
    bounds: Interval | None = None
    """``rate`` if all invalid comparisons were lost, and if all were won; None without any."""


def win_rate(
    scores: Sequence[Any] | Tensor,
    baseline_scores: Sequence[Any] | Tensor,
    *,
    lengths: Sequence[Any] | Tensor | None = None,
    baseline_lengths: Sequence[Any] | Tensor | None = None,
    confidence: float = 0.95,
) -> WinRate:
    """Compare the completions of two policies on the same prompts by their scores.

    Scores are ``[prompts]`` or ``[prompts, n]``, for n completions per prompt; the k-th completions
    of a prompt are compared with each other, and a tie counts one half. A NaN is a missing score:
    its comparison is left out, and ``bounds`` say what it could change. Lengths have the same
    shape, in any unit.

    Raises:
        DataError: The shapes differ, there is no prompt, a score or a length is infinite, no
            comparison has two scores, or only one side has lengths.
    """
    policy, baseline = _scores(scores, "scores"), _scores(baseline_scores, "baseline_scores")
    _check_shapes(policy, baseline, "scores", "baseline_scores")
    outcomes = winrate.outcomes(policy, baseline)
    if bool(outcomes.isnan().all()):
        raise DataError("scores: no comparison has two scores; all others are NaN")
    differences = None
    if (lengths is None) != (baseline_lengths is None):
        raise DataError("lengths and baseline_lengths must be given together")
    if lengths is not None and baseline_lengths is not None:
        sides = _lengths(lengths, "lengths"), _lengths(baseline_lengths, "baseline_lengths")
        _check_shapes(policy, sides[0], "scores", "lengths")
        _check_shapes(policy, sides[1], "scores", "baseline_lengths")
        differences = sides[0] - sides[1]
    return outcome_rate(outcomes, differences, confidence=confidence)


def outcome_rate(
    outcomes: Float[Tensor, "prompts completions"],
    length_differences: Float[Tensor, "prompts completions"] | None = None,
    *,
    confidence: float = 0.95,
) -> WinRate:
    """Win rate of outcomes, which are NaN where a verdict is missing.

    Raises:
        ValueError: All outcomes are missing.
    """
    valid = ~outcomes.isnan()
    means = prompt_means(outcomes)
    controlled = None
    if length_differences is not None:
        (controlled,) = length_controlled_rates(
            outcomes.flatten()[None], length_differences.flatten()[None]
        )
    invalid = int((~valid).sum())
    low, high = proportion_interval(outcomes, confidence=confidence)
    return WinRate(
        rate=winrate.win_rate(outcomes).item(),
        interval=Interval(float(low), float(high)),
        length_controlled=controlled,
        p_value=winrate.win_rate_p_value(outcomes).item(),
        n_prompts=len(means.means),
        invalid=invalid,
        bounds=Interval(*winrate.missing_bounds(outcomes)) if invalid else None,
    )


def length_controlled_rates(
    outcomes: Float[Tensor, "comparisons cases"],
    length_differences: Float[Tensor, "comparisons cases"],
) -> list[float | None]:
    """Win rates at equal lengths; None where they cannot be estimated.

    That is where all lengths differ alike, or where a fit does not converge. The difficulty of the
    prompts of several comparisons is estimated jointly.
    """
    try:
        if len(outcomes) == 1:
            return [length_controlled_win_rate(outcomes, length_differences).item()]
        rates = length_controlled_win_rates(outcomes, length_differences).rates.tolist()
    except NotEstimableError:
        return [None] * len(outcomes)
    return [None if math.isnan(rate) else rate for rate in rates]


def _matrix(values: Sequence[Any] | Tensor, name: str) -> Tensor:
    """Values as float64, ``[prompts, n]``."""
    try:
        matrix = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: expected numbers, one row per prompt ({error})") from None
    matrix = matrix[:, None] if matrix.dim() == 1 else matrix
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise DataError(
            f"{name}: expected the shape [prompts] or [prompts, n], got {list(matrix.shape)}"
        )
    return matrix


def _scores(values: Sequence[Any] | Tensor, name: str) -> Tensor:
    matrix = _matrix(values, name)
    if bool(matrix.isinf().any()):
        raise DataError(f"{name}: expected finite numbers, or NaN for a missing score")
    return matrix


def _lengths(values: Sequence[Any] | Tensor, name: str) -> Tensor:
    matrix = _matrix(values, name)
    if not bool(matrix.isfinite().all()):
        raise DataError(f"{name}: expected finite numbers")
    return matrix


def _check_shapes(first: Tensor, second: Tensor, name: str, other: str) -> None:
    if first.shape != second.shape:
        raise DataError(
            f"{name} has the shape {list(first.shape)} and {other} {list(second.shape)}; "
            "they must be equal"
        )
