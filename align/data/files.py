"""Data files: raw rows from JSONL, JSON, CSV (each also gzipped) and Parquet.

All formats except a JSON list are read row by row. Errors name the file and the line; the first ten
malformed lines are listed, the others counted. Archives are not supported.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

from align.data.rows import Raw
from align.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
BATCH = 1000  # Parquet rows in memory at once
MAX_PROBLEMS = 10  # malformed lines listed; the others are counted

ByteStream = IO[bytes] | gzip.GzipFile


def read_file(path: Path, *, max_rows: int | None = None) -> Iterator[Raw]:
    """Rows of a file, in the format of its suffix.

    Raises:
        DataError: The suffix is unknown; while iterating, the file is malformed or unreadable.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path}: unknown file format; expected one of {', '.join(SUFFIXES)}")
    return _iter_rows(path, max_rows)


def _iter_rows(path: Path, max_rows: int | None) -> Iterator[Raw]:
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if suffix == "parquet":
            yield from _read_parquet(path, max_rows)
            return
        with _open(path) as stream:
            if suffix == "jsonl":
                yield from _read_jsonl(path, stream, max_rows)
            elif suffix == "json":
                yield from _read_json(path, stream)[:max_rows]
            else:
                yield from _read_csv(path, stream, max_rows)
    except DataError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated gzip file ({error}); download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> ByteStream:
    # The first two bytes decide: after a download, the suffix .gz is often missing or wrong.
    stream = path.open("rb")
    is_gzip = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    if not is_gzip and path.name.lower().endswith(".gz"):
        stream.close()
        raise DataError(f"{path}: not a gzip file; rename it, or download it again")
    if not is_gzip:
        return stream
    stream.close()
    return gzip.open(path, "rb")


def _read_jsonl(path: Path, stream: ByteStream, max_rows: int | None) -> Iterator[Raw]:
    count = 0
    problems: list[str] = []
    for number, line in enumerate(stream, start=1):
        if max_rows is not None and count >= max_rows:
            break
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError as error:
            problems.append(f"{path}:{number}: not UTF-8 at byte {error.start}; save it as UTF-8")
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
        except (RecursionError, ValueError) as error:
            problems.append(f"{path}:{number}: unreadable JSON: {_json_limit(error)}")
        else:
            if isinstance(row, dict):
                count += 1
                yield row
            else:
                problems.append(f"{path}:{number}: expected an object, got {_json_type(row)}")
    _raise_problems(path, problems)


def _read_json(path: Path, stream: ByteStream) -> list[Raw]:
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        repair = (
            "; a file with one object per line is JSONL: name it .jsonl"
            if error.msg == "Extra data"
            else ""
        )
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}{repair}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: unreadable JSON: {_json_limit(error)}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, got {_json_type(rows)}")
    _raise_problems(
        path,
        [
            f"{path}: row {number}: expected an object, got {_json_type(row)}"
            for number, row in enumerate(rows, start=1)
            if not isinstance(row, dict)
        ],
    )
    return rows


def _read_csv(path: Path, stream: ByteStream, max_rows: int | None) -> Iterator[Raw]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long transcript
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        problems: list[str] = []
        try:
            header = next(reader, [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise DataError(f"{path}:1: two columns are named `{repeated[0]}`; rename one")
            for cells in islice(reader, max_rows):
                if len(cells) == len(header):
                    yield dict(zip(header, cells, strict=True))
                elif cells:
                    problems.append(
                        f"{path}:{reader.line_num}: expected {len(header)} cells, got {len(cells)};"
                        " put text with commas in double quotes"
                    )
        except csv.Error as error:
            problems.append(f"{path}:{reader.line_num}: not CSV: {error}")
        except UnicodeDecodeError:
            problems.append(f"{path}:{reader.line_num + 1}: not UTF-8; save it as UTF-8")
    _raise_problems(path, problems)


def _read_parquet(path: Path, max_rows: int | None) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=min(max_rows or BATCH, BATCH))
            yield from islice((row for batch in batches for row in batch.to_pylist()), max_rows)
    except pa.ArrowException as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not Parquet: {first_line}") from None


def _raise_problems(path: Path, problems: list[str]) -> None:
    if problems:
        n_more = len(problems) - MAX_PROBLEMS
        more = [f"{path}: and {n_more} more such lines"] if n_more > 0 else []
        raise DataError(*problems[:MAX_PROBLEMS], *more)


def _json_type(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _json_limit(error: Exception) -> str:
    # Valid JSON that Python does not read: deep nesting, or an integer of more than 4,300 digits.
    return "nested too deep" if isinstance(error, RecursionError) else "an integer is too long"
