"""Exit codes of the commands: 0 success, 1 internal error, 2 invalid input, 130 interrupted."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from align.errors import UserError
from align.runtime import distributed, signals

SECONDS_FOR_RANK_0 = 30


def guarded(command: Callable[[], object]) -> None:
    """Run a command and exit with the code of its outcome.

    Invalid input and interruptions are printed to stderr without a traceback. Any other exception
    passes through: Python prints the traceback and exits with 1.
    """
    signals.install()
    try:
        command()
    except UserError as error:
        _exit(2, error.lines)
    except signals.Interrupted:
        _exit(130, ["interrupted: the same command resumes from the last checkpoint"])


def _exit(code: int, lines: Sequence[str]) -> None:
    """Print lines to stderr and exit.

    The launcher kills all ranks once one of them has exited. Other ranks therefore wait, so that
    rank 0 can print first.
    """
    if not distributed.is_main() and code == 130:
        lines = []  # all ranks received the signal, and rank 0 prints the line
    elif not distributed.is_main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)
        lines = [f"process {distributed.rank()}: {line}" for line in lines]  # only this rank failed
    for line in lines:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # With several ranks, the shutdown of the interpreter would wait for ranks that are gone.
    os._exit(code) if distributed.world_size() > 1 else sys.exit(code)
