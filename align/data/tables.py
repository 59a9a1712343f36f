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

from align.data.rows import EXTRA_FIELDS, UNTRAINED, Row
from align.data.tool_calls import without_nulls
from align.errors import DataError

TOOLS = "tools"
TURNS = ("prompt", "chosen", "rejected", "completion")
"""Columns whose values are turns."""

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

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
    return [with_tools(row) for row in rows]


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
    from datasets import Dataset, List

    if split != "train" and not has_table(folder, kind, split):
        return None
    file = _existing_file(folder, kind, split, "")
    # `datasets` reads a path as a pattern, below the working directory as it is.
    pattern = glob.escape(str(file.absolute()))
    rows = Dataset.from_parquet(pattern, cache_dir=str(output_dir / ".cache"))
    if TOOLS not in rows.column_names:
        return rows
    features = rows.features.copy()
    text = features.pop(TOOLS)
    features["prompt"] = List({**features["prompt"].feature, TOOLS: text})
    return rows.map(with_tools, features=features, remove_columns=[TOOLS])


def with_tools(row: Row) -> Row:
    """A row of a table with the tools in the first turn of its prompt, and without null fields."""
    turns = {name: without_nulls(row[name]) for name in TURNS if isinstance(row.get(name), list)}
    row = row | turns
    tools = row.pop(TOOLS, None)
    if tools and turns.get("prompt"):
        first, *others = turns["prompt"]
        row["prompt"] = [{**first, TOOLS: tools}, *others]
    return row


def without_tools(row: Row) -> Row:
    """A row as tables store it: the tools of its prompt in a column, as TRL reads them."""
    first, *others = row["prompt"]
    text = {key: value for key, value in first.items() if key != TOOLS}
    return row | {"prompt": [text, *others], TOOLS: first.get(TOOLS)}


def write(rows: Sequence[Row], file: Path) -> None:
    """Write conversational rows that are in memory; their other columns keep their types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if any(TOOLS in row["prompt"][0] for row in rows):
        rows = [without_tools(row) for row in rows]
    pq.write_table(pa.Table.from_pylist(list(rows)), file, compression="zstd")


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

    Turns are stored as lists of ``{role, content}`` with the fields of ``extra_fields``; ``tools``
    is a column. Kept columns have the type of the first row group. A later value of another type
    raises :class:`DataError`. The columns are those of the first row.
    """

    def __init__(self, path: Path, extra_fields: Collection[str] = ()) -> None:
        self._path, self._rows, self._extra_fields = path, list[Row](), extra_fields
        self._turn_fields = {"role", "content", *extra_fields} - {TOOLS}
        self._columns: Collection[str] | None = None
        self._writer: Any = None

    def add(self, row: Row) -> None:
        """Append a row.

        Raises:
            ValueError: The row has a field that the table does not store.
        """
        if TOOLS in self._extra_fields:
            row = without_tools(row)
        self._check_fields(row)
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _check_fields(self, row: Row) -> None:
        """Raise an error for fields that Arrow would drop in silence."""
        if self._columns is None:
            self._columns = row.keys()
        unknown = row.keys() - self._columns
        for name in TURNS:
            turns = row.get(name)
            for turn in turns if isinstance(turns, list) else ():
                unknown |= turn.keys() - self._turn_fields
        if unknown:
            raise ValueError(f"{self._path}: fields without a place: {', '.join(sorted(unknown))}")

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
                schema = _schema(self._rows, self._extra_fields)
                self._writer = pq.ParquetWriter(self._path, schema, compression="zstd")
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._writer.schema))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"keep_columns: the values of a kept column differ in type ({error});"
                " convert them to one type, such as text"
            ) from None
        self._rows = []


def _schema(rows: list[Row], extra_fields: Collection[str]) -> pa.Schema:
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    extra_types = dict.fromkeys(EXTRA_FIELDS, pa.string())
    extra_types |= {"tool_calls": pa.list_(call), UNTRAINED: pa.bool_()}
    names = [name for name in EXTRA_FIELDS if name in extra_fields and name != TOOLS]
    fields = [("role", pa.string()), ("content", pa.string())]
    turns = pa.list_(pa.struct([*fields, *((name, extra_types[name]) for name in names)]))
    types = {"prompt_id": pa.string(), "label": pa.bool_(), TOOLS: pa.string()}
    types |= dict.fromkeys(TURNS, turns)

    def infer_type(name: str) -> pa.DataType:
        inferred = pa.infer_type([row[name] for row in rows])
        return pa.string() if inferred == pa.null() else inferred

    return pa.schema(
        [(name, types[name] if name in types else infer_type(name)) for name in rows[0]]
    )
