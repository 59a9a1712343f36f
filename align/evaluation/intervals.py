"""evaluation.intervals"""

from __future__ import annotations

from collections.abc import Callable

import torch

from align.config.evaluate import Evaluate
from align.functional import winrate


def interval(
    of: Callable[..., winrate.Interval], values: torch.Tensor, config: Evaluate
) -> list[float]:
    return list(
        of(values, confidence=config.confidence, resamples=config.resamples, seed=config.seed)
    )
