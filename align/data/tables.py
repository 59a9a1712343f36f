"""data.tables"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.rows import Row
from align.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def read_prompts(data: Path, split: str) -> list[Row]:
    import pyarrow.parquet as pq

    file = data / f"prompts-{split}.parquet"
    if not file.is_file():
        raise UserError(f"{data}: no {file.name}; set `{split}_fraction` of its `prepare` stage")
    found: list[Row] = pq.read_table(file).to_pylist()
    return found


ROW_GROUP = 2_000  # rows of a table in memory at once


class TableWriter:
    """Writes conversational rows as Parquet, a group at a time; turns are lists of ``{role, content}``.

    Columns that were kept get the type of the first group; a later value that does not fit is the user's to mend.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, list[Row]()
        self._writer: Any = None

    def add(self, row: Row) -> None:
        """Put a row at the end."""
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the end of the file."""
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
            raise UserError(
                f"keep: a kept column does not hold one type in all rows ({error}); make it one, such as text"
            ) from None
        self._rows = []


def _schema(rows: list[Row]) -> Any:
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    plain = {"prompt_id": pa.string(), "label": pa.bool_()}
    known = plain | dict.fromkeys(("prompt", "chosen", "rejected", "completion"), turns)

    def kept(name: str) -> Any:
        found = pa.infer_type([row[name] for row in rows])
        return pa.string() if found == pa.null() else found

    return pa.schema([(name, known[name] if name in known else kept(name)) for name in rows[0]])


def read_rows(data: Path, table: str, *, most: int | None = None) -> list[dict[str, Any]]:
    """Rows of a prepared table; ``most`` of them, evenly spaced."""
    import pyarrow.parquet as pq

    found = pq.read_table(data / f"{table}.parquet")
    if most is not None and len(found) > most:
        found = found.take([k * len(found) // most for k in range(most)])
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows


def load_dataset(data: Path, kind: str, split: str, folder: Path) -> Dataset | None:
    """One prepared file, such as ``pairs-train.parquet``; None where the split was not asked for.

    Its cache lies below the stage's folder: every process finds the same, and it goes when the stage is complete.
    """
    from datasets import Dataset

    file = data / f"{kind}-{split}.parquet"
    if not file.is_file():
        if split == "train":
            raise UserError(
                f"{data}: no {file.name}; the source of this `prepare` stage had no {kind}"
            )
        return None
    return Dataset.from_parquet(str(file), cache_dir=str(folder / ".cache"))
