"""How long a row may be, and how many rows may be lost because they are longer.

``max_length`` is that of the recipe, but never more than the positions of the model. ``align
check`` and the stages use the same functions. Neither torch nor TRL is imported.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from align.config.training import Reward
from align.config.training_base import TRLStage
from align.errors import DataError, UserError

LOGGER = logging.getLogger("align.training")


def max_length(stage: TRLStage, positions: int | None) -> int | None:
    """The largest number of tokens of a row; None without a limit.

    Raises:
        UserError: The recipe sets more than the positions of the model.
    """
    limit: int | None = stage.trl_value("max_length")
    if positions is None or (limit is not None and limit <= positions):
        return limit
    if stage.trainer.get("max_length") is not None:
        raise UserError(
            f"trainer.max_length: {limit} is more than the {positions} positions of the model; set "
            f"it to {positions} or less"
        )
    return positions


def loses_row(stage: TRLStage, start: int, length: int, limit: int | None) -> bool:
    """Whether truncation leaves nothing to train on of a row whose completion begins at ``start``.

    A reward model reads the last token of a row, so its rows are left out instead of truncated.
    """
    if limit is None:
        return False
    if isinstance(stage, Reward):
        return length > limit
    fields = stage.trainer
    return start >= limit and fields.get("truncation_mode", "keep_start") == "keep_start"


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
