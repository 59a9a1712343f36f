"""Ctrl-C and SIGTERM: an exception, or a request to stop after the current training step.

A second signal raises at once everywhere.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The user or the machine's scheduler stopped the run.

    Not a ``KeyboardInterrupt``: command-line libraries catch that and exit with another code.
    """


class _Stop:
    deferred = False
    requested = False


_stop = _Stop()


def install() -> None:
    """Make both signals raise :class:`Interrupted`. Call it in the main thread."""
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    if _stop.deferred and not _stop.requested:
        _stop.requested = True
        return
    raise Interrupted(signal.Signals(number).name)


def requested() -> bool:
    """Whether a signal arrived during the last :func:`deferred` block and has not been acted on."""
    return _stop.requested


@contextmanager
def deferred() -> Iterator[_Stop]:
    """A first signal within this block only sets ``requested``; the loop in it must check it."""
    _stop.deferred, _stop.requested = True, False
    try:
        yield _stop
    finally:
        _stop.deferred = False
