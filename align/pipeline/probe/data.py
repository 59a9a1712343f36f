"""A sample of the rows of prepared data in a temporary folder, with the true numbers of rows.

Stages that are measured read these folders instead of the whole data. Data that a recipe samples
and labels are replaced by rows of the prepared data that their prompts come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Stage
from align.config.completions import Label, Sample
from align.data import tables
from align.data.prepare import PreparedData
from align.pipeline.plan import PlannedStage

SAMPLE = 128
"""Number of rows that are sampled from each table, evenly spaced."""

Rows = dict[tuple[str, str], list[dict[str, Any]]]
"""Rows by the kind and the split of their table."""


@dataclass(frozen=True, slots=True)
class SampledData:
    """The sampled tables of a folder, and the number of all rows."""

    folder: Path
    counts: Mapping[tuple[str, str], int]
    """The number of rows by kind and split."""

    def count(self, kind: str, split: str = "train") -> int:
        """The number of rows of a table; 0 if there is none."""
        return self.counts.get((kind, split), 0)

    def sampled(self, kind: str, split: str = "train") -> list[dict[str, Any]]:
        """The sampled rows of a table; none if there is none."""
        if not tables.has_table(self.folder, kind, split):
            return []
        return tables.read(self.folder, kind, split)


def sample(
    stages: Sequence[PlannedStage], prepared: Mapping[Path, PreparedData], folder: Path
) -> dict[Path, SampledData]:
    """Write samples of the data that stages read into ``folder``, by the folder of the data.

    ``prepared`` are data in memory by folder. Data that are neither in memory nor written yet are
    left out.
    """
    sampled: dict[Path, SampledData] = {}
    for stage in stages:
        for source in data_inputs(stage):
            if source not in sampled and source.is_dir():
                sampled[source] = _copy(source, folder / f"data-{len(sampled)}")
        if stage.config.prepares_data or isinstance(stage.config, Sample | Label):
            data = None
            if stage.folder in prepared:
                data = _write(_in_memory(prepared[stage.folder]), folder / stage.name)
            elif stage.status == "reused":
                data = _copy(stage.folder, folder / stage.name)
            elif not stage.config.prepares_data:
                data = _stand_in(stage.config, stage, sampled, folder / stage.name)
            if data is not None:
                sampled[stage.folder] = data
    return sampled


def data_inputs(stage: PlannedStage) -> list[Path]:
    """The folders of data that a stage reads."""
    keys = dict.fromkeys(table.input for table in stage.config.required_tables())
    return [Path(stage.inputs[key]) for key in keys if key in stage.inputs]


def _in_memory(prepared: PreparedData) -> tuple[Rows, dict[tuple[str, str], int]]:
    by_table = {
        (kind, split): rows
        for kind, splits in prepared.tables().items()
        for split, rows in splits.items()
        if rows
    }
    return {key: _spaced(rows) for key, rows in by_table.items()}, {
        key: len(rows) for key, rows in by_table.items()
    }


def _copy(source: Path, folder: Path) -> SampledData:
    """Sample the tables of a folder."""
    names = [tuple(name.rsplit("-", 1)) for name in tables.table_names(source)]
    rows = {(kind, split): tables.read(source, kind, split, most=SAMPLE) for kind, split in names}
    counts = {(kind, split): tables.count_rows(source, kind, split) for kind, split in names}
    return _write((rows, counts), folder)


def _stand_in(
    config: Stage, stage: PlannedStage, sampled: Mapping[Path, SampledData], folder: Path
) -> SampledData | None:
    """Rows for data that do not exist yet: completions of the prepared data, and pairs of them."""
    source = sampled.get(data_inputs(stage)[0])
    if source is None:
        return None
    if isinstance(config, Sample):
        prompts = source.count("prompts", config.split)
        prompts = min(prompts, config.n_prompts or prompts)
        rows = [_completion(row) for row in completed_rows(source)]
        counts: dict[tuple[str, str], int] = {
            ("completions", config.split): prompts * config.n_completions,
            ("prompts", config.split): prompts,
        }
        return _write(({("completions", config.split): rows}, counts), folder)
    assert isinstance(config, Label)
    pairs: Rows = {}
    counts = {}
    for kind, split in source.counts:
        if kind == "completions":
            rows = source.sampled(kind, split)
            others = [row["completion"] for row in rows[1:] + rows[:1]]
            pairs["pairs", split] = [
                {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
                | {"prompt_id": row["prompt_id"]}
                for row, other in zip(rows, others, strict=True)
            ]
            counts["pairs", split] = _count_pairs(config, source, split)
    return _write((pairs, counts), folder)


def _count_pairs(config: Label, source: SampledData, split: str) -> int:
    """The largest number of pairs that a stage makes of the completions of each prompt."""
    prompts = source.count("prompts", split)
    n = source.count("completions", split) // max(prompts, 1)
    pairs = prompts * (n * (n - 1) // 2 if config.pairing == "all" else 1)
    return min(pairs, config.max_pairs or pairs)


def completed_rows(data: SampledData) -> list[dict[str, Any]]:
    """Rows of prepared data with a ``prompt`` and a ``completion``, of any table that has them."""
    for kind, column in (
        ("demonstrations", "completion"),
        ("pairs", "chosen"),
        ("unpaired", "completion"),
        ("completions", "completion"),
    ):
        if rows := data.sampled(kind) or data.sampled(kind, "test"):
            return [row | {"completion": row[column]} for row in rows]
    return []


def _completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("prompt", "completion", "prompt_id")}


def _spaced(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most :data:`SAMPLE` of the rows, evenly spaced."""
    n = min(len(rows), SAMPLE)
    return [rows[k * len(rows) // n] for k in range(n)]


def _write(data: tuple[Rows, dict[tuple[str, str], int]], folder: Path) -> SampledData:
    """Write tables into a new folder."""
    folder.mkdir(parents=True)
    by_table, counts = data
    for (kind, split), rows in by_table.items():
        if rows:
            tables.write(rows, tables.table_file(folder, kind, split))
    return SampledData(folder, counts)
