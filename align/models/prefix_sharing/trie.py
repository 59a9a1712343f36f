"""A batch of token rows as the trie of their prefixes, stored in one packed sequence.

Rows are sorted lexicographically. A row shares its longest common prefix with the row before it,
and only its other tokens are appended to the packed sequence. The *path* of a row lists the packed
indices of its tokens::

    rows:   p p p c c        packed:  p p p c c | r r r       positions: 0 1 2 3 4 | 3 4 5
            p p p r r r      path(1) = 0 1 2 3 4
                             path(2) = 0 1 2 | 5 6 7          queries of row 2: 5 6 7, keys: path(2)

No tree is built: sorted rows are in the preorder of their trie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class Row:
    """A row that adds tokens to the packed sequence."""

    shared: int
    """Number of tokens shared with the row before it."""
    new: int
    """Number of tokens that the row adds."""
    segments: tuple[int, ...]
    """Indices into :attr:`Layout.segments` that form the path of the row."""


@dataclass(slots=True)
class Plan:
    """How attention runs over a packed sequence with one call per row."""

    rows: list[Row]
    """Rows that add tokens, in packed order."""
    segments: list[int]
    """Sizes of the longest runs of tokens that every row contains completely or not at all; they
    sum to the number of tokens."""
    _cache: dict[Any, Any] = field(default_factory=dict)

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, computed once per key, for values that are equal in all layers."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def encode(self) -> Tensor:
        """The plan as a one-dimensional tensor, the form in which a compiled graph receives it.

        >>> Plan([Row(0, 4, (0, 1)), Row(2, 1, (0, 2))], [2, 2, 1]).encode().tolist()
        [3, 2, 2, 1, 0, 4, 2, 0, 1, 2, 1, 2, 0, 2]
        """
        numbers = [len(self.segments), *self.segments]
        for row in self.rows:
            numbers += [row.shared, row.new, len(row.segments), *row.segments]
        return torch.tensor(numbers)

    @classmethod
    def decode(cls, code: Tensor) -> Plan:
        """Undo :meth:`encode`."""
        numbers = iter(code.tolist())
        segments = list(itertools.islice(numbers, next(numbers)))
        rows = [
            Row(shared, next(numbers), tuple(itertools.islice(numbers, next(numbers))))
            for shared in numbers
        ]
        return cls(rows, segments)


@dataclass(slots=True)
class Layout:
    """A batch as one packed sequence of N distinct prefixes, in the preorder of its trie.

    Token i attends to token j exactly if ``j <= i <= last[j]``: j is i itself or an ancestor of it.
    """

    tokens: Tensor
    """Token ids, ``[N]``."""
    positions: Tensor
    """Position ids, ``[N]``: the number of tokens before each, or its column for absolute
    positions."""
    last: Tensor
    """Index of the last descendant of each token in the trie, ``[N]``."""
    places: Tensor
    """Packed index of each position of the padded batch, ``[batch * time]``; N for a pad."""
    path: Tensor
    """Paths of the rows that add tokens, concatenated."""
    ends: Tensor
    """Where the new tokens of each row end and, in the second row, where its path ends, as
    cumulative sums that begin with 0: ``[2, rows + 1]``, int32."""
    longest_new: int
    """Largest number of new tokens of a row."""
    longest: int
    """Length of the longest path."""
    plan: Plan
    code: Tensor
    """The plan as a tensor on the CPU."""
    varlen: Callable[..., Any] | None = None
    """Variable-length attention of a library; None if none provides it."""
    layers_run: int = 0
    """Number of layers that have attended with this layout, compiled ones not counted."""

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device, all in one copy for which the host does not wait."""
        if device.type == "cpu":
            return
        names = ("tokens", "positions", "last", "places", "path", "ends")
        parts = [getattr(self, name) for name in names]
        packed = copy_to_device(torch.cat([part.flatten().long() for part in parts]), device)
        moved = packed.split([part.numel() for part in parts])
        for name, part, tensor in zip(names, parts, moved, strict=True):
            setattr(self, name, tensor.view(part.shape).to(part.dtype))


def build_layout(ids: Tensor, mask: Tensor | None = None, *, absolute: bool) -> Layout | None:
    """Build the layout of a padded batch ``[batch, time]``; None if the mask has holes.

    Batch and layout are on the CPU; :meth:`Layout.to` moves the latter. Positions count from the
    first token of a row or, if they are ``absolute``, from the first column of the batch.

    >>> ids = torch.tensor([[7, 8, 9, 0], [7, 8, 5, 6]])
    >>> layout = build_layout(ids, (ids > 0).int(), absolute=False)
    >>> layout.tokens.tolist(), layout.positions.tolist()
    ([7, 8, 5, 6, 9], [0, 1, 2, 3, 2])
    >>> layout.places.view(2, 4).tolist()
    [[0, 1, 4, 5], [0, 1, 2, 3]]
    >>> layout.plan.rows
    [Row(shared=0, new=4, segments=(0, 1)), Row(shared=2, new=1, segments=(0, 2))]
    """
    width = ids.shape[1]
    padded_rows = ids.tolist()
    if mask is None:
        starts, ends = [0] * len(padded_rows), [width] * len(padded_rows)
    else:
        real = mask.bool()
        counts = real.sum(1)
        first = real.int().argmax(1)
        if not torch.equal(counts + first, torch.where(counts > 0, _end(real), first)):
            return None
        starts, ends = first.tolist(), (first + counts).tolist()
    rows = [row[a:b] for row, a, b in zip(padded_rows, starts, ends, strict=True)]
    return _pack(rows, starts, starts if absolute else [0] * len(rows), width)


def copy_to_host(tensors: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Integer tensors of one shape with their CPU copies; the host waits for the device once."""
    if tensors[0].device.type == "cpu":
        return {tensor: tensor for tensor in tensors}
    copies = torch.stack([tensor.long() for tensor in tensors]).cpu()
    return dict(zip(tensors, copies, strict=True))


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _end(real: Tensor) -> Tensor:
    """Column after the last True of each row."""
    return real.shape[1] - real.flip(1).int().argmax(1)


def _pack(
    rows: Sequence[Sequence[int]], starts: Sequence[int], offsets: Sequence[int], width: int
) -> Layout:
    """Pack token rows; row b starts at column ``starts[b]`` of a batch with ``width`` columns.

    ``offsets`` are the positions of the first tokens. Rows with different offsets share nothing.
    """
    tokens: list[int] = []
    positions: list[int] = []
    paths: dict[int, list[int]] = {}
    additions: list[tuple[int, int, int]] = []  # row, shared, new
    cuts = {0}
    previous: Sequence[int] = ()
    path: list[int] = []
    offset = 0
    for b in sorted(range(len(rows)), key=lambda b: (offsets[b], rows[b])):
        row = rows[b]
        shared = _common_prefix(previous, row) if offsets[b] == offset else 0
        if shared:
            cuts.add(path[shared - 1] + 1)
        first, end = len(tokens), len(tokens) + len(row) - shared
        cuts.add(end)
        tokens += row[shared:]
        positions += range(offsets[b] + shared, offsets[b] + len(row))
        path = paths[b] = path[:shared] + list(range(first, end))
        if end > first:
            additions.append((b, shared, end - first))
        previous, offset = row, offsets[b]
    n = len(tokens)
    edges = torch.tensor(sorted(cuts))
    places = torch.full((len(rows), width), n)
    last = torch.zeros(n, dtype=torch.long)
    path_tensors = {b: torch.tensor(paths[b], dtype=torch.long) for b in paths}
    for b, index in path_tensors.items():
        places[b, starts[b] : starts[b] + len(index)] = index
        if len(index):
            last[index] = torch.maximum(last[index], index[-1])
    packed_rows: list[Row] = []
    for b, shared, new in additions:
        segments = torch.bucketize(path_tensors[b], edges, right=True).unique_consecutive() - 1
        packed_rows.append(Row(shared, new, tuple(segments.tolist())))
    plan = Plan(packed_rows, edges.diff().tolist())
    added = [row.new for row in packed_rows]
    lengths = [row.shared + row.new for row in packed_rows]
    return Layout(
        tokens=torch.tensor(tokens, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        last=last,
        places=places.flatten(),
        path=torch.cat([path_tensors[b] for b, _, _ in additions])
        if additions
        else torch.zeros(0, dtype=torch.long),
        ends=pad(torch.tensor([added, lengths]).cumsum(1), (1, 0)).int(),
        longest_new=max(added, default=0),
        longest=max(lengths, default=0),
        plan=plan,
        code=plan.encode(),
    )


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
