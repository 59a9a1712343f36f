"""Parquet tables of a stage folder, such as ``pairs-train.parquet``: write and read them.

A table is named by its kind (``demonstrations``, ``pairs``, ``unpaired``, ``prompts``) and its
split. This module has the one error for a table that a folder lacks. What the rows contain is
decided by the stages that write them.
"""

from __future__ import annotations

import contextlib
import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.rows import Row
from align.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pyarrow as pa
    from datasets import Dataset


def table_file(folder: Path, kind: str, split: str) -> Path:
    """Path of a table, whether it exists or not."""
    return folder / f"{kind}-{split}.parquet"


def has_table(folder: Path, kind: str, split: str) -> bool:
    """Whether the folder contains the table."""
    return table_file(folder, kind, split).is_file()


def table_names(folder: Path) -> list[str]:
    """Names of the tables in a folder, such as ``pairs-train``, sorted."""
    return sorted(file.stem for file in folder.glob("*.parquet"))


def read(
    folder: Path,
    kind: str,
    split: str,
    *,
    columns: Sequence[str] | None = None,
    most: int | None = None,
    required_by: str = "",
) -> list[Row]:
    """Rows of a table, in file order.

    ``columns`` selects columns; ``most`` limits the number of rows, taken evenly spaced.
    ``required_by`` names the setting that needs the table, for the error message.

    Raises:
        DataError: The folder has no such table, or a damaged one.
    """
    import pyarrow.parquet as pq

    file = _existing_file(folder, kind, split, required_by)
    with _damage_as_data_error(file):
        table = pq.read_table(file, columns=None if columns is None else list(columns))
    if most is not None and len(table) > most:
        table = table.take([k * len(table) // most for k in range(most)])
    rows: list[Row] = table.to_pylist()
    return rows


def column_names(folder: Path, kind: str, split: str, *, required_by: str = "") -> list[str]:
    """Names of the columns of a table, in order.

    Raises:
        DataError: The folder has no such table, or a damaged one.
    """
    import pyarrow.parquet as pq

    file = _existing_file(folder, kind, split, required_by)
    with _damage_as_data_error(file):
        names: list[str] = pq.read_schema(file).names
    return names


def count_rows(folder: Path, kind: str, split: str) -> int:
    """Number of rows of a table; 0 if the folder does not contain it."""
    import pyarrow.parquet as pq

    file = table_file(folder, kind, split)
    if not file.is_file():
        return 0
    with _damage_as_data_error(file):
        return int(pq.read_metadata(file).num_rows)


def load_dataset(folder: Path, kind: str, split: str, output_dir: Path) -> Dataset | None:
    """A table as a data set for TRL; None for a held-out split that the folder does not contain.

    The cache of ``datasets`` lies below ``output_dir``: all ranks share it, and it is deleted with
    the stage's other temporary files.

    Raises:
        DataError: The folder has no table of the training split.
    """
    from datasets import Dataset

    if split != "train" and not has_table(folder, kind, split):
        return None
    file = _existing_file(folder, kind, split, "")
    # `datasets` reads a path as a pattern, below the working directory as it is.
    pattern = glob.escape(str(file.absolute()))
    return Dataset.from_parquet(pattern, cache_dir=str(output_dir / ".cache"))


@contextlib.contextmanager
def _damage_as_data_error(file: Path) -> Iterator[None]:
    """Raise a ``DataError`` that names the file if it cannot be read as Parquet."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: damaged ({reason}); run its stage again with --force") from None


def _existing_file(folder: Path, kind: str, split: str, required_by: str) -> Path:
    file = table_file(folder, kind, split)
    if file.is_file():
        return file
    names = table_names(folder)
    required = f", which `{required_by}` requires" if required_by else ""
    if split == "train" or not any(name.startswith(f"{kind}-") for name in names):
        repair = f"the source of this stage contains no {kind}: use another source"
    else:
        repair = f"set `{split}_fraction` of its `prepare` stage above 0"
    raise DataError(
        f"{folder}: no {file.name}{required}; found {', '.join(names) or 'no tables'}; {repair}"
    )


ROW_GROUP = 2_000  # rows of a table held in memory at once


class TableWriter:
    """Write conversational rows as Parquet, one row group at a time.

    Turns are stored as lists of ``{role, content}``. Kept columns have the type of the first row
    group. A later value of another type raises :class:`DataError`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, list[Row]()
        self._writer: Any = None

    def add(self, row: Row) -> None:
        """Append a row."""
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write the remaining rows and close the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        try:
            if self._writer is None:
                schema = _schema(self._rows)
                self._writer = pq.ParquetWriter(self._path, schema, compression="zstd")
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._writer.schema))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"keep_columns: the values of a kept column differ in type ({error});"
                " convert them to one type, such as text"
            ) from None
        self._rows = []


def _schema(rows: list[Row]) -> pa.Schema:
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {"prompt_id": pa.string(), "label": pa.bool_()}
    types |= dict.fromkeys(("prompt", "chosen", "rejected", "completion"), turns)

    def infer_type(name: str) -> pa.DataType:
        inferred = pa.infer_type([row[name] for row in rows])
        return pa.string() if inferred == pa.null() else inferred

    return pa.schema(
        [(name, types[name] if name in types else infer_type(name)) for name in rows[0]]
    )
