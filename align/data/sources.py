"""Sources of preference data: an embedded data set, a file, a folder or a Hub id to raw rows.

A source is read in parts, one per file, so that an error names its file and line, and so that a
folder may contain pairs in one file and demonstrations in another. :mod:`align.data.formats`
interprets the rows. Data sets on the Hub that require remote code are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from align.config.data import MixtureSource
from align.config.shipped import EMBEDDED, data_dir
from align.data.files import SUFFIXES, read_file
from align.data.folders import split_files
from align.data.rows import Raw
from align.errors import DataError, did_you_mean, most_similar
from align.runtime import hub

BATCH = 1000  # rows of a Hub data set in memory at once
HEAD = 100  # rows from which the columns of a part are known


@dataclass(frozen=True, slots=True)
class Part:
    """Raw rows of one file or of one Hub data set.

    ``rows`` can be iterated once and includes ``head``, the first rows.
    """

    name: str
    head: list[Raw]
    rows: Iterator[Raw]


def read_part(name: str, rows: Iterator[Raw]) -> Part:
    """Read the head of a part, from which its columns are known; the other rows are read lazily."""
    head = list(islice(rows, HEAD))
    return Part(name, head, chain(head, rows))


def read_source(source: MixtureSource, *, max_rows: int | None = None) -> list[Part]:
    """Parts of a source, each with at most ``max_rows`` rows.

    Raises:
        DataError: The source does not exist or cannot be read.
    """
    files = source_files(source.source, split=source.data_split)
    if files:
        return [read_part(str(file), read_file(file, max_rows=max_rows)) for file in files]
    return [read_part(source.source, _read_hub(source, max_rows))]


def check_hub_keys(source: MixtureSource) -> None:
    """Check that a local source has no keys that only a Hub data set has.

    Raises:
        DataError: One line for each such key.
    """
    if not source_files(source.source, split=source.data_split):
        return
    keys = [key for key in ("config", "data_dir", "revision") if getattr(source, key) is not None]
    is_folder = source.source not in EMBEDDED and Path(source.source).expanduser().is_dir()
    if source.data_split != "train" and not is_folder:
        keys.append("data_split")
    if keys:
        raise DataError(
            *(
                f"{source.source}: `{key}` has no effect on local data; remove it (on the command "
                f"line: STAGE.{key}=null), and name the file or folder that is read in `source`"
                for key in keys
            )
        )


def source_files(source: str, *, split: str = "train") -> list[Path]:
    """Local files of a source, in reading order; empty for a Hub id.

    In a folder, these are the files of ``split``, or all files if ``split`` is empty.

    Raises:
        DataError: The path does not exist, or the folder contains no data files of the split.
    """
    if source in EMBEDDED:
        return embedded_files(source)
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # name too long, unknown user
        raise DataError(f"{source[:80]!r}: invalid path: {error}") from None
    if is_folder:
        return split_files(path, split)
    if is_file:
        return [path]
    if path.exists():
        raise DataError(f"{source}: neither a regular file nor a folder")
    if _is_path(source):
        siblings = list(path.parent.iterdir()) if path.parent.is_dir() else []
        by_stem = {file.stem: file.name for file in siblings}  # equal endings make no similarity
        name = by_stem.get(path.stem) or by_stem.get(most_similar(path.stem, by_stem) or "")
        suggestion = f"; did you mean `{name}`?" if name else ""
        raise DataError(f"{source}: no such file or folder{suggestion}")
    return []


def embedded_files(source: str) -> list[Path]:
    """Files of a data set that ships with Align.

    Raises:
        DataError: A file is missing from the installation.
    """
    files = [data_dir() / source / name for name in EMBEDDED[source]]
    missing = [
        f"{file}: missing from the installation; install Align again"
        for file in files
        if not file.is_file()
    ]
    if missing:
        raise DataError(*missing)
    return files


def _is_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or source.lower().endswith((*SUFFIXES, ".gz", ".txt", ".tsv", "/"))
    )


def _read_hub(source: MixtureSource, max_rows: int | None) -> Iterator[Raw]:
    name = source.source
    suggestion = did_you_mean(name, EMBEDDED)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"{name!r}: not a file, a folder, or a Hub id (owner/name){suggestion}")
    if not hub.is_offline() and not hub.hub_is_reachable():
        raise DataError(
            f"{name}: no such file or folder, and the Hub cannot be reached"
            f"{suggestion or '; name a local file, or set HF_HUB_OFFLINE=1 to use the cache'}"
        )
    import datasets

    try:
        rows = datasets.load_dataset(
            name,
            source.config,
            data_dir=source.data_dir,
            split=source.data_split,
            revision=source.revision,
        )
        if max_rows is not None:
            rows = rows.select(range(min(max_rows, len(rows))))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if hub.is_offline():
            reason = (
                "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or name a local file"
            )
        else:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            reason = f"cannot be loaded from the Hub: {first_line}"
        raise DataError(f"{name}: no such file or folder, and {reason}{suggestion}") from None
    return (
        row
        for start in range(0, len(rows), BATCH)  # memory-mapped: batches are loaded lazily
        for row in rows.select(range(start, min(start + BATCH, len(rows)))).to_list()
    )
