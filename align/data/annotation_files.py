"""Files of annotations: JSON, JSONL or Parquet in the layout of Align or of another project.

The keys of the first row decide the layout: Align's, AlpacaEval's, or an export of Label Studio or
Argilla. Errors name the file, the row and the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from align.data.annotation_exports import from_argilla, from_label_studio, is_argilla_table
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
Layout = Callable[[Raw], Iterable[Annotation]]
"""Reads the annotations of a row."""


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
    layout: Layout | None = None
    problems = Problems(file)
    for number, row in enumerate(read_file(file), 1):
        layout = layout or layout_of(str(file), row)
        try:
            yield from layout(row)
        except InvalidRowError as error:
            problems.add(f"{file}: row {number}: {error}")
    if layout is None:
        raise DataError(f"{file}: has no rows")
    problems.raise_any()


def layout_of(file: str, row: Raw) -> Layout:
    """The reader of the rows of a file, by the keys of its first row.

    Raises:
        DataError: They belong to no layout.
    """
    if {"instruction", "output_1", "output_2"} <= row.keys():
        return from_alpaca_eval
    if set(ALIGN_KEYS) <= row.keys():
        return from_align
    if isinstance(row.get("data"), dict) and "annotations" in row:
        return from_label_studio
    if ("fields" in row and "responses" in row) or is_argilla_table(row):
        return from_argilla
    keys = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
    if {"annotation_id", "lead_time"} <= row.keys():
        raise DataError(f"{file}: a JSON-MIN export of Label Studio; export it as JSON")
    raise DataError(
        f"{file}: unknown layout of annotations, with the keys {keys}; expected Align's (`prompt`, "
        "`first`, `second`, `decision`), AlpacaEval's (`instruction`, `output_1`, `output_2`, "
        "`preference`), or an export of Label Studio or Argilla"
    )
