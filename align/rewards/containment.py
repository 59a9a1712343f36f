"""Run code of the user so that whatever it does instead of returning becomes one error.

It may raise anything, exit, change the working directory, or not return. Left out: what ends the
process itself, such as a segmentation fault, and compiled code that never checks for signals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from align.errors import UserError
from align.runtime import signals

LOGGER = logging.getLogger("align.rewards")
SECONDS_UNTIL_WARNING = 120.0
SECONDS_BETWEEN_ATTEMPTS = 1.0
"""The code may catch an interruption, which is therefore repeated."""


class _ExitError(Exception):
    """The code would have ended the process."""


class _OvertimeError(BaseException):
    """The code has not returned in time. Like a signal, it passes ``except Exception``."""


@contextlib.contextmanager
def contained(
    place: str,
    repair: str,
    *,
    seconds: float,
    overtime: str = "raise `timeout_seconds` if it needs longer",
) -> Iterator[None]:
    """Turn whatever the code inside the block does instead of returning into a ``UserError``.

    After ``seconds`` the block is interrupted, if it is in the main thread of a POSIX system.
    ``repair`` and ``overtime`` end the messages.
    """
    process, directory, exit_process = os.getpid(), Path.cwd(), os._exit

    def refuse(status: int) -> None:
        if os.getpid() != process:
            exit_process(status)  # a process that the user's code has forked
        raise _ExitError(f"os._exit({status})")

    os._exit = refuse  # type: ignore[assignment]
    try:
        with _limited(place, seconds):
            yield
    except signals.Interrupted:
        raise
    except BaseException as error:
        pressed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if isinstance(error, KeyboardInterrupt) and pressed:
            raise  # Ctrl-C in a program that uses the Python API
        where = _line(error)
        if isinstance(error, _OvertimeError):
            raise UserError(
                f"{place}: not returned after {seconds:g} seconds{where}; {overtime}"
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].removeprefix(
            "_ExitError: "
        )
        raise UserError(f"{place}: {reason}{where}; {repair}") from error
    finally:
        os._exit = exit_process
        os.chdir(directory)


def _line(error: BaseException) -> str:
    """The place of an error in the code of the user, without the frames of this module."""
    frame = None
    for each in traceback.extract_tb(error.__traceback__):
        if each.filename != __file__:
            frame = each
        elif each.name == "interrupt":
            break
    return f" (line {frame.lineno} of {frame.filename})" if frame and frame.lineno else ""


@contextlib.contextmanager
def _limited(place: str, seconds: float) -> Iterator[None]:
    """Warn of a block that takes long, and raise an error inside of it after ``seconds``."""
    finished = threading.Event()
    main = threading.main_thread()
    can_interrupt = threading.current_thread() is main and hasattr(signal, "pthread_kill")

    deadline = time.monotonic() + seconds

    def interrupt(number: int, frame: object) -> None:
        if not finished.is_set() and time.monotonic() >= deadline:
            raise _OvertimeError

    def watch() -> None:
        warned = min(SECONDS_UNTIL_WARNING, seconds)
        if finished.wait(warned):
            return
        if warned < seconds or not can_interrupt:
            LOGGER.warning("%s: not returned after %.0f seconds; the run waits", place, warned)
        if not can_interrupt or finished.wait(seconds - warned):
            return
        while not finished.is_set():
            signal.pthread_kill(main.ident or 0, signal.SIGVTALRM)
            finished.wait(SECONDS_BETWEEN_ATTEMPTS)

    # No library uses this signal, unlike SIGALRM, with which math-verify bounds its own steps.
    before = signal.signal(signal.SIGVTALRM, interrupt) if can_interrupt else None
    if can_interrupt:
        # The thread cannot run while a regular expression holds the interpreter's lock; this timer
        # can. It counts the time of all threads on the CPU, so the handler compares the clock.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, SECONDS_BETWEEN_ATTEMPTS)
    watcher = threading.Thread(target=watch, name="align-timeout", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
        if can_interrupt:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def working_directory_on_path() -> Iterator[None]:
    """Search modules in the working directory first."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
