"""Files of annotations: JSON, JSONL or Parquet in the layout of Align or of another project.

The keys of the first row decide the layout: Align's, AlpacaEval's, or an export of Label Studio or
Argilla. Errors name the file, the row and the key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from align.data.annotation_exports import (
    ArgillaAnswers,
    from_argilla,
    from_label_studio,
    is_argilla_table,
)
from align.data.annotations import (
    ALIGN_KEYS,
    Annotation,
    InvalidRowError,
    from_align,
    from_alpaca_eval,
)
from align.data.file_limits import Problems
from align.data.files import read_file
from align.data.rows import Raw
from align.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_ALPACA_EVAL_KEYS = {"instruction", "output_1", "output_2"}
Layout = Callable[[Raw], Iterable[Annotation]]
"""Reads the annotations of a row."""


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row that is no annotation."""

    number: int
    """Its place in the source, from 1 on."""
    message: str
    """What is wrong; it begins with the key."""


def read_annotations(source: Path) -> list[Annotation]:
    """The annotations of a file, or of all files of a folder in the order of their names.

    Raises:
        DataError: The source is missing, has no annotations, or a row has a wrong value.
    """
    return [annotation for file in annotation_files(source) for annotation in read_rows(file)]


def annotation_files(source: Path) -> list[Path]:
    """The file itself, or the files of a folder that may contain annotations, by name.

    Raises:
        DataError: The source is missing, or the folder has no such file.
    """
    if not source.is_dir():
        if not source.is_file():
            raise DataError(f"{source}: no such file or folder of annotations")
        return [source]
    files = [
        file
        for file in sorted(source.iterdir())
        if file.is_file() and file.name.lower().endswith(SUFFIXES)
    ]
    if not files:
        raise DataError(f"{source}: no file of annotations; expected {', '.join(SUFFIXES)}")
    return files


def read_rows(file: Path) -> Iterator[Annotation]:
    """The annotations of a file, row by row.

    Raises:
        DataError: The file is unreadable, has no rows, an unknown layout or wrong values.
    """
    if not file.name.lower().endswith(SUFFIXES):
        raise DataError(f"{file}: expected annotations in a file {', '.join(SUFFIXES)}")
    problems = Problems(file)
    for each in annotations_of(read_file(file), str(file)):
        if isinstance(each, InvalidRow):
            problems.add(f"{file}: row {each.number}: {each.message}")
        else:
            yield each
    problems.raise_any()


def annotations_of(rows: Iterable[Raw], source: str) -> Iterator[Annotation | InvalidRow]:
    """The annotations in the rows of a source, and the rows that are none, in their order.

    Raises:
        DataError: There are no rows, the keys of the first one belong to no layout, or all of them
            together show that an export lost its decisions.
    """
    answers = ArgillaAnswers()
    layout: Layout | None = None
    for number, row in enumerate(rows, 1):
        layout = layout or _layout(source, row, answers)
        try:
            yield from layout(row)
        except InvalidRowError as error:
            yield InvalidRow(number, str(error))
    if layout is None:
        raise DataError(f"{source}: has no rows")
    answers.check(source)


def is_annotation(row: Raw) -> bool:
    """Whether a row has the keys of a layout of annotations."""
    return (
        row.keys() >= _ALPACA_EVAL_KEYS
        or set(ALIGN_KEYS) <= row.keys()
        or (isinstance(row.get("data"), dict) and "annotations" in row)
        or ("fields" in row and "responses" in row)
        or is_argilla_table(row)
    )


def _layout(file: str, row: Raw, answers: ArgillaAnswers) -> Layout:
    """The reader of the rows of a file, by the keys of its first row."""
    if row.keys() >= _ALPACA_EVAL_KEYS:
        return from_alpaca_eval
    if set(ALIGN_KEYS) <= row.keys():
        return from_align
    if isinstance(row.get("data"), dict) and "annotations" in row:
        return from_label_studio
    if ("fields" in row and "responses" in row) or is_argilla_table(row):
        return functools.partial(from_argilla, answers=answers)
    keys = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
    if {"annotation_id", "lead_time"} <= row.keys():
        raise DataError(f"{file}: a JSON-MIN export of Label Studio; export it as JSON")
    raise DataError(
        f"{file}: unknown layout of annotations, with the keys {keys}; expected Align's (`prompt`, "
        "`first`, `second`, `decision`), AlpacaEval's (`instruction`, `output_1`, `output_2`, "
        "`preference`), or an export of Label Studio or Argilla"
    )
