"""Intake: raw rows of many sources in, checked rows on disk, and a few numbers a row in memory.

Rows wait in a spool, a temporary file, until it is known which of them repeat or contradict another. In memory stay 58
bytes a row, whatever its text: a digest of the row (16), of its completion (16), of its prompt and of its opening (8
each), its margin (8) and its source (2). What is found in them is found by sorting, which takes about as much again.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.data.deduplication import KEPT, REASONS, pairs_of, repeats
from align.data.rows import Row, conversation_id

BATCH = 500  # rows written to the spool at once


class Spool:
    """Rows on disk, read back in the order in which they came."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the spool)
        weakref.finalize(self, self._file.close)
        self._batch: list[Any] = []

    def add(self, row: Any) -> None:
        """Put a row at the end."""
        self._batch.append(row)
        if len(self._batch) == BATCH:
            self._flush()

    def __iter__(self) -> Iterator[Any]:
        self._flush()
        self._file.seek(0)
        while True:
            try:
                batch = pickle.load(self._file)
            except EOFError:
                return
            yield from batch

    def _flush(self) -> None:
        if self._batch:
            self._file.seek(0, 2)
            pickle.dump(self._batch, self._file, pickle.HIGHEST_PROTOCOL)
            self._batch = []


@dataclass
class RowTable:
    """Rows of one kind: the rows on disk, and what is known of each in memory. ``verdict`` is made once all are in."""

    kind: str
    read: Counter[int] = field(default_factory=Counter)
    dropped: Counter[tuple[int, str]] = field(default_factory=Counter)
    spool: Spool = field(default_factory=Spool)
    keys: array[int] = field(default_factory=lambda: array("Q"))
    said: array[int] = field(default_factory=lambda: array("Q"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    openings: array[int] = field(default_factory=lambda: array("Q"))
    margins: array[float] = field(default_factory=lambda: array("d"))
    origins: array[int] = field(default_factory=lambda: array("H"))
    verdict: Any = None

    def add(self, row: Row, origin: int, kept: Mapping[str, Any], margin: float | None) -> None:
        """Take a checked row of the source number ``origin``, with the columns that are to come along."""
        prompt = row["prompt_id"]
        if "chosen" in row:
            sides = row["chosen"][0]["content"], row["rejected"][0]["content"]
            said, turned = sides[0], sides[0] > sides[1]
            high, low = _digest(prompt, *sorted(sides))
        else:
            said, turned = row["completion"][0]["content"], bool(row.get("label", False))
            high, low = _digest(prompt, said)
        self.keys.extend((high, low - low % 2 + turned))  # the last bit is the direction
        self.said.extend(_digest(prompt, said))
        self.prompts.append(int(prompt, 16))
        self.openings.append(int(conversation_id(row["prompt"]), 16))
        self.margins.append(float("nan") if margin is None else margin)
        self.origins.append(origin)
        self.spool.add((row, dict(kept)))

    def __len__(self) -> int:
        return len(self.prompts)

    def judge(self) -> None:
        """Find exact duplicates and contradictions."""
        self.verdict = repeats(pairs_of(self.keys))

    def drop(self, which: Any, verdict: int) -> None:
        """Drop those of the rows kept so far that ``which`` marks."""
        self.verdict[which & (self.verdict == KEPT)] = verdict

    def all_dropped(self, origin: int | None = None) -> Counter[str]:
        """Reasons and counts, of one source or of all."""
        found: Counter[str] = Counter()
        for (place, reason), count in self.dropped.items():
            if origin in (None, place):
                found[reason] += count
        mine = np.frombuffer(self.origins, dtype=np.uint16) if len(self) else np.zeros(0)
        for verdict, reason in REASONS.items():
            which = self.verdict == verdict
            count = int((which if origin is None else which & (mine == origin)).sum())
            if count:
                found[reason] += count
        return found


def _digest(*parts: str) -> tuple[int, int]:
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
