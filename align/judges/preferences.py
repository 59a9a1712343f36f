"""Preferences between completions by one judge of any kind, or by the mean over several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from align.judges.base import Pair, ScoreJudge
from align.judges.build import Judge
from align.judges.orders import decide
from align.judges.scores import score_rows
from align.runtime.progress import Logger


def preferences(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], *, batch_size: int, logger: Logger
) -> list[float]:
    """Preference for the first completion of each pair: the mean over judges with a verdict.

    NaN where no judge has one.
    """
    by_judge = []
    for name, judge in judges.items():
        if isinstance(judge, ScoreJudge):
            by_judge.append(_from_scores(judge, pairs, batch_size=batch_size, logger=logger))
        else:
            decisions = decide(judge, pairs, unit=f"{name}: compared pair", logger=logger)
            by_judge.append([decision.preference for decision in decisions])
    return [_mean(each) for each in zip(*by_judge, strict=True)]


def _from_scores(
    judge: ScoreJudge, pairs: Sequence[Pair], *, batch_size: int, logger: Logger
) -> list[float]:
    """1 where the first completion has the higher score, 0.5 for equal scores, else 0."""
    sides = []
    for side in ("first", "second"):
        rows = [
            {**pair.columns, "prompt": pair.prompt, "completion": getattr(pair, side)}
            for pair in pairs
        ]
        scores = score_rows(judge, rows, batch_size=batch_size, logger=logger)
        sides.append(scores)
    return [_outcome(first, second) for first, second in zip(*sides, strict=True)]


def _outcome(first: float, second: float) -> float:
    """The outcome of two scores, as :func:`align.functional.winrate.outcomes` computes it."""
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return (first > second) + 0.5 * (first == second)


def _mean(values: Sequence[float]) -> float:
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else math.nan
