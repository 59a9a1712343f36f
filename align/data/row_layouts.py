"""Layouts of the rows of a part, all of which are read in one layout.

The columns at the head of a part decide how its rows are read. A row that has none of the columns
with the completions of this layout, and has those of another, is dropped with this reason, unless
the rows of the part have these columns too: then it is a defective row of the part. Of rows of
another layout, a few may be stray; from ``LARGE_SHARE`` on, the part is a mixture and an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config.data import MixtureSource
from align.config.readers import REQUIRED_COLUMNS
from align.data.columns import columns_of, complete_columns, kind_of, rename_columns
from align.data.labels import label_of
from align.data.public_layouts import is_transcript, reader_of
from align.data.rows import DroppedError, Raw
from align.data.sources import Part
from align.data.transcripts import begins_transcript
from align.errors import DataError

LARGE_SHARE = 0.01
"""Share of rows of other layouts from which on a part is refused."""
OTHER_LAYOUT = "row of another layout"
_COLUMNS = {
    "pairs": (("prompt", "chosen", "rejected"),),
    "demonstrations": (("prompt", "completion"), ("messages",)),
    "unpaired": (("prompt", "completion", "label"), ("messages", "label")),
}
_COMPLETIONS = {"pairs": ("chosen", "rejected")}
_MISSING = ("missing value", "no prompt", "no label")
"""Reasons to drop a row that lacks a column."""
_LABELS = ("label", "kto_tag")
_MAX_KNOWN = 1_000  # sets of columns whose layouts are remembered


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A layout in which a row can be read."""

    kind: str
    name: str
    """Kind and layout, such as ``pairs of ShareGPT``."""
    columns: tuple[str, ...]
    """Columns of the source by which it is recognized."""

    def __str__(self) -> str:
        names = ", ".join(f"`{name}`" for name in self.columns)
        return f"{self.name} with {names}" if names else self.name


def layout_of(names: tuple[str, ...], columns: Mapping[str, str]) -> RowLayout | None:
    """The layout of a row that has the columns ``names``; None if they fit none.

    ``columns`` is the column map of the recipe.
    """
    row = Part("", [dict.fromkeys(names)], iter(()))
    layout, columns = complete_columns(row, "columns", columns)
    own = columns_of(row, columns)
    kind = kind_of(own)
    if not kind:
        return None
    fitting = max(_COLUMNS[kind], key=lambda form: set(form) <= set(own))
    in_source = (columns.get(name, name) for name in fitting)
    noun = {"unpaired": "labeled completions"}.get(kind, kind)
    name = f"{noun} of {layout}" if layout else noun
    return RowLayout(kind, name, tuple(column for column in in_source if column in names))


@dataclass(slots=True)
class _Rows:
    """The number of rows of a layout, and the first of them."""

    first: int
    count: int = 0


class RowLayouts:
    """Counts of the layouts of the rows of a part, which is read as rows of one kind."""

    def __init__(self, part: Part, kind: str, source: MixtureSource) -> None:
        self._part, self._kind = part.name, kind
        self._reader, self._columns, self._labels = source.reader, source.columns, source.labels
        self._required = REQUIRED_COLUMNS.get(source.reader)
        self._known: dict[tuple[str, ...], RowLayout | None] = {}
        self._rows: dict[RowLayout, _Rows] = {}
        self._own: dict[tuple[str, ...], _Rows | None] = {}
        self._n_rows = self._n_other = 0
        self._filled = set[str]()
        """Columns of the source in which rows have a value that have all that the part needs."""
        _, columns = complete_columns(part, source.reader, source.columns)
        for raw in part.head:
            if not self._may_be_other(rename_columns(raw, columns)):
                self._add_filled(raw)

    def count(self, raw: Raw, renamed: Raw, number: int) -> DroppedError | None:
        """Count a row; the reason to drop it if it is of another layout.

        ``renamed`` is the row with the columns of Align, as the part is read.
        """
        self._n_rows += 1
        other = self._other_layout(raw, renamed)
        if other is None:
            rows = self._own_rows(raw, number)
        else:
            rows = self._rows.setdefault(other, _Rows(number))
            self._n_other += 1
        if rows is not None:
            rows.count += 1
        return DroppedError(OTHER_LAYOUT, str(other)) if other else None

    def raise_if_mixed(self) -> None:
        """Check the share of rows of other layouts, after the last row.

        Raises:
            DataError: They are a large share; the message has the number of rows of each layout,
                and the first of them.
        """
        if not self._n_other or self._n_other < LARGE_SHARE * self._n_rows:
            return
        counts = "; ".join(
            f"{rows.count:,} × {layout} (row {rows.first:,})" for layout, rows in self._rows.items()
        )
        if self._n_other == self._n_rows and len(self._rows) == 1:
            repair = (
                "remove the empty columns"
                if self._reader == "columns"
                else f"`reader: {self._reader}` does not read them; set `reader: columns`"
            )
            raise DataError(f"{self._part}: its rows are {counts}; {repair}")
        raise DataError(
            f"{self._part}: rows of several layouts: {counts}; divide it into one file per layout,"
            " and name these files in `mixture:`"
        )

    def with_columns(self, error: DroppedError, raw: Raw, renamed: Raw) -> DroppedError:
        """The error with the columns of its row, if a column that is required has no value."""
        is_complete = all(renamed.get(name) is not None for name in self._required or ())
        if error.reason == OTHER_LAYOUT or (error.reason not in _MISSING and is_complete):
            return error
        names = ", ".join(f"`{name}`" for name in _with_values(raw)[:8])
        found = f"the row has {names or 'no values'}"
        detail = f"{error.detail}; {found}" if error.detail else found
        return DroppedError(error.reason, detail, place=error.place)

    def _own_rows(self, raw: Raw, number: int) -> _Rows | None:
        """The rows of the part with the same columns; None if they fit no layout."""
        names = tuple(raw) if self._reader == "columns" else ()
        if names not in self._own:
            if len(self._own) == _MAX_KNOWN:
                self._own.clear()
            if self._reader == "columns":
                layout = self._layout(names)
            else:
                layout = RowLayout(self._kind, f"rows of `reader: {self._reader}`", ())
            own = self._rows.setdefault(layout, _Rows(number)) if layout is not None else None
            self._own[names] = own
        return self._own[names]

    def _other_layout(self, raw: Raw, renamed: Raw) -> RowLayout | None:
        if self._reader == "columns" and is_transcript(renamed):
            return RowLayout("pairs", "transcripts", ("chosen", "rejected"))
        if self._reader == "hh" and _has_value(renamed, "chosen"):
            texts = map(renamed.get, ("prompt", "chosen", "rejected"))
            is_plain = _has_value(renamed, "prompt") and not any(map(begins_transcript, texts))
            return self._layout(_with_values(raw)) if is_plain else None
        if not self._may_be_other(renamed):
            self._add_filled(raw)
            return None
        layout = self._layout(_with_values(raw))
        if layout is None and (reader := reader_of(raw)) not in ("", self._reader):
            columns = REQUIRED_COLUMNS.get(reader, ())
            layout = RowLayout("", f"rows of `reader: {reader}`", columns)
        if layout is None or (layout.columns and self._filled.issuperset(layout.columns)):
            return None
        is_own = self._reader == "columns" and self._has_completion(renamed)
        return None if is_own and layout.kind == self._kind else layout

    def _may_be_other(self, renamed: Raw) -> bool:
        """Whether a row lacks what all rows of the part have, or has a label that they lack."""
        if self._required is not None:
            return any(renamed.get(name) is None for name in self._required)
        if not self._has_completion(renamed):
            return True
        if self._kind == "demonstrations":
            for name in _LABELS:
                if name in renamed and label_of(renamed[name], self._labels) is not None:
                    return True
        return False

    def _has_completion(self, renamed: Raw) -> bool:
        first, second = _COMPLETIONS.get(self._kind, ("completion", "messages"))
        return _has_value(renamed, first) or _has_value(renamed, second)

    def _add_filled(self, raw: Raw) -> None:
        for name in raw:
            if name not in self._filled and _has_value(raw, name):
                self._filled.add(name)

    def _layout(self, names: tuple[str, ...]) -> RowLayout | None:
        if names not in self._known:
            if len(self._known) == _MAX_KNOWN:
                self._known.clear()
            self._known[names] = layout_of(names, self._columns)
        return self._known[names]


def _has_value(row: Raw, name: str) -> bool:
    value: Any = row.get(name)
    return value is not None and value == value and value not in ("", [], {})  # `==`: NaN


def _with_values(row: Raw) -> tuple[str, ...]:
    """The columns in which a row has a value: files such as CSV give all rows all columns."""
    return tuple(name for name in row if _has_value(row, name))
