"""A file of decisions: JSONL in Align's layout of annotations, one line for each decision.

A decision is on disk before :meth:`DecisionFile.append` returns. A line that was cut off, because
the process was killed while it wrote, is removed when the file is opened again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from align.data.annotations import InvalidRowError, from_align
from align.data.file_limits import Problems
from align.data.files import read_file
from align.data.rows import Raw
from align.errors import ArtifactError, DataError
from align.runtime import checksums

SUFFIX = ".jsonl"


class DecisionFile:
    """The decisions in a file, which this process alone may extend."""

    def __init__(self, path: Path) -> None:
        """Open or create a file, and lock it until the process ends.

        Raises:
            UserError: Another process has it open, it cannot be written, or it has other rows.
        """
        if path.suffix != SUFFIX:
            raise DataError(f"{path}: decisions are written as JSONL; name a file *{SUFFIX}")
        if not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {path.parent}; create it first")
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: not a regular file; name another one with --out")
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ArtifactError(
                f"{path}: another `align annotate` writes it; open its page, or name another file "
                "with --out"
            ) from None
        self.n_removed_bytes = _remove_cut_line(path)
        """Length of the line that was cut off."""
        self.rows = _read(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        checksums.flush(path.parent)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row and flush it to the disk.

        Raises:
            OSError: It cannot be written; the file is as before.
        """
        size = os.fstat(self._descriptor).st_size
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self.rows.append(row)

    def close(self) -> None:
        """Close the file; if it has no decision, remove it."""
        os.close(self._descriptor)
        if not self.rows:
            self.path.unlink(missing_ok=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def _remove_cut_line(path: Path) -> int:
    """Remove what follows the last end of a line, unless it is a whole row; its length in bytes."""
    if not path.is_file():
        return 0
    with path.open("r+b") as file:
        text = file.read()
        rest = text.rpartition(b"\n")[2]
        if not rest:
            return 0
        try:
            json.loads(rest)
        except ValueError:
            file.truncate(len(text) - len(rest))
            removed = len(rest)
        else:
            file.write(b"\n")
            removed = 0
        file.flush()
        os.fsync(file.fileno())
    return removed


def _read(path: Path) -> list[Raw]:
    """The rows of a file; each one is checked."""
    if not path.is_file():
        return []
    problems, rows = Problems(path), []
    for number, row in enumerate(read_file(path), 1):
        try:
            list(from_align(row))
        except InvalidRowError as error:
            problems.add(f"{path}: row {number}: {error}")
        rows.append(row)
    problems.raise_any()
    return rows
