"""Seconds of a stage as a sum of parts, and the stopwatch that measures them.

A part has a range, because the length of sampled completions is not known before they are sampled.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST = 4.0
"""Seconds that the next measurement of a backward pass, of twice the size, may take."""
LONGEST_FORWARD = 2.0
"""Seconds that the next measurement of a forward pass may take."""
REPEATED = 0.5
"""Seconds of a measurement below which it is repeated, because the first one includes start-up."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """The expected time of a stage or a part of it, from the shortest to the longest completions.

    >>> Seconds(1.0, 2.0) + Seconds.exactly(3.0) * 2
    Seconds(least=7.0, most=8.0)
    """

    least: float = 0.0
    most: float = 0.0

    @classmethod
    def exactly(cls, seconds: float) -> Seconds:
        """A time that does not depend on the length of completions."""
        return cls(seconds, seconds)

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.least + other.least, self.most + other.most)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.least * factor, self.most * factor)


@dataclass(frozen=True, slots=True)
class StageTime:
    """The expected time of a stage: its parts by name, and what was measured."""

    parts: dict[str, Seconds] = field(default_factory=dict)
    measured: str = ""
    """What the dominant part was measured on, in words."""
    remark: str = ""
    """What the time leaves out, or why it is not known."""
    known: bool = True
    """Whether the stage could be measured."""

    @property
    def total(self) -> Seconds:
        """The sum of the parts."""
        return sum(self.parts.values(), Seconds())


class Stopwatch:
    """Measures calls with a clock; on an accelerator, until its work is finished."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def result(self, call: Callable[[], T]) -> tuple[float, T]:
        """The seconds of one call, and its result."""
        synchronize()
        started = self._clock()
        result = call()
        synchronize()
        return self._clock() - started, result

    def once(self, call: Callable[[], Any]) -> float:
        """The seconds of one call."""
        return self.result(call)[0]

    def settled(self, call: Callable[[], Any]) -> float:
        """The seconds of a call when start-up is over: the least of three short calls.

        A long call is made once on a CPU, where its start-up is a small part of it.
        """
        first = self.once(call)
        if first > REPEATED and not has_accelerator():
            return first
        return min(self.once(call) for _ in range(2))

    def largest(
        self,
        measure: Callable[[int], float],
        most: int,
        *,
        first: int = 1,
        longest: float = LONGEST,
    ) -> tuple[int, float]:
        """Double a size as long as its measurement is short; the last size and its seconds.

        The size never exceeds ``most``, and a measurement is expected to take at most ``longest``
        seconds, unless it is the second: the first one includes start-up and does not count.
        """
        size = min(first, most)
        measure(size)
        while True:
            size = min(2 * size, most)
            seconds = measure(size)
            if size >= most or 2 * seconds > longest:
                return size, seconds


def has_accelerator() -> bool:
    """Whether torch computes on an accelerator, whose calls return before their work is done."""
    import torch

    return bool(torch.accelerator.is_available())


def synchronize() -> None:
    """Wait until the accelerator, if there is one, has finished its work."""
    import torch

    if has_accelerator():
        torch.accelerator.synchronize()


def computed_tokens(rows: Sequence[Sequence[int]], *, shared: bool) -> int:
    """The number of token positions that a batch computes: distinct prefixes, or padded rows.

    >>> computed_tokens([[1, 2, 3], [1, 2, 4, 5]], shared=True)
    5
    >>> computed_tokens([[1, 2, 3], [1, 2, 4, 5]], shared=False)
    8
    """
    if not shared:
        return len(rows) * max(map(len, rows), default=0)
    ordered = sorted(map(list, rows))
    total = sum(map(len, ordered))
    for one, other in itertools.pairwise(ordered):
        equal = (a == b for a, b in zip(one, other, strict=False))
        total -= sum(itertools.takewhile(bool, equal))
    return total
