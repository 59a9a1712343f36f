"""Preferences between completions by one judge of any kind, or by the mean over several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional import winrate
from align.judges.base import Pair, ScoreJudge
from align.judges.build import Judge
from align.judges.orders import decide
from align.judges.scores import score_rows
from align.runtime.progress import Logger


def panel_mean(by_judge: Sequence[Float[Tensor, "*pairs"]]) -> Float[Tensor, "*pairs"]:
    """The decision of a panel: the mean over its judges; NaN where one of them has no verdict.

    People decide about some pairs only, and are in no panel.
    """
    return torch.stack(list(by_judge)).mean(dim=0)


def preferences(
    judges: Mapping[str, Judge], pairs: Sequence[Pair], *, batch_size: int, logger: Logger
) -> list[float]:
    """Preference for the first completion of each pair by one judge, or by a panel; NaN: none."""
    by_judge = []
    for name, judge in judges.items():
        if isinstance(judge, ScoreJudge):
            by_judge.append(_from_scores(judge, pairs, batch_size=batch_size, logger=logger))
        else:
            decisions = decide(judge, pairs, unit=f"{name}: compared pair", logger=logger)
            decided = [decision.preference for decision in decisions]
            by_judge.append(torch.tensor(decided, dtype=torch.float64))
    return panel_mean(by_judge).tolist()


def _from_scores(
    judge: ScoreJudge, pairs: Sequence[Pair], *, batch_size: int, logger: Logger
) -> Float[Tensor, " pairs"]:
    """1 where the first completion has the higher score, 0.5 for equal scores, else 0."""
    sides = []
    for side in ("first", "second"):
        rows = [
            {**pair.columns, "prompt": pair.prompt, "completion": getattr(pair, side)}
            for pair in pairs
        ]
        scores = score_rows(judge, rows, batch_size=batch_size, logger=logger)
        sides.append(torch.tensor(scores, dtype=torch.float64)[:, None])
    return winrate.outcomes(*sides)[:, 0]
