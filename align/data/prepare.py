"""Prepare: read, check, deduplicate, mix and split preference data.

Whatever the source, the rows are conversational and have the id of their prompt:

- ``demonstrations``: prompt, completion, prompt_id
- ``pairs``: prompt, chosen, rejected, prompt_id, and margin if a source has scores
- ``unpaired``: prompt, completion, label, prompt_id
- ``prompts``: prompt, prompt_id, one row for each prompt of the others

Every row that cannot be used is dropped for a named reason, and all reasons are counted. Sources
are read once, row by row. This module writes only temporary files; :mod:`align.stages.prepare`
writes the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.config.data import MixtureSource, Prepare
from align.data.deduplication import NearDuplicates, deduplicate
from align.data.ingest import Ingested, ingest
from align.data.mixing import mix
from align.data.row_store import RowTable, as_numbers, describe_drops
from align.data.rows import Row
from align.data.splits import (
    SPLITS,
    KindRows,
    TableSplit,
    assign_splits,
    configured_splits,
    leakage,
    select_rows,
)
from align.errors import DataError


class SplitRow(NamedTuple):
    """A row with the kind and the split of its table."""

    kind: str
    split: str
    row: Row


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The prepared data set.

    :meth:`rows` streams all tables from disk and can be called repeatedly.
    """

    kinds: dict[str, KindRows]
    splits: list[str]
    sources: dict[str, dict[str, Any]]
    """Rows read, kept and dropped, by source and kind."""
    findings: dict[str, Any]
    """What is not read, near-duplicates and leakage."""
    margins: NDArray[np.float64]
    """Differences of the scores of the kept pairs, from sources that have scores."""
    files: list[Path]
    """Local files that were read."""

    @property
    def extra_fields(self) -> frozenset[str]:
        """Names of the fields beside role and content that any turn of any table has."""
        tables = (part.table for rows in self.kinds.values() for part in rows.tables)
        return frozenset[str]().union(*(table.extra_fields for table in tables))

    @property
    def table_kinds(self) -> list[str]:
        """Kinds of tables, ``prompts`` last."""
        return [*self.kinds, "prompts"]

    @property
    def read(self) -> dict[str, int]:
        """Rows read of each kind."""
        return {kind: rows.n_read for kind, rows in self.kinds.items() if rows.n_read}

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped, by ``kind: reason``."""
        return {
            f"{kind}: {reason}": count
            for kind, rows in self.kinds.items()
            for reason, count in sorted(rows.dropped.items())
        }

    @property
    def dropped_examples(self) -> dict[str, str]:
        """The first dropped row, by ``kind: reason``: its place, and what was found."""
        return {
            f"{kind}: {reason}": example
            for kind, rows in self.kinds.items()
            for reason, example in sorted(rows.examples.items())
        }

    def rows(self) -> Iterator[SplitRow]:
        """Every row of every table, in the order of the sources.

        A prompt follows the first row that has it. If any source has scores, all pairs have a
        ``margin``, which is 0 for those without scores.
        """
        for kind, rows in self.kinds.items():
            for part in rows.tables:
                yield from self._table_rows(kind, part)

    def tables(self) -> dict[str, dict[str, list[Row]]]:
        """All rows in memory, by kind and split."""
        tables = self.empty_tables()
        for kind, split, row in self.rows():
            tables[kind][split].append(row)
        return tables

    def empty_tables(self) -> dict[str, dict[str, list[Row]]]:
        """The kinds and splits of all tables, without their rows."""
        return {kind: {split: [] for split in self.splits} for kind in self.table_kinds}

    def _table_rows(self, kind: str, part: TableSplit) -> Iterator[SplitRow]:
        table = part.table
        columns = zip(table.spool, table.margins, part.take, part.split, part.first, strict=True)
        for (row, copied), margin, take, code, is_first in columns:
            if not take:
                continue
            split = SPLITS[code]
            prompt = {"prompt": row["prompt"], "prompt_id": row["prompt_id"]}
            if kind == "pairs" and len(self.margins):
                row = row | {"margin": 0.0 if math.isnan(margin) else margin}
            elif kind == "demonstrations":
                row = {
                    "prompt": row["prompt"],
                    "completion": row["chosen"] if "chosen" in row else row["completion"],
                    "prompt_id": row["prompt_id"],
                }
            yield SplitRow(kind, split, row)
            if is_first:
                yield SplitRow("prompts", split, prompt | copied)


def prepare(config: Prepare) -> PreparedData:
    """Read, check and split the sources of a stage.

    Memory grows with the number of rows, not with the length of their text.

    Raises:
        DataError: One line for each problem with the sources.
    """
    ingested = ingest(config)  # 1. read sources, check rows
    near = deduplicate(ingested.tables, ingested.minhash, config)  # 2. duplicates
    mix(ingested.preferences.values(), config)  # 3. weights of a mixture
    return split(ingested, near, config)  # 4. train, test, validation


def split(ingested: Ingested, near: NearDuplicates, config: Prepare) -> PreparedData:
    """Select the rows of each kind and assign each prompt to a split.

    Raises:
        DataError: No row of a kind is usable, or a split is empty.
    """
    check_usable(ingested.preferences.values(), ingested.name)
    check_usable((ingested.demonstrations or {}).values(), str(config.demonstrations))
    kinds = select_rows(ingested.preferences, ingested.demonstrations)
    if not any(part.take.any() for part in kinds["demonstrations"].tables):
        raise DataError(
            f"{config.demonstrations or ingested.name}: no completion is labeled true, so"
            " no completion can be demonstrated; set `demonstrations` to another source"
        )
    assign_splits(kinds, near.representatives, config)
    findings: dict[str, Any] = {}
    if config.near_duplicates is not None:
        findings["near_duplicate_prompts"] = len(near.prompt_ids)
        findings["near_duplicates"] = config.near_duplicates
    if ingested.unread:
        findings["not_read"] = dict(sorted(ingested.unread.items()))
    if ingested.unusual:
        findings["unusual"] = dict(sorted(ingested.unusual.items()))
    if ingested.recognized:
        findings["recognized"] = ingested.recognized
    findings["leakage"] = leakage(kinds, config.test_fraction, config.split_seed)
    sources = count_by_source(ingested.sources, ingested.preferences)
    margins = kept_margins(ingested.preferences.get("pairs"))
    return PreparedData(
        kinds, configured_splits(config), sources, findings, margins, ingested.files
    )


def check_usable(tables: Iterable[RowTable], source: str) -> None:
    """Raise an error if no row of a table is kept."""
    for table in tables:
        if not table.kept.any():
            reasons = table.count_dropped()
            counts = describe_drops(reasons, table.drop_examples())
            transcripts = "not an HH transcript" in reasons
            repair = "try `reader: columns`" if transcripts else "fix its rows, or map `columns:`"
            raise DataError(
                f"{source}: none of {table.n_read.total()} {table.kind} is usable:"
                f" {counts}; {repair}"
            )


def count_by_source(
    sources: Sequence[MixtureSource], tables: Mapping[str, RowTable]
) -> dict[str, dict[str, Any]]:
    """Rows read, kept and dropped, by source and kind; a repeated source gets its number."""
    counts: dict[str, dict[str, Any]] = {}
    for number, source in enumerate(sources):
        name = source.source if source.source not in counts else f"{source.source} ({number + 1})"
        counts[name] = {}
        for kind, table in tables.items():
            n_read = table.n_read[number]
            if n_read:
                dropped = table.count_dropped(number)
                counts[name][kind] = {
                    "read": n_read,
                    "kept": n_read - dropped.total(),
                    "dropped": dict(sorted(dropped.items())),
                }
    return counts


def kept_margins(pairs: RowTable | None) -> NDArray[np.float64]:
    """Differences of the scores of the kept pairs; those without scores are left out."""
    if pairs is None:
        return np.zeros(0)
    margins = as_numbers(pairs.margins, np.float64)[pairs.kept]
    return margins[~np.isnan(margins)]
