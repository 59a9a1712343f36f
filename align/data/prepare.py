"""Preferences: rows in, rows out. Formats, checks, and the split by prompt.

Whatever the source, rows come out conversational, with the id of their prompt:

- ``demonstrations``: prompt, completion, prompt_id
- ``pairs``: prompt, chosen, rejected, prompt_id
- ``unpaired``: prompt, completion, label, prompt_id
- ``prompts``: prompt, prompt_id, one row for each prompt of the others

A row that does not fit is dropped under a named reason, and every reason is counted. Sources are read once, row by row;
:mod:`align.data.row_store` holds what must be known of all rows at once. Nothing here writes but temporary files.
:mod:`align.data.sources` opens files and the Hub, :mod:`align.data.formats` reads one raw row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.config.data import READERS, columns_read
from align.data import deduplication, mixing
from align.data import splits as data_splits
from align.data.deduplication import KEPT, NEAR_DUPLICATE
from align.data.ingest import Ingest, Origin, _margins, _origin, check_usable, evaluation_prompts
from align.data.row_store import RowTable
from align.data.rows import Row
from align.data.sources import source_files
from align.data.splits import SPLITS, TableSplit, assign_splits, leakage
from align.errors import UserError, nearest


class SplitRow(NamedTuple):
    """A row of a table, in its split."""

    kind: str
    split: str
    row: Row


@dataclass(frozen=True, slots=True)
class Prepared:
    """What ``prepare_rows`` found: ``tables[kind][split]`` are rows, in the source's order.

    Demonstrations that are the chosen completions of the pairs are not in ``read``.
    """

    tables: dict[str, dict[str, list[Row]]]
    read: dict[str, int]
    dropped: dict[str, int]
    files: list[Path]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Sources that were read and judged; ``rows()`` gives the rows of all tables, from disk, as often as asked.

    ``streams[kind]`` are the tables that its rows come from, each with the rows to take and their splits.
    """

    streams: dict[str, list[TableSplit]]
    splits: list[str]
    read: dict[str, int]
    dropped: dict[str, int]
    files: list[Path]
    sources: dict[str, dict[str, Any]]
    findings: dict[str, Any]
    margins: Any

    def rows(self) -> Iterator[SplitRow]:
        """Every row of every table; a prompt comes with the first row that has it.

        Where a source has scores, pairs have a ``margin``; it is 0 for those of sources that have none.
        """
        scored = len(self.margins) > 0
        for kind, streams in self.streams.items():
            for stream in streams:
                table = stream.table
                found = zip(
                    table.spool, table.margins, stream.take, stream.split, stream.first, strict=True
                )
                for (row, kept), margin, take, split, first in found:
                    if not take:
                        continue
                    name = SPLITS[split]
                    if kind == "pairs" and scored:
                        row = row | {"margin": 0.0 if math.isnan(margin) else margin}
                    if kind == "demonstrations" and "label" not in row and "chosen" not in row:
                        yield SplitRow(kind, name, row)
                    elif kind == "demonstrations":
                        said = row.get("chosen") or row["completion"]
                        yield SplitRow(
                            kind,
                            name,
                            {
                                "prompt": row["prompt"],
                                "completion": said,
                                "prompt_id": row["prompt_id"],
                            },
                        )
                    else:
                        yield SplitRow(kind, name, row)
                    if first:
                        prompt = {"prompt": row["prompt"], "prompt_id": row["prompt_id"]}
                        yield SplitRow("prompts", name, prompt | kept)


def prepare_rows(source: str | None = None, **knobs: Any) -> Prepared:
    """Read, check and split a source in memory, and write nothing. ``knobs`` are those of :func:`prepare`."""
    ready = prepare(source, **knobs)
    tables: dict[str, dict[str, list[Row]]] = {
        kind: {split: [] for split in ready.splits} for kind in [*ready.streams, "prompts"]
    }
    for kind, split, row in ready.rows():
        tables[kind][split].append(row)
    return Prepared(tables, ready.read, ready.dropped, ready.files)


def prepare(
    source: str | None = None,
    *,
    mixture: Sequence[Mapping[str, Any]] = (),
    demonstrations: str | None = None,
    reader: str = "columns",
    config: str | None = None,
    data_dir: str | None = None,
    data_split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    pairing: str | None = None,
    margin: float | None = None,
    ratio: float | None = None,
    languages: Sequence[str] = (),
    test_fraction: float = 0.1,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    max_rows: int | None = None,
    near_duplicates: str | None = None,
    near_duplicate_threshold: float = 0.8,
    decontaminate: Sequence[str] = (),
    ngram: int = 13,
    keep: Sequence[str] = (),
) -> PreparedData:
    """Read, check and split sources. Memory grows with the number of rows, not with their text.

    Demonstrations are those of the source ``demonstrations``, which is read without ``config``,
    ``data_dir`` and ``revision``; else those of the sources themselves; else their chosen and their desirable
    completions. ``max_rows`` counts the rows read of each kind, before the checks. ``split_seed`` also draws what is
    drawn: random pairs, and the rows that weights leave out.

    Raises:
        UserError: One line for each thing that is wrong with the config or the sources.
    """
    own = {
        "source": source, "reader": reader, "columns": columns, "config": config,
        "data_dir": data_dir, "data_split": data_split, "revision": revision,
        "max_rows": max_rows, "pairing": pairing, "margin": margin, "ratio": ratio,
        "languages": languages,
    }  # fmt: skip
    origins = [_origin(told, split_seed) for told in (mixture or [own])]
    fractions = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    for origin in origins:
        _check_settings(origin.reader, origin.columns, fractions)
    named = [evaluation_prompts(name, ngram) for name in decontaminate]
    prompts = deduplication.MinHashIndex() if near_duplicates else None
    intaking = Ingest(named, prompts, list(keep))

    main, other = intaking.read(origins, 0), None
    files = [f for origin in origins for f in source_files(origin.source, split=origin.data_split)]
    where = ", ".join(origin.source for origin in origins)
    if demonstrations is not None:
        files += source_files(demonstrations, split=data_split)
        first = origins[0]
        said = Origin(
            demonstrations, first.reader, first.columns, data_split=data_split, max_rows=max_rows
        )
        other = intaking.read([said], len(origins))
        main.pop("demonstrations", None)
        if not main:
            raise UserError(
                f"{where}: carries demonstrations alone, and `demonstrations` names others;"
                " give one of the two as `source`, and no `demonstrations`"
            )
    all_tables = [*main.values(), *(other or {}).values()]
    for table in all_tables:
        table.judge()
    decides: dict[int, int] = {}
    findings: dict[str, Any] = {}
    if prompts is not None:
        kept = [deduplication.numbers_of(t.prompts)[t.verdict == KEPT] for t in all_tables]
        decides, late = prompts.near(near_duplicate_threshold, np.unique(np.concatenate(kept)))
        findings |= {"near_duplicate_prompts": len(late), "near_duplicates": near_duplicates}
        if near_duplicates == "drop":
            marked = np.fromiter(late, dtype=np.uint64, count=len(late))
            for table in all_tables:
                table.drop(np.isin(deduplication.numbers_of(table.prompts), marked), NEAR_DUPLICATE)
    weights = {i: o.weight for i, o in enumerate(origins) if o.weight is not None}
    for table in main.values():
        mixing.apply_weights(table, weights, split_seed)
    check_usable(main, where)
    check_usable(other or {}, str(demonstrations))

    streams, shown = data_splits.streams(main, other)
    if not any(stream.take.any() for stream in streams["demonstrations"]):
        raise UserError(
            f"{demonstrations or where}: no completion is labelled true, so there is nothing to"
            " demonstrate; name another source as `demonstrations`"
        )
    wanted = [split for split in SPLITS if fractions.get(f"{split}_fraction", 1.0) > 0]
    assign_splits(streams, decides, wanted, split_seed, fractions)
    findings["leakage"] = leakage(streams, test_fraction, split_seed)
    return PreparedData(
        streams=streams,
        splits=wanted,
        read={kind: read for kind, (read, _) in shown.items() if read},
        dropped={
            f"{kind}: {reason}": count
            for kind, (_, dropped) in shown.items()
            for reason, count in sorted(dropped.items())
        },
        files=list(dict.fromkeys(files)),
        sources=_by_source(origins, main),
        findings=findings,
        margins=_margins(main),
    )


def _by_source(
    origins: Sequence[Origin], main: Mapping[str, RowTable]
) -> dict[str, dict[str, Any]]:
    """What was read and kept of each source; one that stands twice gets a number."""
    found: dict[str, dict[str, Any]] = {}
    for number, origin in enumerate(origins):
        name = origin.source if origin.source not in found else f"{origin.source} ({number + 1})"
        found[name] = {}
        for kind, table in main.items():
            if table.read[number]:
                dropped = table.all_dropped(number)
                kept = table.read[number] - dropped.total()
                found[name][kind] = {
                    "read": table.read[number],
                    "kept": kept,
                    "dropped": dict(sorted(dropped.items())),
                }
    return found


def _check_settings(
    reader: str, columns: Mapping[str, str], fractions: Mapping[str, float]
) -> None:
    wrong = [
        f"{name}: {value}: expected a number from 0 to below 1"
        for name, value in fractions.items()
        if not 0 <= value < 1
    ]
    if not wrong and sum(fractions.values()) >= 1:
        wrong.append(f"{' + '.join(fractions)}: {sum(fractions.values())}: leaves none to train on")
    if reader not in READERS:
        wrong.append(f"reader: {reader!r}: unknown; known: {', '.join(READERS)}")
    known = columns_read(reader)
    for ours in columns:
        if ours not in known:
            wrong.append(f"columns: {ours}: unknown key{nearest(ours, known)}")
    for theirs, count in Counter(columns.values()).items():
        if count > 1:
            wrong.append(f"columns: `{theirs}` is mapped twice; keep one of them")
    if wrong:
        raise UserError(*wrong)
