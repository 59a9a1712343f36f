"""data.ingest"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.data import decontamination, deduplication
from align.data.deduplication import KEPT
from align.data.formats import (
    check_columns,
    columns_of,
    demonstration,
    kind_read,
    labeled,
    pair,
    rename_columns,
)
from align.data.pairing import PairingOptions
from align.data.public_datasets import PUBLIC_FORMATS, trees
from align.data.row_store import RowTable
from align.data.rows import DroppedError, Row, normalize_text
from align.data.sources import Part, Raw, read_file, read_source, source_files
from align.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Origin:
    """A source, and how it is read."""

    source: str
    reader: str = "columns"
    columns: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None
    data_dir: str | None = None
    data_split: str = "train"
    revision: str | None = None
    max_rows: int | None = None
    weight: float | None = None
    options: PairingOptions = field(default_factory=PairingOptions)


def _origin(told: Mapping[str, Any], seed: int) -> Origin:
    options = PairingOptions(
        pairing=told.get("pairing") or "best_worst",
        margin=told.get("margin") or 0.0,
        ratio=told.get("ratio") or 1.0,
        languages=tuple(told.get("languages") or ()),
        seed=seed,
    )
    names = (
        "source",
        "reader",
        "config",
        "data_dir",
        "data_split",
        "revision",
        "max_rows",
        "weight",
    )
    known = {name: told[name] for name in names if told.get(name) is not None}
    return Origin(**known, columns=dict(told.get("columns") or {}), options=options)


def evaluation_prompts(source: str, n: int) -> decontamination.EvaluationPrompts:
    """Read a set of evaluation prompts: every file of a folder, a Hub set's ``test``."""
    found, unread = [], 0
    files = source_files(source, split="")
    for part in [*map(read_file, files)] or read_source(source, split="test"):
        for raw in part.rows:
            texts = decontamination.prompts_of(raw)
            found += texts or []
            unread += texts is None
    if unread or not found:
        raise UserError(
            f"decontaminate: {source}: {unread} rows have no text under `prompt`, `messages`, `question` or"
            " `instruction`; rename the column that holds the prompt"
        )
    return decontamination.EvaluationPrompts(source, found, n)


@dataclass
class Ingest:
    """Reads sources into tables: what a row must pass before it is spooled."""

    named: list[decontamination.EvaluationPrompts]
    prompts: deduplication.MinHashIndex | None
    keep: list[str]

    def read(self, origins: Sequence[Origin], first: int) -> dict[str, RowTable]:
        """Tables by kind. Sources are numbered from ``first``."""
        tables: dict[str, RowTable] = {}
        for number, origin in enumerate(origins, start=first):
            parts = read_source(
                origin.source,
                config=origin.config,
                data_dir=origin.data_dir,
                split=origin.data_split,
                revision=origin.revision,
                # of messages as many make a tree as will: the trees are counted below
                max_rows=None if origin.reader == "oasst" else origin.max_rows,
            )
            check_columns(parts, origin.reader, origin.columns)
            lacks = [
                name
                for name in self.keep
                if parts and not any(name in row for part in parts for row in part.head)
            ]
            if lacks and any(part.head for part in parts):
                found = list(dict.fromkeys(n for part in parts for n in columns_of(part)))
                raise UserError(
                    *(
                        f"keep: {origin.source} has no column `{n}`{nearest(n, found)}"
                        for n in lacks
                    )
                )
            raws: Counter[str] = Counter()
            for part in parts:
                if part.head:
                    self._part(part, origin, number, tables, raws)
            if not any(part.head for part in parts):
                many = "s" * (len(parts) > 1)
                raise UserError(f"{origin.source}: no rows; found {len(parts)} empty file{many}")
        return dict(sorted(tables.items()))

    def _part(
        self,
        part: Part,
        origin: Origin,
        number: int,
        tables: dict[str, RowTable],
        raws: Counter[str],
    ) -> None:
        kind = kind_read(columns_of(part, origin.columns), origin.reader)
        table = tables.setdefault(kind, RowTable(kind))
        for raw in trees(part.rows) if origin.reader == "oasst" else part.rows:
            if origin.max_rows is not None and raws[kind] >= origin.max_rows:
                break
            raws[kind] += 1
            for found in _read_raw(rename_columns(raw, origin.columns), origin):
                table.read[number] += 1
                try:
                    if isinstance(found, DroppedError):
                        raise found
                    row = _row(found, kind, origin.reader)
                    self._check_clean(row)
                except DroppedError as reason:
                    table.dropped[number, str(reason)] += 1
                    continue
                table.add(
                    row, number, {k: _flat(raw.get(k)) for k in self.keep}, found.get("margin")
                )
                if self.prompts is not None:
                    text = "\n".join(normalize_text(turn["content"]) for turn in row["prompt"])
                    self.prompts.add(table.prompts[-1], table.openings[-1], text)

    def _check_clean(self, row: Row) -> None:
        if self.named:
            texts = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
            for named in self.named:
                reason = named.finds(texts)
                if reason:
                    raise DroppedError(reason)


def _flat(value: Any) -> Any:
    """JSON text of a list or an object: Parquet would give all rows the fields of the first, and lose the others."""
    if not isinstance(value, (list, dict)):
        return value
    return json.dumps(value, default=str)


def _read_raw(raw: Raw, origin: Origin) -> Iterator[Raw | DroppedError]:
    """The rows that a reader makes of a raw one."""
    if origin.reader in PUBLIC_FORMATS:
        return PUBLIC_FORMATS[origin.reader](raw, origin.options)
    return iter(
        [{k: v for k, v in raw.items() if k != "margin"}]
    )  # such a column is not ours to read


def _row(raw: Raw, kind: str, reader: str) -> Row:
    if kind == "pairs":
        return pair(raw, reader="hh" if reader == "hh" else "columns")
    return labeled(raw) if kind == "unpaired" else demonstration(raw)


def check_usable(tables: Mapping[str, RowTable], source: str) -> None:
    for kind, table in tables.items():
        if not (table.verdict == KEPT).any():
            reasons = table.all_dropped()
            counts = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
            transcripts = "not an HH transcript" in reasons
            repair = "try `reader: columns`" if transcripts else "mend its rows, or map `columns:`"
            raise UserError(
                f"{source}: none of {table.read.total()} {kind} is usable: {counts}; {repair}"
            )


def _margins(main: Mapping[str, RowTable]) -> Any:
    """Differences of scores of the pairs kept, where the source has scores."""
    table = main.get("pairs")
    if table is None or not len(table):
        return np.zeros(0)
    margins = np.frombuffer(table.margins, dtype=np.float64)[table.verdict == KEPT]
    return margins[~np.isnan(margins)]
