"""Deduplication: exact duplicates, contradictions, and near-duplicate prompts.

Near-duplicates are detected by MinHash (Broder 1997). A prompt is the set of its character 5-grams.
128 hashes per prompt estimate the Jaccard similarity with a standard deviation of up to 0.044
(0.035 at a similarity of 0.8, where one estimate in twenty is off by more than 0.07); 32 bands of
four hashes select the candidate pairs. The peak is 950 bytes per distinct prompt, whatever its
length.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.config.data import Prepare
from align.data.row_store import (
    CONTRADICTION,
    DUPLICATE,
    KEPT,
    NEAR_DUPLICATE,
    RowTable,
    as_digests,
    as_numbers,
)

GRAM, HASHES, BAND = 5, 128, 4
NEIGHBORS = 8  # each prompt of a bucket is compared with the next 8: linear cost, not quadratic
EVEN = np.uint64(2**64 - 2)  # clears the last bit, the direction of the preference


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Prompts that are nearly equal to an earlier prompt.

    ``representatives`` maps the id of a conversation to that of the conversation that decides its
    split.
    """

    prompt_ids: set[int] = field(default_factory=set)
    representatives: dict[int, int] = field(default_factory=dict)


def deduplicate(
    tables: Sequence[RowTable], index: MinHashIndex | None, config: Prepare
) -> NearDuplicates:
    """Set the status of all rows; near-duplicates are searched for if ``index`` is given.

    Only prompts with a kept row are compared, and with ``near_duplicates: drop`` the later ones are
    dropped.
    """
    for table in tables:
        table.status = find_duplicates(as_digests(table.row_digests))
    if index is None:
        return NearDuplicates()
    kept = [as_numbers(table.prompt_ids)[table.kept] for table in tables]
    near = index.find_near_duplicates(
        config.near_duplicate_threshold, np.unique(np.concatenate(kept))
    )
    if config.near_duplicates == "drop":
        dropped = np.fromiter(near.prompt_ids, dtype=np.uint64, count=len(near.prompt_ids))
        for table in tables:
            table.drop(np.isin(as_numbers(table.prompt_ids), dropped), NEAR_DUPLICATE)
    return near


def find_duplicates(digests: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Status of each row: ``KEPT``, ``DUPLICATE`` or ``CONTRADICTION``.

    ``digests`` has shape (rows, 2); the last bit is the direction of the preference. Of equal rows
    the first is kept. Rows that occur in both directions are all dropped, because nothing decides
    which direction is right.
    """
    status = np.full(len(digests), KEPT, dtype=np.uint8)
    if not len(digests):
        return status
    high, low = digests[:, 0], digests[:, 1] & EVEN
    order = np.lexsort((low, high))  # stable: of equal rows the first comes first
    new = np.ones(len(digests), dtype=bool)
    new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    starts = np.flatnonzero(new)
    directions = (digests[:, 1] & np.uint64(1))[order]
    both = np.minimum.reduceat(directions, starts) != np.maximum.reduceat(directions, starts)
    status[order[~new]] = DUPLICATE
    status[order[both[np.cumsum(new) - 1]]] = CONTRADICTION
    return status


def first_occurrences(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mask of the first of equal values, or of equal digests of shape (rows, 2)."""
    if values.ndim == 2:
        undirected = values & np.array([2**64 - 1, 2**64 - 2], dtype=np.uint64)
        return find_duplicates(undirected) == KEPT
    mask = np.zeros(len(values), dtype=bool)
    mask[np.unique(values, return_index=True)[1]] = True
    return mask


class MinHashIndex:
    """MinHash signatures of distinct prompts, in the order in which they were added."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._a = random.integers(1, 2**63, HASHES, dtype=np.uint64) | np.uint64(1)
        self._b = random.integers(0, 2**63, HASHES, dtype=np.uint64)
        self._powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, GRAM + 1, dtype=np.uint64)
        self._seen: set[int] = set()
        self._prompt_ids, self._conversation_ids = array("Q"), array("Q")
        self._signatures = array("I")

    def add(self, prompt_id: int, conversation_id: int, text: str) -> None:
        """Add a prompt, unless its id was added before. ``text`` is normalized."""
        if prompt_id in self._seen:
            return
        self._seen.add(prompt_id)
        points = np.frombuffer(text.ljust(GRAM).encode("utf-32-le"), dtype=np.uint32)
        grams = np.lib.stride_tricks.sliding_window_view(points.astype(np.uint64), GRAM)
        hashed = np.unique(((grams + np.uint64(1)) * self._powers).sum(axis=1))
        hashed ^= hashed >> np.uint64(29)
        least = ((hashed[:, None] * self._a + self._b) >> np.uint64(32)).min(axis=0)
        self._prompt_ids.append(prompt_id)
        self._conversation_ids.append(conversation_id)
        self._signatures.frombytes(least.astype(np.uint32).tobytes())

    def find_near_duplicates(
        self, threshold: float, prompt_ids: NDArray[np.uint64]
    ) -> NearDuplicates:
        """Near-duplicates among ``prompt_ids``; all other prompts are ignored.

        The first of near-duplicate prompts represents the others, and prompts of one conversation
        belong together.
        """
        places = np.flatnonzero(np.isin(as_numbers(self._prompt_ids), prompt_ids))
        ids = as_numbers(self._prompt_ids)[places]
        conversations = as_numbers(self._conversation_ids)[places].tolist()
        signatures = np.frombuffer(self._signatures, dtype=np.uint32).reshape(-1, HASHES)
        groups = _DisjointSets(len(places))
        later: set[int] = set()
        for first in range(0, HASHES, BAND):
            band = np.ascontiguousarray(signatures[places, first : first + BAND])
            for i, j in _same_bucket(band):
                if (signatures[places[i]] == signatures[places[j]]).mean() >= threshold:
                    groups.join(i, j)
                    later.add(int(ids[max(i, j)]))
        begins: dict[int, int] = {}
        for i, conversation in enumerate(conversations):
            groups.join(i, begins.setdefault(conversation, i))
        representatives = {c: conversations[groups.root(i)] for i, c in enumerate(conversations)}
        return NearDuplicates(later, representatives)


def _same_bucket(band: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Pairs of rows with equal hashes in a band, each row with up to ``NEIGHBORS`` later ones."""
    count = len(band)
    keys: Any = band.view("V16").ravel() if count else band
    _, bucket = np.unique(keys, return_inverse=True)
    order = np.argsort(bucket, kind="stable")
    for shift in range(1, min(NEIGHBORS, count - 1) + 1):
        one, other = order[:-shift], order[shift:]
        same = bucket[one] == bucket[other]
        yield from zip(one[same].tolist(), other[same].tolist(), strict=True)


class _DisjointSets:
    """Union-find; the smallest member is the root of its set."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, i: int) -> int:
        parents = self._parents
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    def join(self, i: int, j: int) -> None:
        one, other = self.root(i), self.root(j)
        self._parents[max(one, other)] = min(one, other)
