"""Preferences: rows in, rows out. Formats, checks, and the split by prompt.

Whatever the source, rows come out conversational, with the id of their prompt:

- ``demonstrations``: prompt, completion, prompt_id
- ``pairs``: prompt, chosen, rejected, prompt_id
- ``unpaired``: prompt, completion, label, prompt_id
- ``prompts``: prompt, prompt_id, one row for each prompt of the others

A row that does not fit is dropped under a named reason, and every reason is counted. Sources are read once, row by row;
:mod:`align.intake` holds what must be known of all rows at once. Nothing here writes but temporary files.
:mod:`align.sources` opens files and the Hub, :mod:`align.readers` reads one raw row.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align import contamination, intake, minhash, splitting
from align.comparisons import COMPARISONS, DroppedError, Options, trees
from align.errors import UserError
from align.intake import KEPT, NEAR_DUPLICATE, Table
from align.readers import (
    READERS,
    Row,
    check_columns,
    columns_of,
    columns_read,
    demonstration,
    kind_read,
    labelled,
    normalise,
    pair,
    renamed,
)
from align.sources import Part, Raw, read_file, read_source, source_files
from align.splitting import SPLITS, Stream
from align.wording import nearest


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
    options: Options = field(default_factory=Options)


class Placed(NamedTuple):
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
class Ready:
    """Sources that were read and judged; ``rows()`` gives the rows of all tables, from disk, as often as asked.

    ``streams[kind]`` are the tables that its rows come from, each with the rows to take and their splits.
    """

    streams: dict[str, list[Stream]]
    splits: list[str]
    read: dict[str, int]
    dropped: dict[str, int]
    files: list[Path]
    sources: dict[str, dict[str, Any]]
    findings: dict[str, Any]
    margins: Any

    def rows(self) -> Iterator[Placed]:
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
                        yield Placed(kind, name, row)
                    elif kind == "demonstrations":
                        said = row.get("chosen") or row["completion"]
                        yield Placed(
                            kind,
                            name,
                            {
                                "prompt": row["prompt"],
                                "completion": said,
                                "prompt_id": row["prompt_id"],
                            },
                        )
                    else:
                        yield Placed(kind, name, row)
                    if first:
                        prompt = {"prompt": row["prompt"], "prompt_id": row["prompt_id"]}
                        yield Placed("prompts", name, prompt | kept)


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
) -> Ready:
    """Read, check and split sources. Memory grows with the number of rows, not with their text.

    Demonstrations are those of the source ``demonstrations``, which is read without ``config``,
    ``data_dir`` and ``revision``; else those of the sources themselves; else their chosen and their desirable
    completions. ``max_rows`` counts the rows read of each kind, before the checks. ``split_seed`` also draws what is
    drawn: random pairs, and the rows that weights leave out.

    Raises:
        UserError: One line for each thing that is wrong with the settings or the sources.
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
    named = [_named(name, ngram) for name in decontaminate]
    prompts = minhash.Prompts() if near_duplicates else None
    intaking = _Intake(named, prompts, list(keep))

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
        kept = [intake.numbers_of(t.prompts)[t.verdict == KEPT] for t in all_tables]
        decides, late = prompts.near(near_duplicate_threshold, np.unique(np.concatenate(kept)))
        findings |= {"near_duplicate_prompts": len(late), "near_duplicates": near_duplicates}
        if near_duplicates == "drop":
            marked = np.fromiter(late, dtype=np.uint64, count=len(late))
            for table in all_tables:
                table.drop(np.isin(intake.numbers_of(table.prompts), marked), NEAR_DUPLICATE)
    weights = {i: o.weight for i, o in enumerate(origins) if o.weight is not None}
    for table in main.values():
        intake.weighed(table, weights, split_seed)
    _check_usable(main, where)
    _check_usable(other or {}, str(demonstrations))

    streams, shown = splitting.streams(main, other)
    if not any(stream.take.any() for stream in streams["demonstrations"]):
        raise UserError(
            f"{demonstrations or where}: no completion is labelled true, so there is nothing to"
            " demonstrate; name another source as `demonstrations`"
        )
    wanted = [split for split in SPLITS if fractions.get(f"{split}_fraction", 1.0) > 0]
    splitting.place(streams, decides, wanted, split_seed, fractions)
    findings["leakage"] = splitting.leakage(streams, test_fraction, split_seed)
    return Ready(
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


def _origin(told: Mapping[str, Any], seed: int) -> Origin:
    options = Options(
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


def _named(source: str, n: int) -> contamination.Named:
    """Read a set of evaluation prompts: every file of a folder, a Hub set's ``test``."""
    found, unread = [], 0
    files = source_files(source, split="")
    for part in [*map(read_file, files)] or read_source(source, split="test"):
        for raw in part.rows:
            texts = contamination.prompts_of(raw)
            found += texts or []
            unread += texts is None
    if unread or not found:
        raise UserError(
            f"decontaminate: {source}: {unread} rows have no text under `prompt`, `messages`, `question` or"
            " `instruction`; rename the column that holds the prompt"
        )
    return contamination.Named(source, found, n)


@dataclass
class _Intake:
    """Reads sources into tables: what a row must pass before it is spooled."""

    named: list[contamination.Named]
    prompts: minhash.Prompts | None
    keep: list[str]

    def read(self, origins: Sequence[Origin], first: int) -> dict[str, Table]:
        """Tables by kind. Sources are numbered from ``first``."""
        tables: dict[str, Table] = {}
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
        tables: dict[str, Table],
        raws: Counter[str],
    ) -> None:
        kind = kind_read(columns_of(part, origin.columns), origin.reader)
        table = tables.setdefault(kind, Table(kind))
        for raw in trees(part.rows) if origin.reader == "oasst" else part.rows:
            if origin.max_rows is not None and raws[kind] >= origin.max_rows:
                break
            raws[kind] += 1
            for found in _made(renamed(raw, origin.columns), origin):
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
                    text = "\n".join(normalise(turn["content"]) for turn in row["prompt"])
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


def _made(raw: Raw, origin: Origin) -> Iterator[Raw | DroppedError]:
    """The rows that a reader makes of a raw one."""
    if origin.reader in COMPARISONS:
        return COMPARISONS[origin.reader].read(raw, origin.options)
    return iter(
        [{k: v for k, v in raw.items() if k != "margin"}]
    )  # such a column is not ours to read


def _row(raw: Raw, kind: str, reader: str) -> Row:
    if kind == "pairs":
        return pair(raw, reader="hh" if reader == "hh" else "columns")
    return labelled(raw) if kind == "unpaired" else demonstration(raw)


def _check_usable(tables: Mapping[str, Table], source: str) -> None:
    for kind, table in tables.items():
        if not (table.verdict == KEPT).any():
            reasons = table.all_dropped()
            counts = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
            transcripts = "not an HH transcript" in reasons
            repair = "try `reader: columns`" if transcripts else "mend its rows, or map `columns:`"
            raise UserError(
                f"{source}: none of {table.read.total()} {kind} is usable: {counts}; {repair}"
            )


def _by_source(origins: Sequence[Origin], main: Mapping[str, Table]) -> dict[str, dict[str, Any]]:
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


def _margins(main: Mapping[str, Table]) -> Any:
    """Differences of scores of the pairs kept, where the source has scores."""
    table = main.get("pairs")
    if table is None or not len(table):
        return np.zeros(0)
    margins = np.frombuffer(table.margins, dtype=np.float64)[table.verdict == KEPT]
    return margins[~np.isnan(margins)]


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
