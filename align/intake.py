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

from align.readers import Row, opening_id

KEPT, DUPLICATE, CONTRADICTION, NEAR_DUPLICATE, WEIGHED_OUT = range(5)
REASONS = {
    DUPLICATE: "exact duplicate",
    CONTRADICTION: "contradiction",
    NEAR_DUPLICATE: "near-duplicate prompt",
    WEIGHED_OUT: "left out by weight",
}
BATCH = 500  # rows written to the spool at once
EVEN = np.uint64(2**64 - 2)


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
class Table:
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
        self.openings.append(int(opening_id(row["prompt"]), 16))
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


def repeats(keys: Any) -> Any:
    """One verdict a row. ``keys`` are 128 bits a row, the last of them the direction of the preference.

    The first of equal rows is kept. All rows that are there in both directions are dropped: nothing says which is right.
    """
    verdict = np.zeros(len(keys), dtype=np.uint8)
    if not len(keys):
        return verdict
    high, low = keys[:, 0], keys[:, 1] & EVEN
    order = np.lexsort((low, high))  # stable: the first of equals comes first
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    starts = np.flatnonzero(new)
    turned = (keys[:, 1] & np.uint64(1))[order]
    both = np.minimum.reduceat(turned, starts) != np.maximum.reduceat(turned, starts)
    verdict[order[~new]] = DUPLICATE
    verdict[order[both[np.cumsum(new) - 1]]] = CONTRADICTION
    return verdict


def firsts(values: Any) -> Any:
    """Mark the first of equal values, or of equal rows."""
    if values.ndim == 2:
        return repeats(values & np.array([2**64 - 1, 2**64 - 2], dtype=np.uint64)) == KEPT
    marked = np.zeros(len(values), dtype=bool)
    marked[np.unique(values, return_index=True)[1]] = True
    return marked


def pairs_of(values: array[int]) -> Any:
    """An array of two numbers a row."""
    return (
        np.frombuffer(values, dtype=np.uint64).reshape(-1, 2)
        if values
        else np.zeros((0, 2), np.uint64)
    )


def numbers_of(values: array[int]) -> Any:
    """An array of one number a row."""
    return np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, np.uint64)


def weighed(table: Table, weights: Mapping[int, float], seed: int) -> None:
    """Leave out rows so that the sources' shares of what is kept are as ``weights`` say.

    No row is repeated: the source that is shortest for its weight stays whole. A hash of the row and the seed decides,
    so the same rows stay wherever they stand.
    """
    origins = (
        np.frombuffer(table.origins, dtype=np.uint16) if len(table) else np.zeros(0, np.uint16)
    )
    rows = {o: np.flatnonzero((origins == o) & (table.verdict == KEPT)) for o in weights}
    here = {o: weight for o, weight in weights.items() if len(rows[o])}
    if not here:
        return
    scale = min(len(rows[o]) / weight for o, weight in here.items())
    mixed = pairs_of(table.keys)[:, 0] ^ np.uint64(_digest(str(seed))[0])
    mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(31)
    for origin, weight in here.items():
        target = int(scale * weight + 1e-9)
        ordered = rows[origin][np.argsort(mixed[rows[origin]], kind="stable")]
        which = np.zeros(len(table), dtype=bool)
        which[ordered[target:]] = True
        table.drop(which, WEIGHED_OUT)


def _digest(*parts: str) -> tuple[int, int]:
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
