"""Data files: raw rows from JSONL, JSON, CSV (each also gzipped) and Parquet.

All formats are read row by row, and :mod:`align.data.file_limits` bounds what a file may expand to.
Errors name the file and the line. Not supported: archives, UTF-16, CSV with other separators than
commas.
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
from typing import IO, Any

from align.config.readers import COLUMNS
from align.data.file_limits import (
    MAX_EXPANSION,
    MAX_ROW,
    ExpansionLimit,
    Problems,
    check_row_size,
)
from align.data.json_list import json_limit, json_reason, json_type, read_json_list
from align.data.rows import Raw
from align.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
BATCH = 100  # Parquet rows in memory at once
MAX_RATIO = 50  # of the sizes of a Parquet column without and with compression
ALLOWED_VALUES = 10_000_000  # values that any Parquet file may contain
GZIP_RATIO = 1032  # the highest compression that the format can reach
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}

ByteStream = IO[bytes] | gzip.GzipFile


def read_file(path: Path, *, max_rows: int | None = None) -> Iterator[Raw]:
    """Rows of a file, in the format of its suffix.

    Raises:
        DataError: The suffix is unknown; while iterating, the file is malformed or unreadable.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path}: unknown file format; expected one of {', '.join(SUFFIXES)}")
    return islice(_iter_rows(path), max_rows)


def _iter_rows(path: Path) -> Iterator[Raw]:
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if suffix == "parquet":
            yield from _read_parquet(path)
            return
        with _open(path) as stream:
            if suffix == "jsonl":
                yield from _read_jsonl(path, stream)
            elif suffix == "json":
                yield from read_json_list(path, stream)
            else:
                yield from _read_csv(path, stream)
    except DataError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: a truncated or damaged gzip file; download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or _first_line(error)}") from None


def _open(path: Path) -> ByteStream:
    # The first two bytes decide: after a download, the suffix .gz is often missing or wrong.
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if not is_gzip and path.name.lower().endswith(".gz"):
        raise DataError(f"{path}: not a gzip file; rename it, or download it again")
    if is_gzip:
        _check_stated_size(path)
    stream = gzip.open(path, "rb") if is_gzip else path.open("rb")  # noqa: SIM115 (closed by callers)
    start = stream.peek(256)[:256]
    if start.startswith(UTF_16) or b"\x00" in start:
        stream.close()
        encoding = "UTF-16" if start.startswith(UTF_16) else "UTF-16 or binary"
        raise DataError(f"{path}: {encoding}; save it as UTF-8")
    return stream


def _check_stated_size(path: Path) -> None:
    """Check the size that a gzip file states for its content, before rows are read and counted.

    The last bytes of a truncated file usually state a size that gzip cannot reach.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, n_bytes - 4))
        stated = int.from_bytes(file.read(4), "little")
    if stated <= GZIP_RATIO * n_bytes:
        ExpansionLimit(path).add(stated)


def _read_jsonl(path: Path, stream: ByteStream) -> Iterator[Raw]:
    limit, problems, number = ExpansionLimit(path), Problems(path), 0
    while line := stream.readline(MAX_ROW + 1):
        number += 1
        check_row_size(path, number, len(line))
        limit.add(len(line))
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError as error:
            problems.add(f"{path}:{number}: not UTF-8 at byte {error.start + 1}; save it as UTF-8")
        except json.JSONDecodeError as error:
            problems.add(f"{path}:{number}: not JSON: {json_reason(error)} at column {error.colno}")
        except (RecursionError, ValueError) as error:
            problems.add(f"{path}:{number}: unreadable JSON: {json_limit(error)}")
        else:
            if isinstance(row, dict):
                yield row
            else:
                problems.add(f"{path}:{number}: expected an object, got {json_type(row)}")
    problems.raise_any()


def _read_csv(path: Path, stream: ByteStream) -> Iterator[Raw]:
    csv.field_size_limit(MAX_ROW)  # the default of 128 KiB is shorter than a long transcript
    limit, problems, row_size = ExpansionLimit(path), Problems(path), 0

    def lines(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal row_size
        while line := text.readline(MAX_ROW + 1):
            row_size += len(line)
            check_row_size(path, reader.line_num + 1, row_size)
            limit.add(len(line))
            yield line

    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(lines(text), strict=True)
        try:
            header = next(reader, [])
            _check_header(path, header)
            row_size = 0
            for cells in reader:
                row_size = 0
                if len(cells) == len(header):
                    yield dict(zip(header, cells, strict=True))
                elif cells:
                    problems.add(
                        f"{path}:{reader.line_num}: expected {len(header)} cells, got {len(cells)};"
                        " put text with commas in double quotes"
                    )
        except csv.Error as error:
            problems.add(f"{path}:{reader.line_num}: not CSV: {error}")
        except UnicodeDecodeError:
            problems.add(f"{path}:{_first_line_not_utf8(path)}: not UTF-8; save it as UTF-8")
    problems.raise_any()


def _first_line_not_utf8(path: Path) -> int:
    """The number of the first line that is not UTF-8; a text stream decodes many lines at once."""
    with _open(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _check_header(path: Path, header: list[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}:1: two columns are named `{repeated[0]}`; rename one")
    for column in header:
        if column != column.strip() and column.strip() in COLUMNS:
            raise DataError(
                f"{path}:1: the name of the column `{column}` begins or ends with a space; remove "
                "the spaces beside commas, here and in the rows"
            )
    for separator, name in SEPARATORS.items():
        if "".join(header).count(separator) > len(header) - 1:
            raise DataError(f"{path}:1: its columns are separated by {name}; use commas")


def _read_parquet(path: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    limit, number = ExpansionLimit(path), 0
    try:
        with pq.ParquetFile(path) as file:
            _check_parquet(path, file)
            for batch in file.iter_batches(batch_size=_batch_size(file.metadata)):
                check_row_size(path, number + 1, batch.nbytes // len(batch))
                limit.add(batch.nbytes)
                number += len(batch)
                yield from batch.to_pylist()
    except DataError:
        raise
    except pa.ArrowException as error:
        raise DataError(f"{path}: not Parquet: {_first_line(error)}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: after row {number}: not UTF-8; save its text as UTF-8") from None
    except (ValueError, OverflowError) as error:
        place = f"{path}: after row {number}"
        raise DataError(f"{place}: a value cannot be read: {_first_line(error)}") from None


def _check_parquet(path: Path, file: Any) -> None:
    """Check the names of the columns, and the sizes in the metadata before pages are expanded."""
    names = file.schema_arrow.names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: two columns are named `{repeated[0]}`; rename one")
    ExpansionLimit(path).add(sum(c.total_uncompressed_size for c in _chunks(file.metadata)))
    n_values, n_bytes = sum(c.num_values for c in _chunks(file.metadata)), path.stat().st_size
    if n_values > max(ALLOWED_VALUES, MAX_EXPANSION * n_bytes):
        raise DataError(
            f"{path}: {n_bytes:,} bytes expand to {n_values:,} values, as in a damaged or malicious"
            " file; if it is right, convert it to JSONL"
        )


def _batch_size(metadata: Any) -> int:
    """Rows to expand at once: one if a dictionary may hold a huge value that many rows repeat."""
    unusual = any(
        chunk.total_uncompressed_size > max(MAX_ROW, MAX_RATIO * chunk.total_compressed_size)
        for chunk in _chunks(metadata)
    )
    return 1 if unusual else BATCH


def _chunks(metadata: Any) -> Iterator[Any]:
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            yield metadata.row_group(group).column(column)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
