"""Rows divided into batches by their number of tokens instead of their number of rows.

With prefix sharing the tokens of a batch are its distinct prefixes, which are what a forward pass
computes; without it they are the positions of the padded batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

Item = Sequence[Sequence[int]]
"""The token rows that are in one batch: a row, or the rows of a pair."""


def divide(items: Sequence[Item], *, tokens: int, prefix_sharing: bool) -> list[list[int]]:
    """Divide items into batches of at most ``tokens`` tokens, in their order, as lists of indices.

    An item that has more forms a batch alone.

    >>> rows = [[[1, 2, 3]], [[1, 2, 4]], [[5, 6, 7]]]
    >>> divide(rows, tokens=4, prefix_sharing=True)
    [[0, 1], [2]]
    >>> divide(rows, tokens=4, prefix_sharing=False)
    [[0], [1], [2]]
    """
    count = _distinct if prefix_sharing else _padded
    batches: list[list[int]] = []
    for index, size in count(items, tokens):
        if size == 0:  # the item begins a batch
            batches.append([])
        batches[-1].append(index)
    return batches


def _distinct(items: Sequence[Item], most: int) -> Iterator[tuple[int, int]]:
    """Each index with the number of items before it in its batch; tokens are distinct prefixes."""
    seen: set[int] = set()
    size = 0
    for index, item in enumerate(items):
        # A prefix is identified by a 64-bit hash of its tokens; integers have the same hash in
        # every process.
        prefixes = {
            prefix
            for row in item
            for prefix in itertools.accumulate(row, lambda prefix, token: hash((prefix, token)))
        }
        if size and len(seen) + len(prefixes - seen) > most:
            seen, size = set(), 0
        seen |= prefixes
        yield index, size
        size += 1


def _padded(items: Sequence[Item], most: int) -> Iterator[tuple[int, int]]:
    """The same; tokens are the positions of a batch whose rows are padded to the longest."""
    longest = rows = size = 0
    for index, item in enumerate(items):
        longer = max(longest, *map(len, item))
        if size and longer * (rows + len(item)) > most:
            longer, rows, size = max(map(len, item)), 0, 0
        longest, rows = longer, rows + len(item)
        yield index, size
        size += 1
