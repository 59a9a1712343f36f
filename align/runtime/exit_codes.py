"""runtime.exit_codes"""

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
    """Run a command. Exit codes: 0 success, 1 internal error (traceback), 2 invalid input, 130 interrupted."""
    signals.install()
    try:
        command()
    except UserError as error:
        _leave(2, error.lines)
    except signals.Interrupted:
        _leave(130, ["interrupted: the same command goes on from the last checkpoint"])


def _leave(code: int, lines: Sequence[str]) -> None:
    """Say why and leave. The launcher stops all processes when one has left: the main one must be it, to be heard."""
    if not distributed.is_main() and code == 130:
        lines = []  # all were asked to stop, and the main one says so
    elif not distributed.is_main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)
        lines = [f"process {os.environ['RANK']}: {line}" for line in lines]  # it alone was wrong
    for line in lines:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Several processes skip the end of the interpreter, which would wait for those that are gone.
    os._exit(code) if distributed.world_size() > 1 else sys.exit(code)
