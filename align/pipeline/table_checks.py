"""Checks of prepared data, on disk or in memory, against the stages that read them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.recipe import ErrorCollector
from align.data import tables as data_tables
from align.errors import UserError
from align.pipeline.plan import PlannedStage
from align.rewards.function_source import missing_columns
from align.training.label_counts import check_label_counts


@dataclass(frozen=True, slots=True)
class PreparedTables:
    """What is known of prepared data, on disk or in memory."""

    names: Collection[str]
    """The names of the tables, such as ``pairs-train``."""
    column: Callable[[str, str, str], list[Any]]
    """The values of a column, by the kind and the split of a table and the name of the column."""
    columns: Callable[[str, str], Collection[str]]
    """The names of the columns of a table, by its kind and its split."""

    def prompts(self, split: str) -> list[str]:
        """The texts of the last messages of the prompts of a split.

        Of sampled completions, those of every split, because all of them are labeled.
        """
        sampled = [name.split("-") for name in self.names if name.startswith("completions-")]
        tables = sorted(sampled) or [["prompts", split]]
        values = (prompt for kind, each in tables for prompt in self.column(kind, each, "prompt"))
        return [prompt[-1]["content"] for prompt in values]


TableCheck = Callable[[ErrorCollector, Path, PreparedTables, Sequence[PlannedStage]], Iterator[str]]
"""A further check of prepared data: it collects errors and yields lines."""


def no_further_check(
    errors: ErrorCollector, data: Path, tables: PreparedTables, pending: Sequence[PlannedStage]
) -> Iterator[str]:
    """Check nothing."""
    yield from ()


def check_tables(errors: ErrorCollector, data: Path, pending: Sequence[PlannedStage]) -> None:
    """Check that finished prepared data have the tables and columns of pending stages."""
    check_contents(errors, data, finished_tables(data), pending)


def finished_tables(data: Path) -> PreparedTables:
    """The tables of finished prepared data."""

    def column(kind: str, split: str, name: str) -> list[Any]:
        return [row.get(name) for row in data_tables.read(data, kind, split, columns=[name])]

    return PreparedTables(
        set(data_tables.table_names(data)),
        column,
        lambda kind, split: data_tables.column_names(data, kind, split),
    )


def check_contents(
    errors: ErrorCollector, data: Path, tables: PreparedTables, pending: Sequence[PlannedStage]
) -> None:
    """Check the tables, columns, labels and gold prompts of the prepared data of ``data``."""
    for stage in pending:
        if data in stage.inputs.values():
            if not _tables_exist(errors, stage, data, tables):
                continue
            _check_columns(errors, stage, tables)
            _check_labels(errors, stage, tables)
        split = _gold_split(stage, data, pending)
        if split is not None and stage.config.gold_prompts is not None:
            from align.rewards import gold

            with errors.at(stage.name, *stage.config.gold_prompts.keys):
                gold.check_prompts(tables.prompts(split), repair=stage.config.gold_prompts.repair)


def _tables_exist(
    errors: ErrorCollector, stage: PlannedStage, data: Path, tables: PreparedTables
) -> bool:
    """Whether the required tables exist; those that do not are added to ``errors``."""
    alternatives: dict[str, list[str]] = {}
    for table in stage.config.required_tables():
        if stage.inputs.get(table.input) == data:
            alternatives.setdefault(table.key, []).append(table.name)
    missing = {
        key: names for key, names in alternatives.items() if not set(names) & set(tables.names)
    }
    for key, names in missing.items():
        existing = ", ".join(sorted(tables.names))
        errors.add(
            (stage.name, key),
            f"the prepared data have no table {' or '.join(names)}, only {existing}",
        )
    return not missing


def _gold_split(stage: PlannedStage, data: Path, pending: Sequence[PlannedStage]) -> str | None:
    """The split of ``data`` whose prompts the gold score must parse for this stage."""
    gold = stage.config.gold_prompts
    if gold is None:
        return None
    source = stage.inputs.get(gold.input)
    if source == data:
        return gold.split
    sampled = next((other for other in pending if other.folder == source), None)
    if sampled is None or data not in sampled.inputs.values():
        return None
    split: str = getattr(sampled.config, "split", gold.split)
    return split


def _check_columns(errors: ErrorCollector, stage: PlannedStage, tables: PreparedTables) -> None:
    """Check the columns that settings and reward functions require."""
    for key, (table, column) in stage.config.required_columns.items():
        exists = table.name in tables.names
        if exists and column not in tables.columns(table.kind, table.split):
            errors.add((stage.name, key), f"{table.name} has no column `{column}`; remove this key")
    for keys, config in stage.config.reward_functions.items():
        if "prompts-train" not in tables.names:
            continue  # reported as a missing table
        columns, missing = tables.columns("prompts", "train"), list[str]()
        with contextlib.suppress(UserError):  # a missing function is reported elsewhere
            missing = missing_columns(config, columns)
        for column in missing:
            errors.add(
                (stage.name, *keys),
                f"{config.function} requires the column `{column}`, and the prompts have "
                f"{', '.join(columns)}; add it to `keep_columns` of the `prepare` stage",
            )


def _check_labels(errors: ErrorCollector, stage: PlannedStage, tables: PreparedTables) -> None:
    """Check that there are enough completions of both labels for every batch."""
    size = stage.config.labels_per_batch
    if size is None or "unpaired-train" not in tables.names:
        return
    labels = tables.column("unpaired", "train", "label")
    has_pairs = "pairs-train" in tables.names
    paired = len(tables.column("pairs", "train", "prompt_id")) if has_pairs else 0
    desirable, undesirable = sum(labels) + paired, labels.count(False) + paired
    with errors.at(stage.name, stage.config.reads[0].input):
        check_label_counts(desirable, undesirable, batch_size=size)
