"""TRL's SFT trainer on demonstrations of which every turn of the assistant may be trained.

A demonstration has several token rows if the chat template rewrites earlier turns. They are one row
of the data set and enter the same batch: prefix sharing computes what they have in common once, and
the number of steps does not depend on the template.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import global_then_local_main_first

from align.models.conversations import TrainedRow
from align.models.tokenization import RowsForTRL
from align.training.row_errors import naming_row
from align.training.token_batches import TokenBatchTrainer

IGNORED_LABEL = -100
DEMONSTRATION = "demonstration"
"""Column with the index of the demonstration that a token row belongs to."""
SPLITS = {"train": "training", "eval": "validation"}
"""Names of the splits, by those that TRL has for them."""
LENGTHS = "seq_lengths"
"""Column with the lengths of the token rows in one list of tokens, as TRL names it."""


class DemonstrationTrainer(TokenBatchTrainer, SFTTrainer):
    """``SFTTrainer`` that tokenizes demonstrations with ``rows``."""

    data_collator: Any

    def __init__(self, *, rows: RowsForTRL, train_on: str, **arguments: Any) -> None:
        self._rows = rows
        self._train_on = train_on
        super().__init__(**arguments)
        if not self.padding_free:  # TRL's own collator divides them if it does not pad
            self.data_collator = _Collator(self.data_collator)

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: None,
        dataset_name: str,
    ) -> Dataset | Demonstrations:
        """Tokenize demonstrations; TRL then truncates, packs and shuffles their token rows."""
        with global_then_local_main_first():
            rows = dataset.map(
                _tokenize,
                batched=True,
                with_indices=True,
                remove_columns=dataset.column_names,
                num_proc=args.dataset_num_proc,
                fn_kwargs={
                    "rows": self._rows,
                    "split": SPLITS[dataset_name],
                    "train_on": self._train_on,
                    "whole": not self.completion_only_loss,
                },
            )
        rows = super()._prepare_dataset(
            rows, processing_class, args, packing, formatting_func, dataset_name
        )
        if packing:
            return rows
        demonstrations = Demonstrations(rows)
        return rows if len(demonstrations) == len(rows) else demonstrations


def _tokenize(
    columns: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    *,
    rows: RowsForTRL,
    split: str,
    train_on: Any,
    whole: bool,
) -> dict[str, list[Any]]:
    """The token rows of demonstrations; with ``whole``, one row each, with all of its tokens."""
    turns: Any = "last" if whole else train_on
    tokenize = functools.partial(rows.conversations().trained_rows, train_on=turns)
    numbered = zip(columns["prompt"], columns["completion"], indices, strict=True)
    with naming_row(
        numbered,
        lambda row: tokenize([row[0]], [row[1]]),
        lambda row: f"row {row[2] + 1:,} of the {split} demonstrations",
    ):
        tokenized = tokenize(columns["prompt"], columns["completion"])
    flat = [(index, row) for index, own in zip(indices, tokenized, strict=True) for row in own]
    return {
        DEMONSTRATION: [index for index, _ in flat],
        "input_ids": [row.ids for _, row in flat],
        "labels": [row.ids if whole else _labels(row) for _, row in flat],
    }


def _labels(row: TrainedRow) -> list[int]:
    labels = [IGNORED_LABEL] * len(row.ids)
    for start, end in row.turns:
        labels[start:end] = row.ids[start:end]
    return labels


class Demonstrations(torch.utils.data.Dataset[dict[str, Any]]):
    """Demonstrations, each with its token rows in one list of tokens."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows
        places: dict[int, list[int]] = {}
        for place, demonstration in enumerate(rows[DEMONSTRATION]):
            places.setdefault(demonstration, []).append(place)
        self._places = list(places.values())

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self._rows[self._places[index]]
        return {
            DEMONSTRATION: rows[DEMONSTRATION][0],
            "input_ids": [token for ids in rows["input_ids"] for token in ids],
            "labels": [label for labels in rows["labels"] for label in labels],
            LENGTHS: [len(ids) for ids in rows["input_ids"]],
        }


@dataclass(frozen=True)
class _Collator:
    """TRL's collator, after each demonstration is divided into its token rows."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch with all token rows of the demonstrations."""
        return self.collate([row for example in examples for row in token_rows(example)])


def token_rows(example: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The token rows of a demonstration, with their labels."""
    start = 0
    for length in example.get(LENGTHS) or [len(example["input_ids"])]:
        end = start + length
        yield {name: example[name][start:end] for name in ("input_ids", "labels")}
        start = end
