"""Preference pairs as token ids for TRL's reward trainer, which would end rows in other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.config.training import Reward
from align.errors import DataError
from align.models.tokenization import tokenize_for_reward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def tokenize_pairs(
    rows: Dataset | None, tokenizer: PreTrainedTokenizerBase, config: Reward
) -> Dataset | None:
    """Compute ``chosen_ids``, ``rejected_ids`` and, with ``margin_coef``, ``margin``.

    TRL uses these columns as they are. None remains None.

    Raises:
        DataError: The pairs have no ``margin``.
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

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names)
