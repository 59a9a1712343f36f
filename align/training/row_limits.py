"""How long a row may be, and how many rows may be lost because they are longer.

``max_length`` is that of the recipe, but never more than the positions of the model. ``align
check`` and the stages use the same functions. Neither torch nor TRL is imported.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from align.config.training import Reward
from align.config.training_base import TRLStage
from align.errors import DataError, UserError
from align.models.conversations import TrainedRow

LOGGER = logging.getLogger("align.training")


def max_length(stage: TRLStage, positions: int | None) -> int | None:
    """The largest number of tokens of a row; None without a limit.

    Raises:
        UserError: The recipe sets more than the positions of the model.
    """
    limit, wanted = stage.row_limit(positions), stage.trainer.get("max_length")
    if wanted is not None and wanted != limit:
        raise UserError(
            f"trainer.max_length: {wanted} is more than the {positions} positions of the model; set "
            f"it to {positions} or less"
        )
    return limit


def count_trained(stage: TRLStage, rows: Sequence[TrainedRow], limit: int | None) -> int:
    """The number of trained tokens in the token rows of one row; 0 if the row is lost.

    A reward model reads the last token of a completion, so its rows are left out instead of
    truncated.
    """
    if isinstance(stage, Reward):
        fits = limit is None or max(len(row.ids) for row in rows) <= limit
        return len(rows) if fits else 0
    keeps_start = stage.trainer.get("truncation_mode", "keep_start") == "keep_start"
    trains_all = stage.trainer.get("completion_only_loss") is False
    count = 0
    for row in rows:
        length = len(row.ids)
        kept = length if limit is None else min(limit, length)
        first, last = (0, kept) if keeps_start else (length - kept, length)
        turns = [(0, length)] if trains_all else row.turns
        count += sum(max(0, min(end, last) - max(start, first)) for start, end in turns)
    return count


def lost_rows_problem(stage: TRLStage, lost: int, rows: int, limit: int | None) -> str | None:
    """The error if more rows are lost than the stage accepts; None otherwise."""
    if lost == 0 or (lost < rows and lost <= stage.max_lost_rows * rows):
        return None
    repair = "drop long rows in `prepare`, or raise `max_length`"
    if limit != stage.trl_value("max_length"):
        repair = "drop long rows in `prepare`, or use a model with more positions"
    if lost < rows:
        share = math.ceil(100 * lost / rows) / 100
        repair += f"; to accept it, set `max_lost_rows: {share:g}`"
    return f"{lost_rows(stage, lost, rows, limit)}; {repair}"


def lost_rows(stage: TRLStage, lost: int, rows: int, limit: int | None) -> str:
    """The number of lost rows and the reason, in words."""
    if limit is None:
        return f"{lost:,} of {rows:,} rows have no token that is trained"
    longer = isinstance(stage, Reward)
    reason = "are longer than" if longer else "are lost: the prompt alone fills"
    return f"{lost:,} of {rows:,} rows {reason} `max_length` ({limit} tokens)"


def check_lost_rows(stage: TRLStage, trainer: Any, dataset: Any, limit: int | None) -> None:
    """Log how many of the training rows in ``dataset`` a trainer has left out, if any.

    Raises:
        DataError: All rows are lost, or more than the stage accepts; or no validation row is left.
    """
    kept, rows = len(trainer.train_dataset), len(dataset)
    problem = lost_rows_problem(stage, rows - kept, rows, limit)
    if problem is not None:
        raise DataError(f"trainer.max_length: {problem}")
    if kept < rows:
        LOGGER.warning("%s", lost_rows(stage, rows - kept, rows, limit))
    evaluates = str(trainer.args.eval_strategy) != "no" or trainer.args.eval_on_start
    if evaluates and trainer.eval_dataset is not None and not len(trainer.eval_dataset):
        raise DataError(
            f"trainer.max_length: every validation row is longer than {limit} tokens; raise it, or "
            "remove `eval_strategy`"
        )
