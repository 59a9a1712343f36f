"""Ctrl-C, SIGTERM and SIGHUP: an exception, or a request to stop after the current training step.

One request often arrives several times: a terminal, ``timeout`` or a scheduler signals the whole
process group, and the launcher passes its own signal on. Repeated signals are therefore ignored.
Only another Ctrl-C, :data:`REPEAT_SECONDS` or more after the last one, stops the run at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

EXIT_CODE = 130
REPEAT_SECONDS = 2.0
"""Within this time, another Ctrl-C is a copy of the last one."""
_LAUNCHERS = {"accelerate", "accelerate.commands.launch", "align", "align.cli.main", "torchrun"}
_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_exit_process = os._exit
"""The function itself: while code of a recipe runs, the name in ``os`` refuses to exit."""


class Interrupted(BaseException):
    """The user or the machine's scheduler stopped the run.

    Not a ``KeyboardInterrupt``: command-line libraries catch that and exit with another code.
    """


@dataclass
class _Stop:
    """State of this process: whether a signal arrived, and what has been done about it."""

    deferred: bool = False
    requested: bool = False
    raised: bool = False
    acted: float = 0.0
    """Time of the last signal that was not ignored."""


_stop = _Stop()


def install() -> None:
    """Make the signals raise :class:`Interrupted`. Call it in the main thread.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored.
    """
    global _stop
    _stop = _Stop()
    for number in handled():
        signal.signal(number, _handle)


def ignore() -> None:
    """Ignore the signals from now on: a copy would kill the interpreter while it shuts down."""
    for number in handled():
        signal.signal(number, signal.SIG_IGN)


def handled() -> list[signal.Signals]:
    """The signals that stop a run."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def end_with_launcher() -> None:
    """Receive SIGTERM when the launcher that started this process is gone (Linux only).

    Otherwise a launcher that is killed leaves its run behind, without a terminal. A process that
    was started by something else, such as a shell, is left alone.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
        if any(Path(word).name in _LAUNCHERS for word in command.split("\0")):
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    first = not _stop.requested
    if not first and (number != signal.SIGINT or now - _stop.acted < REPEAT_SECONDS):
        return
    _stop.requested, _stop.acted = True, now
    if first and _stop.deferred:
        return
    if _stop.raised:
        _exit_process(EXIT_CODE)  # the run is ending already, and takes too long
    _stop.raised = True
    raise Interrupted(signal.Signals(number).name)


def requested() -> bool:
    """Whether a signal has arrived in this process."""
    return _stop.requested


@contextlib.contextmanager
def deferred() -> Iterator[_Stop]:
    """A first signal within this block only sets ``requested``; the loop in it must check it."""
    _stop.deferred = True
    try:
        yield _stop
    finally:
        _stop.deferred = False
