"""Checks of prepared data, on disk or in memory, against the stages that read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.recipe import ErrorCollector
from align.data import tables as data_tables
from align.pipeline.plan import PlannedStage
from align.rewards.function_source import missing_columns
from align.training.label_counts import check_label_counts


@dataclass(frozen=True, slots=True)
class PreparedTables:
    """What is known of prepared data, on disk or in memory."""

    names: Collection[str]
    """The names of the tables, such as ``pairs-train``."""
    prompts: Callable[[str], list[str]]
    """The texts of the last messages of the prompts of a split."""


def check_tables(errors: ErrorCollector, data: Path, pending: Sequence[PlannedStage]) -> None:
    """Check that finished prepared data have the tables and columns of pending stages."""
    names = data_tables.table_names(data)
    sampled = [name.partition("-")[2] for name in names if name.startswith("completions-")]

    def prompts(split: str) -> list[str]:
        """Of prepared data, those of a split; of sampled completions, all, which are labeled."""
        kind, splits = ("completions", sampled) if sampled else ("prompts", [split])
        tables = (data_tables.read(data, kind, each, columns=["prompt"]) for each in splits)
        return [row["prompt"][-1]["content"] for rows in tables for row in rows]

    tables = PreparedTables(set(names), prompts)
    check_contents(errors, data, tables, pending)
    for stage in pending:
        if data in stage.inputs.values():
            _check_columns(errors, stage, data)
            _check_labels(errors, stage, data)


def check_contents(
    errors: ErrorCollector, data: Path, tables: PreparedTables, pending: Sequence[PlannedStage]
) -> None:
    """Check tables and gold prompts of the prepared data that belong in ``data``."""
    for stage in pending:
        if data in stage.inputs.values() and not _tables_exist(errors, stage, data, tables):
            continue
        split = _gold_split(stage, data, pending)
        if split is not None and stage.config.gold_prompts is not None:
            from align.rewards import gold

            with errors.at(stage.name, "judge"):
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


def _check_columns(errors: ErrorCollector, stage: PlannedStage, data: Path) -> None:
    """Check the columns that settings and reward functions require."""
    for key, (table, column) in stage.config.required_columns.items():
        exists = data_tables.has_table(data, table.kind, table.split)
        if exists and column not in data_tables.column_names(data, table.kind, table.split):
            errors.add((stage.name, key), f"{table.name} has no column `{column}`; remove this key")
    for keys, function in stage.config.reward_functions.items():
        if not data_tables.has_table(data, "prompts", "train"):
            continue  # reported as a missing table
        columns = data_tables.column_names(data, "prompts", "train")
        for column in missing_columns(function, columns):
            errors.add(
                (stage.name, *keys),
                f"{function} requires the column `{column}`, and the prompts have "
                f"{', '.join(columns)}; add it to `keep_columns` of the `prepare` stage",
            )


def _check_labels(errors: ErrorCollector, stage: PlannedStage, data: Path) -> None:
    """Check that there are enough completions of both labels for every batch."""
    size = stage.config.labels_per_batch
    if size is None or not data_tables.has_table(data, "unpaired", "train"):
        return
    rows = data_tables.read(data, "unpaired", "train", columns=["label"])
    labels = [row["label"] for row in rows]
    paired = data_tables.count_rows(data, "pairs", "train")
    desirable, undesirable = sum(labels) + paired, labels.count(False) + paired
    with errors.at(stage.name, stage.config.reads[0].input):
        check_label_counts(desirable, undesirable, batch_size=size)
