"""Preference pairs as token ids for TRL's reward trainer, which would end rows in other tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.config.training import Reward
from align.errors import DataError
from align.models.tokenization import tokenize_for_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger("align.reward")


def tokenize_pairs(
    rows: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    config: Reward,
    *,
    max_length: int | None,
) -> Dataset | None:
    """Compute ``chosen_ids``, ``rejected_ids`` and, with ``margin_coef``, ``margin``.

    TRL uses these columns as they are. Pairs longer than ``max_length`` are left out, and their
    number is logged. None remains None.

    Raises:
        DataError: The pairs have no ``margin``, or all of them are too long.
    """
    if rows is None:
        return None
    if config.margin_coef and "margin" not in rows.column_names:
        raise DataError("margin_coef: these pairs have no `margin` column; remove `margin_coef`")

    def tokenize(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {
            f"{side}_ids": tokenize_for_reward(tokenizer, batch["prompt"], batch[side])
            for side in ("chosen", "rejected")
        }
        if config.margin_coef:
            columns["margin"] = [config.margin_coef * margin for margin in batch["margin"]]
        return columns

    tokenized = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    if max_length is None:
        return tokenized
    fitting = tokenized.filter(
        lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length
    )
    if len(fitting) == 0:
        raise DataError(
            f"trainer.max_length: every pair is longer than {max_length} tokens; increase it"
        )
    if len(fitting) < len(tokenized):
        LOGGER.warning(
            "%d of %d pairs are longer than `max_length` (%d tokens) and are left out",
            len(tokenized) - len(fitting),
            len(tokenized),
            max_length,
        )
    return fitting
