"""Win rate as a metric of Hugging Face `evaluate`: ``evaluate.load("metrics/win_rate")``.

The statistics are those of :mod:`align.functional`, which must be installed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
import torch

from align.evaluation.scores import length_controlled_rates
from align.functional import (
    missing_bounds,
    outcomes,
    proportion_interval,
    win_rate_p_value,
)

DESCRIPTION = """
Share of comparisons that a policy wins against a baseline, by the scores of their completions. A
tie counts one half. A comparison without a score (NaN) is left out and counted.
"""

INPUTS = """
Args:
    predictions: Scores of the policy's completions; higher is better, NaN is missing.
    references: Scores of the baseline's completions for the same prompts, in the same order.
    prompt_ids: Identity of the prompt of each comparison, if a prompt has several. By default,
        every comparison has another prompt.
    prediction_lengths: Lengths of the policy's completions, in any unit.
    reference_lengths: Lengths of the baseline's completions, in the same unit.
    confidence: Confidence level of the interval. Default: 0.95.

Returns:
    win_rate: Wins plus half the ties, as a fraction of the comparisons with a score.
    confidence_interval: Interval of the win rate, [low, high]; a prompt is one observation.
    p_value: Two-sided p-value of a win rate of one half.
    ties: Share of ties.
    length_controlled_win_rate: Win rate at equal lengths, as AlpacaEval 2 defines it for one
        model; None without lengths, or if length and quality cannot be separated.
    bounds: The win rate if all comparisons without a score were lost, and if all were won.
    n_prompts: Number of prompts with a score.
    invalid: Number of comparisons without a score.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("metrics/win_rate")
    >>> results = metric.compute(predictions=[3.0, 2.0, 1.0, 5.0], references=[1.0, 2.0, 2.0, 4.0])
    >>> results["win_rate"]  # two wins, one tie, one loss
    0.625
"""

CITATION = """
@article{dubois2024length,
  title={Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators},
  author={Dubois, Yann and Galambosi, Bal{\\'a}zs and Liang, Percy and Hashimoto, Tatsunori B.},
  journal={arXiv:2404.04475},
  year={2024}
}
"""


class WinRate(evaluate.Metric):  # type: ignore[misc]
    """Win rate of a policy against a baseline, with interval, p-value and length control."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
            reference_urls=["https://arxiv.org/abs/2404.04475"],
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        prompt_ids: Sequence[Hashable] | None = None,
        prediction_lengths: Sequence[float] | None = None,
        reference_lengths: Sequence[float] | None = None,
        confidence: float = 0.95,
    ) -> dict[str, Any]:
        prompts = prompt_ids if prompt_ids is not None else range(len(predictions))
        if len(prompts) != len(predictions):
            raise ValueError(
                f"prompt_ids: expected {len(predictions)}, one per comparison; got {len(prompts)}"
            )
        won = outcomes(_column(predictions), _column(references))[:, 0]
        if bool(won.isnan().all()):
            raise ValueError("predictions: no comparison has two scores")
        by_prompt = _by_prompt(won.tolist(), prompts)
        valid = won[~won.isnan()]
        return {
            "win_rate": valid.mean().item(),
            "confidence_interval": list(proportion_interval(by_prompt, confidence=confidence)),
            "p_value": win_rate_p_value(by_prompt).item(),
            "ties": (valid == 0.5).double().mean().item(),
            "length_controlled_win_rate": _length_controlled(
                won, prediction_lengths, reference_lengths
            ),
            "bounds": list(missing_bounds(won)),
            "n_prompts": int((~by_prompt.isnan()).any(dim=1).sum()),
            "invalid": len(won) - len(valid),
        }


def _length_controlled(
    won: torch.Tensor, lengths: Sequence[float] | None, baseline_lengths: Sequence[float] | None
) -> float | None:
    """Win rate at equal lengths; None without lengths, or if they differ alike in all pairs."""
    if lengths is None and baseline_lengths is None:
        return None
    if lengths is None or baseline_lengths is None:
        raise ValueError("prediction_lengths and reference_lengths must be given together")
    if not len(lengths) == len(baseline_lengths) == len(won):
        raise ValueError(
            f"lengths: expected {len(won)}, one per comparison; got {len(lengths)} and "
            f"{len(baseline_lengths)}"
        )
    differences = _column(lengths)[:, 0] - _column(baseline_lengths)[:, 0]
    if not bool(differences.isfinite().all()):
        raise ValueError("lengths: expected finite numbers")
    (rate,) = length_controlled_rates(won[None], differences[None])
    return rate


def _by_prompt(won: Sequence[float], prompts: Sequence[Hashable]) -> torch.Tensor:
    """Outcomes as one row per prompt, filled up with NaN."""
    rows: dict[Hashable, list[float]] = {}
    for prompt, outcome in zip(prompts, won, strict=True):
        rows.setdefault(prompt, []).append(outcome)
    width = max(map(len, rows.values()))
    padded = [row + [math.nan] * (width - len(row)) for row in rows.values()]
    return torch.tensor(padded, dtype=torch.float64)


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)[:, None]
