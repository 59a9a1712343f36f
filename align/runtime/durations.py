"""Durations in words, as progress, reports, plans and lists of runs show them."""

from __future__ import annotations

MINUTE, HOUR, DAY = 60, 3600, 24 * 3600  # seconds


def duration(seconds: float) -> str:
    """A duration in the largest unit of which it has at least two, at most days.

    >>> [duration(seconds) for seconds in (0.4, 95, 1500, 9000, 400_000)]
    ['0.4 s', '95 s', '25 min', '2.5 h', '5 d']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.0f} d"
