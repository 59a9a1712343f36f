"""A batch of token rows as the trie of its prefixes, laid out in one sequence.

Rows are sorted lexicographically. A row shares its longest common prefix with the row before it, and only the rest is
new; its *path* is where its tokens lie::

    rows:   p p p c c        packed:  p p p c c | r r r       positions: 0 1 2 3 4 | 3 4 5
            p p p r r r      path(1) = 0 1 2 3 4
                             path(2) = 0 1 2 | 5 6 7          queries of row 2: 5 6 7, keys: path(2)

No tree is built: sorted rows come in the preorder of their trie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """A row that brings new tokens: how many it shares, how many are new, and the segments of its path."""

    shared: int
    new: int
    segments: tuple[int, ...]


@dataclass(slots=True)
class Layout:
    """A batch as one sequence of N distinct prefixes, in the preorder of its trie.

    Token j is seen by token i exactly if ``j <= i <= last[j]``: it is i itself or an ancestor of it.
    """

    tokens: Tensor
    """``[N]``."""
    positions: Tensor
    """``[N]``: how many tokens come before, or the column where positions are absolute."""
    last: Tensor
    """``[N]``: the last token below each in the trie."""
    places: Tensor
    """``[batch * time]``: where each position of the padded batch lies; N for a pad."""
    path: Tensor
    """The paths of ``rows``, one after another."""
    rows: list[Row]
    """Those that bring something new, in packed order."""
    segments: list[int]
    """Sizes of the longest stretches that every row has whole or not at all; they sum to N."""
    readers: int = 0
    """How many layers attended by this layout."""
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is the same in every layer."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def pack(rows: Sequence[Sequence[int]], starts: Sequence[int], *, width: int) -> Layout:
    """Lay out token ids ``rows``, the b-th of which stands at column ``starts[b]`` of a batch ``width`` wide.

    >>> layout = pack([[7, 8, 9], [7, 8, 5, 6]], [0, 0], width=4)
    >>> layout.tokens.tolist(), layout.positions.tolist()
    ([7, 8, 5, 6, 9], [0, 1, 2, 3, 2])
    >>> layout.places.view(2, 4).tolist()
    [[0, 1, 4, 5], [0, 1, 2, 3]]
    >>> layout.rows
    [Row(shared=0, new=4, segments=(0, 1)), Row(shared=2, new=1, segments=(0, 2))]
    """
    return _pack(rows, starts, [0] * len(rows), width)


def _pack(
    rows: Sequence[Sequence[int]], starts: Sequence[int], offsets: Sequence[int], width: int
) -> Layout:
    """``offsets`` are the positions of first tokens: rows with different ones share nothing."""
    tokens: list[int] = []
    positions: list[int] = []
    paths: dict[int, list[int]] = {}
    news: list[tuple[int, int, int]] = []  # row, shared, new
    cuts = {0}
    before: Sequence[int] = ()
    path: list[int] = []
    offset = 0
    for b in sorted(range(len(rows)), key=lambda b: (offsets[b], rows[b])):
        row = rows[b]
        shared = _common(before, row) if offsets[b] == offset else 0
        if shared:
            cuts.add(path[shared - 1] + 1)
        first, end = len(tokens), len(tokens) + len(row) - shared
        cuts.add(end)
        tokens += row[shared:]
        positions += range(offsets[b] + shared, offsets[b] + len(row))
        path = paths[b] = path[:shared] + list(range(first, end))
        if end > first:
            news.append((b, shared, end - first))
        before, offset = row, offsets[b]
    n = len(tokens)
    edges = torch.tensor(sorted(cuts))
    places = torch.full((len(rows), width), n)
    last = torch.zeros(n, dtype=torch.long)
    laid: list[Row] = []
    flat = {b: torch.tensor(paths[b], dtype=torch.long) for b in paths}
    for b, index in flat.items():  # in packed order, so the last row below a token writes last
        places[b, starts[b] : starts[b] + len(index)] = index
        if len(index):
            last[index] = torch.maximum(last[index], index[-1])
    for b, shared, new in news:
        pieces = torch.bucketize(flat[b], edges, right=True).unique_consecutive() - 1
        laid.append(Row(shared, new, tuple(pieces.tolist())))
    return Layout(
        tokens=torch.tensor(tokens, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        last=last,
        places=places.flatten(),
        path=torch.cat([flat[b] for b, _, _ in news]) if news else torch.zeros(0, dtype=torch.long),
        rows=laid,
        segments=edges.diff().tolist(),
    )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def lay_out(ids: Tensor, mask: Tensor | None, *, absolute: bool) -> Layout | None:
    """The layout of a padded batch ``[batch, time]``, on its device; None where its mask has holes.

    Positions count from a row's first token, or, where they are ``absolute``, from the first column.
    """
    width = ids.shape[1]
    listed = ids.tolist()
    if mask is None:
        starts, ends = [0] * len(listed), [width] * len(listed)
    else:
        real = mask.bool().cpu()
        counts = real.sum(1)
        first = real.int().argmax(1)
        if not torch.equal(counts + first, torch.where(counts > 0, _end(real), first)):
            return None
        starts, ends = first.tolist(), (first + counts).tolist()
    rows = [row[a:b] for row, a, b in zip(listed, starts, ends, strict=True)]
    layout = _pack(rows, starts, starts if absolute else [0] * len(rows), width)
    for name in ("tokens", "positions", "last", "places", "path"):
        setattr(layout, name, getattr(layout, name).to(ids.device, non_blocking=True))
    return layout


def _end(real: Tensor) -> Tensor:
    return real.shape[1] - real.flip(1).int().argmax(1)
