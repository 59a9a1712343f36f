"""The result of a stage, and the tables in which a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table for the summary at the end of a run.

    Cells are formatted text; numbers are right-aligned.

    ``columns`` are the headers; a header that ends in ``<`` is left-aligned. ``note`` is printed
    below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class StageResult:
    """The result of a stage.

    Everything is stored in ``artifact.json``, so a reused stage reports the same.
    """

    metrics: dict[str, Any]
    """The stage's metrics, as JSON types."""
    headline: dict[str, float] = field(default_factory=dict)
    """The few metrics that are shown on the stage's line when it ends."""
    remarks: tuple[str, ...] = ()
    """Sentences printed below that line: counts, dropped rows, warnings."""
    tables: tuple[ResultTable, ...] = ()
    """Tables for the summary at the end of the run."""
