"""Sources of preferences: the embedded set, a file, a folder or a Hub id in, raw rows out.

A source is read into parts: one for each file, so that an error names its file and line, and so
that a folder may hold pairs in one file and demonstrations in another. What the rows mean is left
to :mod:`align.data.formats`. Left out: archives, and Hub data sets that need code of their own.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from align.errors import UserError, nearest
from align.runtime.hub import hub_is_reachable, is_offline

EMBEDDED = Path(__file__).parents[2] / "data" / "embedded"
EMBEDDED_FILES = ("demonstrations.jsonl.gz", "pairs.jsonl.gz")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
BATCH = 1000  # rows of Parquet and of the Hub in memory at once
HEAD = 100  # rows from which the columns of a part are known
SHOWN = 10  # malformed lines shown; the rest are counted

Raw = dict[str, Any]
ByteStream = IO[bytes] | gzip.GzipFile


@dataclass(frozen=True, slots=True)
class Part:
    """The raw rows of one file, or of one Hub data set: ``rows`` is read once, ``head`` is how it begins."""

    name: str
    head: list[Raw]
    rows: Iterator[Raw]


def begin(name: str, rows: Iterator[Raw]) -> Part:
    """Read the head of a part, from which its columns are known; the rest is read when it is asked for."""
    head = list(islice(rows, HEAD))
    return Part(name, head, chain(head, rows))


def read_source(
    source: str,
    *,
    config: str | None = None,
    data_dir: str | None = None,
    split: str = "train",
    revision: str | None = None,
    max_rows: int | None = None,
) -> list[Part]:
    """Read at most ``max_rows`` rows of each part of a source."""
    files = source_files(source, split=split)
    if files:
        return [read_file(file, max_rows=max_rows) for file in files]
    rows = _read_hub(
        source,
        config=config,
        data_dir=data_dir,
        split=split,
        revision=revision,
        max_rows=max_rows,
    )
    return [begin(source, rows)]


def source_files(source: str, *, split: str = "train") -> list[Path]:
    """List the local files that a source names, in reading order; none if it is a Hub id.

    In a folder the files with the word ``split`` in their names are taken if there are any
    (``train-00000-of-00002.parquet``), else all of them; all where ``split`` is empty.
    """
    if source == "embedded":
        files = [EMBEDDED / name for name in EMBEDDED_FILES]
        gone = [f"{file}: missing from the checkout" for file in files if not file.is_file()]
        if gone:
            raise UserError(*gone)
        return files
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user
        raise UserError(f"{source[:80]!r}: no name of a file or folder: {error}") from None
    if is_folder:
        return _folder_files(path, split)
    if is_file:
        return [path]
    if _is_path(source):
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{source}: no such file or folder{nearest(path.name, siblings, only_near=True)}"
        )
    return []


def read_file(path: Path, *, max_rows: int | None = None) -> Part:
    """Read JSONL, JSON, CSV (each also gzipped) or Parquet, by its suffix. All but a JSON list is read row by row."""
    if not path.name.lower().endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    return begin(str(path), _rows(path, max_rows))


def _rows(path: Path, max_rows: int | None) -> Iterator[Raw]:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if kind == "parquet":
            yield from _read_parquet(path, max_rows)
            return
        with _open(path) as stream:
            if kind == "jsonl":
                yield from _read_jsonl(path, stream, max_rows)
            elif kind == "json":
                yield from _read_json(path, stream)[:max_rows]
            else:
                yield from _read_csv(path, stream, max_rows)
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> ByteStream:
    # a gzip file begins with 1f 8b; the name alone is often wrong after a download
    stream = path.open("rb")
    packed = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    if not packed and path.name.lower().endswith(".gz"):
        stream.close()
        raise UserError(f"{path}: named .gz but not gzipped; rename it or fetch it again")
    if not packed:
        return stream
    stream.close()
    return gzip.open(path, "rb")


def _read_jsonl(path: Path, stream: ByteStream, max_rows: int | None) -> Iterator[Raw]:
    count = 0
    wrong: list[str] = []
    for number, line in enumerate(stream, start=1):
        if max_rows is not None and count >= max_rows:
            break
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError as error:
            wrong.append(f"{path}:{number}: not UTF-8 at byte {error.start}; save it as UTF-8")
        except json.JSONDecodeError as error:
            wrong.append(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
        except (RecursionError, ValueError) as error:
            wrong.append(f"{path}:{number}: not JSON that can be read: {_unreadable(error)}")
        else:
            if isinstance(row, dict):
                count += 1
                yield row
            else:
                wrong.append(f"{path}:{number}: expected an object, got {_kind(row)}")
    _raise_wrong(path, wrong)


def _read_json(path: Path, stream: ByteStream) -> list[Raw]:
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        repair = "; one object a line is JSONL: name it .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}{repair}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not JSON that can be read: {_unreadable(error)}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, got {_kind(rows)}")
    _raise_wrong(
        path,
        [
            f"{path}: row {number}: expected an object, got {_kind(row)}"
            for number, row in enumerate(rows, start=1)
            if not isinstance(row, dict)
        ],
    )
    return rows


def _read_csv(path: Path, stream: ByteStream, max_rows: int | None) -> Iterator[Raw]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long transcript
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        wrong: list[str] = []
        try:
            header = next(reader, [])
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise UserError(f"{path}:1: column `{twice[0]}` is there twice; rename one")
            for cells in islice(reader, max_rows):
                if len(cells) == len(header):
                    yield dict(zip(header, cells, strict=True))
                elif cells:
                    wrong.append(
                        f"{path}:{reader.line_num}: expected {len(header)} cells, got {len(cells)};"
                        " put text with commas in double quotes"
                    )
        except csv.Error as error:
            wrong.append(f"{path}:{reader.line_num}: not CSV: {error}")
        except UnicodeDecodeError:
            wrong.append(f"{path}:{reader.line_num + 1}: not UTF-8; save it as UTF-8")
    _raise_wrong(path, wrong)


def _read_parquet(path: Path, max_rows: int | None) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=min(max_rows or BATCH, BATCH))
            yield from islice((row for batch in batches for row in batch.to_pylist()), max_rows)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not Parquet: {_first_line(error)}") from None


def _read_hub(
    source: str,
    *,
    config: str | None,
    data_dir: str | None,
    split: str,
    revision: str | None,
    max_rows: int | None,
) -> Iterator[Raw]:
    meant = nearest(source, ["embedded"], only_near=True)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"{source!r}: no file, no folder, and no Hub id (owner/name){meant}")
    if not is_offline() and not hub_is_reachable():
        raise UserError(
            f"{source}: no such file or folder, and the Hub cannot be reached to look for it there"
            f"{meant or '; name a local file, or set HF_HUB_OFFLINE=1 to use the cache'}"
        )
    import datasets

    try:
        found = datasets.load_dataset(
            source, config, data_dir=data_dir, split=split, revision=revision
        )
        if max_rows is not None:
            found = found.select(range(min(max_rows, len(found))))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if is_offline():
            why = "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or name a local file"
        else:
            why = f"cannot be loaded from the Hub: {_first_line(error)}"
        raise UserError(f"{source}: no such file or folder, and {why}{meant}") from None
    return (
        row
        for start in range(0, len(found), BATCH)  # memory-mapped: a batch is read when it is due
        for row in found.select(range(start, min(start + BATCH, len(found)))).to_list()
    )


def _folder_files(folder: Path, split: str) -> list[Path]:
    def seen() -> Iterator[Path]:
        for file in sorted(folder.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.is_file() and not hidden:
                yield file

    files = [file for file in seen() if file.name.lower().endswith(SUFFIXES)]
    if not files:
        found = ", ".join(f"`{file.name}`" for file in islice(seen(), 5)) or "nothing"
        raise UserError(f"{folder}: no data files ({', '.join(SUFFIXES)}); found {found}")
    if not split:
        return files
    named = [file for file in files if split.lower() in re.split(r"[^a-z0-9]", file.name.lower())]
    return named or files


def _is_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or source.lower().endswith((*SUFFIXES, ".gz", ".txt", ".tsv", "/"))
    )


def _raise_wrong(path: Path, wrong: list[str]) -> None:
    if wrong:
        more = [f"{path}: and {len(wrong) - SHOWN} more such lines"] if len(wrong) > SHOWN else []
        raise UserError(*wrong[:SHOWN], *more)


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _unreadable(error: Exception) -> str:
    # what is left once it is JSON: Python reads no integer of more than 4,300 digits
    return "nested too deep" if isinstance(error, RecursionError) else "an integer is too long"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
