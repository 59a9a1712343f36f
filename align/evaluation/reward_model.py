"""Scores of a reward model: its mean on demonstrations, and those of held-out pairs.

What the scores of the pairs say is computed by :mod:`align.evaluation.reward_accuracy`. Left out:
training, which is the ``reward`` stage, and loading, which is :mod:`align.rewards.reward_model`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data import tables
from align.errors import DataError
from align.evaluation import reward_accuracy
from align.evaluation.reward_results import RewardModelReport
from align.models import tokenization
from align.rewards import reward_model
from align.rewards.reward_model import RewardModel
from align.runtime import artifacts, distributed
from align.runtime.progress import Logger

LOGGER = logging.getLogger("align.reward")
N_CENTER = 2048
"""Number of demonstrations whose mean score becomes 0."""
BATCH_SIZE = 64


def center(
    model: RewardModel, data: Path, output_dir: Path, logger: Logger
) -> dict[str, float | int]:
    """Store the mean score of the demonstrations, the offset of the model, in ``reward.json``.

    Labeled completions come without demonstrations; their chosen completions are scored instead.
    ``model`` must have an offset of 0.
    """
    has_demonstrations = tables.has_table(data, "demonstrations", "train")
    kind, column = ("demonstrations", "completion") if has_demonstrations else ("pairs", "chosen")
    rows = rows_that_fit(model, tables.read(data, kind, "train", most=N_CENTER), [column])
    scores = score_column(model, rows, column, logger)
    mean = scores.mean().item()
    if distributed.is_main():
        artifacts.write_json(output_dir / reward_model.FILE, {reward_model.MEAN: mean})
    return {"score_mean": mean, "score_std": scores.std().item(), "demonstrations": len(rows)}


def measure(model: RewardModel, data: Path, logger: Logger) -> RewardModelReport | None:
    """Measure accuracy and calibration on the held-out pairs; None if no pair is held out."""
    split = next((s for s in ("test", "validation") if tables.has_table(data, "pairs", s)), None)
    if split is None:
        return None
    return measure_pairs(model, tables.read(data, "pairs", split), logger, split=split)


def measure_pairs(
    model: RewardModel, pairs: list[dict[str, Any]], logger: Logger, *, split: str
) -> RewardModelReport:
    """Measure accuracy and calibration on pairs of which each side fits the model."""
    rows = rows_that_fit(model, pairs, ["chosen", "rejected"])
    chosen, rejected = (score_column(model, rows, side, logger) for side in ("chosen", "rejected"))
    return reward_accuracy.report(rows, chosen, rejected, split=split)


def rows_that_fit(
    model: RewardModel, rows: list[dict[str, Any]], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows that fit into the model's positions with each of the completions.

    A warning gives the number of other rows.

    Raises:
        DataError: No row fits.
    """
    limit = getattr(model.model.config, "max_position_embeddings", None)
    if limit is None:
        return rows
    assert model.tokenizer is not None

    def longest(row: Mapping[str, Any]) -> int:
        prompts, completions = [row["prompt"]] * len(columns), [row[column] for column in columns]
        ids = tokenization.tokenize_for_reward(model.tokenizer, prompts, completions)
        return max(map(len, ids))

    fitting = [row for row in rows if longest(row) <= limit]
    if not fitting:
        raise DataError(
            f"every row is longer than the reward model's {limit} positions, so none can be "
            "scored; train on a model with more positions"
        )
    if len(fitting) < len(rows):
        LOGGER.warning(
            "%d of %d rows are longer than the reward model's %d positions and are not scored",
            len(rows) - len(fitting),
            len(rows),
            limit,
        )
    return fitting


def score_column(
    model: RewardModel, rows: Sequence[Mapping[str, Any]], column: str, logger: Logger
) -> Tensor:
    """Scores of one column of completions, ``[rows]``. The rows are shared over the ranks."""
    scores = distributed.map_rows(
        rows,
        lambda share: model.score(
            [row["prompt"] for row in share],
            [row[column] for row in share],
            batch_size=BATCH_SIZE,
        ).tolist(),
        size=None,
    )
    logger.step(len(rows), len(rows), unit=f"scored {column}")
    return torch.tensor(scores)
