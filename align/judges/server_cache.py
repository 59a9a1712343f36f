"""Answers of a judge on disk, so that no question is sent twice.

One file of JSON lines for all evaluations below a folder of runs. Lines are only appended, each
with a checksum, under a lock; several processes may share the file. A damaged line is skipped, so
its question is sent again. The file has neither keys nor addresses of servers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.errors import ArtifactError
from align.runtime.progress import LOGGER


@dataclass(frozen=True, slots=True)
class StoredVerdict:
    """One answer of a judge, as it is stored."""

    preference: float | None
    """None: the answer was no usable verdict."""
    reason: str
    input_tokens: int
    output_tokens: int


class VerdictCache:
    """The verdicts in a file, by the keys of their questions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verdicts: dict[str, StoredVerdict] = {}
        self._read_to = 0
        self._damaged = 0

    def read(self) -> dict[str, StoredVerdict]:
        """All verdicts in the file, also those that other processes have added since.

        Raises:
            ArtifactError: The file cannot be read.
        """
        try:
            if not os.path.lexists(self.path):
                return self._verdicts
            if not self.path.is_file():  # opening a pipe would wait for ever
                raise OSError("not a file")
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                for line in file:
                    if not line.endswith(b"\n"):  # another process is writing it, or was killed
                        break
                    self._read_to += len(line)
                    self._add(line)
        except OSError as error:
            raise self._unusable(error) from None
        if self._damaged:
            one = self._damaged == 1
            LOGGER.warning(
                "%s: %s skipped; %s requested again",
                self.path,
                "1 damaged line is" if one else f"{self._damaged} damaged lines are",
                "its verdict is" if one else "their verdicts are",
            )
            self._damaged = 0
        return self._verdicts

    def write(self, key: str, verdict: StoredVerdict) -> None:
        """Append a verdict.

        Raises:
            ArtifactError: The file cannot be written.
        """
        self._verdicts[key] = verdict
        content = {"key": key, **asdict(verdict)}
        line = json.dumps(content | {"checksum": _checksum(content)}).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when it is closed
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a killed process left an incomplete line
                if os.write(descriptor, line) < len(line):
                    raise OSError("the disk is full")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unusable(error) from None

    def _add(self, line: bytes) -> None:
        """Keep the verdict of a line, if it is intact."""
        try:
            content = json.loads(line)
            checksum = content.pop("checksum")
            key = content.pop("key")
            verdict = StoredVerdict(**content)
            intact = _checksum({"key": key, **asdict(verdict)}) == checksum
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            intact = False
        if intact:
            self._verdicts[key] = verdict
        else:
            self._damaged += bool(line.strip())

    def _unusable(self, error: OSError) -> ArtifactError:
        reason = error.strerror or str(error)
        return ArtifactError(f"{self.path}: cannot be used ({reason}); move it away, or free space")


def question_key(question: dict[str, Any]) -> str:
    """The key of a question: the digest of all that its answer depends on."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def stored_preference(preference: float) -> float | None:
    """A preference as JSON has it, which knows no NaN."""
    return None if math.isnan(preference) else preference


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
