"""Ctrl-C and SIGTERM: at once in most places, at the end of the running step in a training loop.

A second signal does not wait for anything.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The user, or the machine's scheduler, stopped the run.

    No ``KeyboardInterrupt``: command-line libraries catch that one themselves, and end in another exit code.
    """


class _Stop:
    deferred = False
    requested = False


_stop = _Stop()


def install() -> None:
    """Turn both signals into :class:`Interrupted` (main thread only)."""
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    if _stop.deferred and not _stop.requested:
        _stop.requested = True
        return
    raise Interrupted(signal.Signals(number).name)


def requested() -> bool:
    """Whether a signal came inside the last :func:`deferred` and nobody ended for it yet."""
    return _stop.requested


@contextmanager
def deferred() -> Iterator[_Stop]:
    """Inside, a first signal only sets ``requested``; the loop inside looks at it and ends by itself."""
    _stop.deferred, _stop.requested = True, False
    try:
        yield _stop
    finally:
        _stop.deferred = False
