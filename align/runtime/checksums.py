"""Checksums of files, sealed JSON objects and flushing: how damage is recognized or prevented.

A sealed object contains a checksum of itself. Left out: protection against deliberate changes,
because whoever changes a file can also change the checksum.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.errors import ArtifactError

CHECKSUM = "checksum"
"""Key of the checksum in a sealed object."""
FileRecords = Mapping[str, Mapping[str, Any]]
"""Size in ``bytes`` and ``sha256`` of files, by their paths relative to a folder."""


def digest_file(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_once(file: Path) -> str:
    """:func:`digest_file`, computed once per process: several stages may read the same input.

    A file of another inode, size or time of change is read again.
    """
    status = file.stat()
    state = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return _cached_digest(file, *state)


@functools.cache
def _cached_digest(file: Path, *_state: int) -> str:
    return digest_file(file)


def record_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Flush files below a folder to the disk; return the size and the SHA-256 of each.

    The folders that contain them are flushed as well, so that a later power cut loses none of them.
    """
    records = {}
    folders = {folder}
    for file in sorted(files):
        flush(file)
        folders.add(file.parent)
        name = file.relative_to(folder).as_posix()
        records[name] = {"bytes": file.stat().st_size, "sha256": digest_file(file)}
    for each in folders:
        flush(each)
    return records


def size_problems(folder: Path, records: FileRecords) -> list[str]:
    """One line for each file that is missing or has another size than recorded."""
    lines = []
    for name, record in records.items():
        size = _size(folder / name)
        if size is None:
            lines.append(f"{folder / name}: missing, or not a file")
        elif size != record["bytes"]:
            lines.append(f"{folder / name}: {size:,} bytes, expected {record['bytes']:,}")
    return lines


def content_problems(folder: Path, records: FileRecords) -> list[str]:
    """One line for each file that differs from its record in size or content."""
    lines = size_problems(folder, records)
    if lines:
        return lines
    for name, record in records.items():
        try:
            if digest_once(folder / name) != record["sha256"]:
                lines.append(f"{folder / name}: its content differs from its checksum")
        except OSError as error:
            lines.append(f"{folder / name}: cannot be read: {error.strerror}")
    return lines


def _size(file: Path) -> int | None:
    """The size of a regular file; None for anything else."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with a checksum of itself."""
    return {**data, CHECKSUM: _checksum(data)}


def read_sealed(file: Path) -> dict[str, Any]:
    """The content of a JSON file that :func:`seal` made, without its checksum.

    Raises:
        FileNotFoundError: The file does not exist.
        ArtifactError: It cannot be read, contains no JSON object or differs from its checksum.
    """
    try:
        is_file = stat.S_ISREG(file.stat().st_mode)
        data = json.loads(file.read_text(encoding="utf-8")) if is_file else None
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(file) from None
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ArtifactError(f"{file}: damaged, not a JSON file") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{file}: damaged, not a JSON object")
    checksum = data.pop(CHECKSUM, None)
    if checksum is None:
        raise ArtifactError(f"{file}: has no checksum: damaged, or of an earlier version of Align")
    if checksum != _checksum(data):
        raise ArtifactError(f"{file}: damaged: its content differs from its checksum")
    return data


def _checksum(data: object) -> str:
    """SHA-256 of data as JSON reads it back: with text as keys and lists for tuples."""
    canonical = json.dumps(json.loads(json.dumps(data)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
