"""Columns: which kind of rows a source contains, and errors for the columns that it lacks.

The columns of a part decide the kind of all its rows: pairs, demonstrations or labeled completions
(``unpaired``). :mod:`align.data.formats` converts the rows.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from align.config.readers import FORMATS, REQUIRED_COLUMNS, columns_read
from align.data import layouts
from align.data.annotations import ALIGN_KEYS
from align.data.public_layouts import advice, is_transcript
from align.data.rows import Raw
from align.data.sources import Part
from align.data.tool_calls import TOOLS
from align.errors import DataError, did_you_mean, nearest

_HH_FORMATS = (("chosen", "rejected"),)
_SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "completion": ("response", "answer", "output"),
    "chosen": ("preferred", "winner", "better", "best", "good", "accepted", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "worst", "bad", "response_rejected"),
    "messages": ("conversations", "conversation", "dialogue", "turns"),
}


def kind_of_part(part: Part, reader: str, columns: Mapping[str, str]) -> str:
    """Kind of the rows that a reader makes of a part."""
    if reader == "gsm8k":
        return "demonstrations"
    return "pairs" if reader in REQUIRED_COLUMNS else kind_of(columns_of(part, columns))


def kind_of(names: Iterable[str]) -> str:
    """Kind of the rows with these columns; empty if the columns fit no kind."""
    names = set(names)
    if {"chosen", "rejected"} <= names:
        return "pairs"
    if {"prompt", "completion"} <= names or "messages" in names:
        return "unpaired" if "label" in names else "demonstrations"
    return ""


def columns_of(part: Part, columns: Mapping[str, str] | None = None) -> list[str]:
    """Columns at the head of a part, renamed by ``columns``."""
    names = dict.fromkeys(name for row in part.head for name in row)
    return list(rename_columns(names, columns) if columns else names)


def complete_columns(
    part: Part, reader: str, columns: Mapping[str, str]
) -> tuple[str, Mapping[str, str]]:
    """The layout that is recognized, if any, and the column map of a source with its columns.

    Alpaca's ``input`` and ``history`` also belong to a prompt that is mapped to ``instruction``,
    unless another column is read from them.
    """
    in_source = columns_of(part)
    if columns.get("prompt") == "instruction":
        optional = {n: n for n in layouts.OPTIONAL if n not in columns.values()}
        columns = optional | dict(columns)
    names = columns_of(part, columns)
    rows = [rename_columns(raw, columns) for raw in part.head]
    if reader != "columns" or (kind_of(names) and not _lacks_prompt(names, rows)):
        return "", columns
    unmapped = [name for name in in_source if name not in columns.values()]
    layout, found = layouts.recognize({*names, *unmapped})
    free = {own: name for own, name in found.items() if name not in columns.values()}
    return layout, free | dict(columns)


def _lacks_prompt(names: Iterable[str], rows: Sequence[Raw]) -> bool:
    """Whether rows are pairs without a prompt, in no column and not within the conversations."""
    has_prompt = "prompt" in names or any(isinstance(row.get("chosen"), list) for row in rows)
    return kind_of(names) == "pairs" and not has_prompt


def columns_of_kind(kind: str, reader: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Columns of Align that the rows of a kind are read from, if they are not mapped."""
    required = {
        "pairs": ("prompt", "chosen", "rejected"),
        "unpaired": ("prompt", "completion", "messages", "label"),
    }.get(kind, ("prompt", "completion", "messages"))
    tools = () if reader == "hh" else TOOLS
    return tuple(name for name in (*required, "system", *tools) if name not in columns)


def rename_columns(raw: Raw, columns: Mapping[str, str]) -> Raw:
    """Rename columns by a map from Align's names to those of the source.

    A renamed column is not available under its old name. ``input`` is read if it is mapped.
    """
    if "input" in raw and "input" not in {*columns, *columns.values()}:
        raw = {name: value for name, value in raw.items() if name != "input"}
    if not columns:
        return raw
    renamed = {own: raw[name] for own, name in columns.items() if name in raw}
    taken = {columns[own] for own in renamed}
    return {name: value for name, value in raw.items() if name not in taken} | renamed


def check_column_map(reader: str, columns: Mapping[str, str]) -> None:
    """Check the keys of ``columns`` for a reader, before the source is read.

    Raises:
        DataError: A key is not a column that the reader uses, or one column is mapped twice.
    """
    known = columns_read(reader)
    problems = [
        f"columns: {own}: not a column of `reader: {reader}`{nearest(own, known)}"
        for own in columns
        if own not in known
    ]
    problems += [
        f"columns: `{name}` is mapped twice; keep one of the two keys"
        for name, count in Counter(columns.values()).items()
        if count > 1
    ]
    if problems:
        raise DataError(*problems)


def check_columns(parts: list[Part], reader: str, columns: Mapping[str, str]) -> None:
    """Check the columns of all parts of a source.

    Raises:
        DataError: One line for each part, or each key of ``columns``, that lacks a column.
    """
    parts = [part for part in parts if part.head]
    names = list(dict.fromkeys(name for part in parts for name in columns_of(part)))
    problems = []
    for own, name in columns.items():
        if names and name not in names:
            hint = did_you_mean(name, names) or f"; found {_quoted(names)}"
            problems.append(f"columns: {{{own}: {name}}}: no column `{name}`{hint}")
    if problems:
        raise DataError(*problems)
    for part in parts:
        if reader in REQUIRED_COLUMNS:
            problems += _public_problems(part, reader, columns)
        elif reader == "hh":
            problems += _transcript_problems(part, columns)
        else:
            problems += _column_problems(part, columns)
    if problems:
        raise DataError(*problems)


def _public_problems(part: Part, reader: str, columns: Mapping[str, str]) -> list[str]:
    names = columns_of(part, columns)
    missing = [name for name in REQUIRED_COLUMNS[reader] if name not in names]
    other = advice((rename_columns(row, columns) for row in part.head), reader)
    if other and (missing or not REQUIRED_COLUMNS[reader]):
        return [f"{part.name}: {other}"]
    if not missing:
        return []
    _, own_columns = complete_columns(part, "columns", {})
    is_own = kind_of(columns_of(part, own_columns))
    repair = f"map it with `columns: {{{missing[0]}: ...}}`"
    return [
        f"{part.name}: no column {_quoted(missing)}, required by `reader: {reader}`;"
        f" found {_quoted(names)}; {'set `reader: columns`' if is_own else repair}"
    ]


def _transcript_problems(part: Part, columns: Mapping[str, str]) -> list[str]:
    names = columns_of(part, columns)
    if kind_of(names):
        return []
    other = advice(part.head, "hh")
    return [f"{part.name}: {other}" if other else _missing_columns(part.name, names, _HH_FORMATS)]


def _column_problems(part: Part, columns: Mapping[str, str]) -> list[str]:
    _, columns = complete_columns(part, "columns", columns)
    names = columns_of(part, columns)
    rows = [rename_columns(raw, columns) for raw in part.head]
    if "chosen" in names and is_transcript(rows[0]):
        return [f"{part.name}: {advice(rows[:1], 'columns')}"]
    if set(ALIGN_KEYS) <= part.head[0].keys():
        return [f"{part.name}: {advice(part.head[:1], 'columns')}"]
    lacks_prompt = _lacks_prompt(names, rows)
    if kind_of(names) and not lacks_prompt:
        return []
    if other := advice(part.head, "columns"):
        return [f"{part.name}: {other}"]
    return [_missing_columns(part.name, names, FORMATS[:1] if lacks_prompt else FORMATS)]


def _missing_columns(part: str, names: list[str], formats: tuple[tuple[str, ...], ...]) -> str:
    """Message for missing columns, for the format that the columns are nearest to."""

    def missing(format: tuple[str, ...]) -> dict[str, str | None]:
        others = [name for name in names if name not in format]
        return {own: _nearest_column(own, others) for own in format if own not in names}

    def distance(format: tuple[str, ...]) -> tuple[int, int]:
        absent = missing(format)
        return list(absent.values()).count(None), len(absent) - len(format)

    best = min(formats, key=distance)
    if distance(best) == (len(best), 0):
        return (
            f"{part}: found {_quoted(names)}; expected {' or '.join(map(_quoted, formats))};"
            f" map them with `columns: {{{formats[0][0]}: ...}}`"
        )
    absent = missing(best)
    suggested = absent
    if absent.get("prompt") == "instruction" and "input" in names:
        suggested = {"prompt": "instruction", "input": "input", **absent}
    column_map = ", ".join(f"{own}: {name or '...'}" for own, name in suggested.items())
    pairs = "" if "chosen" in best else f" (pairs have {_quoted(FORMATS[0])})"
    return (
        f"{part}: no column {_quoted(absent)}; found {_quoted(names)};"
        f" map it with `columns: {{{column_map}}}`{pairs}"
    )


def _nearest_column(own: str, names: list[str]) -> str | None:
    names = [name for name in names if name != "id" and not name.endswith("_id")]
    synonyms = _SYNONYMS.get(own, ())
    alike = [name for name in synonyms if name in names] + [name for name in names if own in name]
    return next(iter(alike or difflib.get_close_matches(own, names, n=1)), None)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
