"""Intervals with the settings of one stage, and means per prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from align.evaluation.results import Interval
from align.functional import intervals


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Settings of the intervals of a stage: bootstraps of means, Wilson's of shares."""

    confidence: float = 0.95
    """Confidence level of the intervals."""
    resamples: int = 2000
    """Number of bootstrap resamples; without effect on intervals of shares."""
    seed: int = 0
    """Seed of the resamples."""

    def mean(self, values: Float[Tensor, "prompts *rest"]) -> Interval:
        """Interval of a mean, by :func:`align.functional.intervals.bootstrap_interval`."""
        return Interval(*intervals.bootstrap_interval(values, **self._settings()))

    def proportion(self, values: Float[Tensor, "prompts *rest"]) -> Interval:
        """Interval of a mean in [0, 1], by ``proportion_interval``, which draws no resamples."""
        return Interval(*intervals.proportion_interval(values, confidence=self.confidence))

    def _settings(self) -> dict[str, Any]:
        return {"confidence": self.confidence, "resamples": self.resamples, "seed": self.seed}


def means_by_prompt(
    rows: Sequence[Mapping[str, Any]], values: Sequence[float]
) -> Float[Tensor, " prompts"]:
    """Mean value of each prompt, in the order of the rows; NaN values are left out.

    A prompt with several rows counts once. Prompts whose values are all NaN are left out, so the
    result may be empty.
    """
    by_prompt: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        if not math.isnan(value):
            by_prompt.setdefault(row["prompt_id"], []).append(value)
    return torch.tensor([sum(v) / len(v) for v in by_prompt.values()], dtype=torch.float64)
