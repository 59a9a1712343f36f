"""Limits of data files: the size of a row, the expansion of a compressed file, listed errors."""

from __future__ import annotations

from pathlib import Path

from align.errors import DataError

MAX_ROW = 16 * 2**20  # bytes of a row
MAX_EXPANSION = 200  # times the size of a compressed file; text compresses 3 to 20 times
ALWAYS_ALLOWED = 256 * 2**20  # bytes that any file may expand to
MAX_PROBLEMS = 10  # malformed lines listed; the others are counted


class ExpansionLimit:
    """Limit of the total size of the rows of a file, relative to its size on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._total = path, path.stat().st_size, 0
        self._limit = max(ALWAYS_ALLOWED, MAX_EXPANSION * self._size)

    def add(self, n_bytes: int) -> None:
        """Count bytes that were read.

        Raises:
            DataError: The total exceeds the limit.
        """
        self._total += n_bytes
        if self._total > self._limit:
            raise DataError(
                f"{self._path}: {self._size:,} bytes expand to more than"
                f" {self._total / 2**20:,.0f} MiB, as in a damaged or malicious file; if it is"
                " right, convert it to JSONL without compression"
            )


def check_row_size(path: Path, line: int, n_bytes: int) -> None:
    """Check the size of the row at a line.

    Raises:
        DataError: It exceeds ``MAX_ROW``.
    """
    if n_bytes > MAX_ROW:
        size = f"a row of more than {MAX_ROW // 2**20} MiB"
        raise DataError(f"{path}:{line}: {size}; remove or shorten it")


class Problems:
    """Malformed lines of a file: the first ten are listed, the others counted."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        """Add the message for a line."""
        self._count += 1
        if self._count <= MAX_PROBLEMS:
            self._lines.append(line)

    def raise_any(self) -> None:
        """Raise an error with all messages.

        Raises:
            DataError: There is at least one.
        """
        n_more = self._count - MAX_PROBLEMS
        more = [f"{self._path}: and {n_more} more such lines"] if n_more > 0 else []
        if self._lines:
            raise DataError(*self._lines, *more)
