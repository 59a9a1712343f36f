"""Exit codes of the commands: 0 success, 1 internal error, 2 invalid input, 130 interrupted."""

from __future__ import annotations

import atexit
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence

from align.errors import UserError, printable
from align.runtime import distributed, out_of_memory, signals

SECONDS_FOR_RANK_0 = 30
RESUMES = "the same command resumes from the last checkpoint"
_UNWRITABLE = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE"),
        *("EACCES", "EPERM", "EISDIR", "ENOTDIR", "ELOOP", "ENAMETOOLONG"),
    )
}
# Libraries in Rust and C++ raise errors of their own kinds. torch has no better text.
_UNWRITABLE_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system"
    r"|PytorchStreamWriter failed|inline_container.*(unexpected pos|iostream error)",
    re.DOTALL,
)
_LOST_PROCESS = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe.*gloo|gloo.*[Tt]imed out"
)


def guarded(command: Callable[[], object], *, interrupted: str = "interrupted") -> None:
    """Run a command and exit with the code of its outcome.

    Invalid input, failed writes, a lack of memory and interruptions are printed to stderr without a
    traceback; ``interrupted`` is the line for the latter. Any other exception passes through:
    Python prints the traceback and exits with 1.
    """
    signals.install()
    codes: list[int] = []
    if distributed.world_size() > 1:
        # Registered before all others, so called last: a tracker has closed its run by then.
        atexit.register(_skip_shutdown, codes)
    try:
        command()
        codes.append(0)
    except SystemExit as end:  # typer ends every command so
        if isinstance(end.code, int | None):
            codes.append(end.code or 0)
        raise
    except UserError as error:
        _exit(2, error.lines)
    except signals.Interrupted:
        signals.ignore()
        _exit(signals.EXIT_CODE, [interrupted])
    except Exception as error:
        failed_write = describe_failed_write(error)
        if failed_write is not None:
            _exit(2, [failed_write])
        if (shortage := out_of_memory.shortage(error)) is not None:
            _exit(2, [f"{shortage}; use smaller batches or a smaller model, or free memory"])
        if distributed.world_size() > 1 and _LOST_PROCESS.search(str(error)):
            _exit(1, [f"another process of this run has ended; {RESUMES}"])
        raise


def describe_failed_write(error: BaseException) -> str | None:
    """One line on a full disk, or on a file that cannot be written; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        is_write = isinstance(cause, OSError) and cause.errno in _UNWRITABLE
        if is_write or _UNWRITABLE_TEXT.search(str(cause)):
            file = getattr(cause, "filename", None)
            reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
            if "inline_container" in reason:
                reason = "torch could not write the whole file"
            place = f"{file}: " if file else ""
            return f"{place}cannot be written or read: {reason}; free space or change permissions"
        cause = cause.__cause__
    return None


def _skip_shutdown(codes: Sequence[int]) -> None:
    """End the process before the interpreter is taken down, which gloo's threads may not survive.

    They then abort a run that has finished (SIGABRT, https://github.com/pytorch/pytorch/pull/179291),
    also after ``destroy_process_group``: DDP keeps its process group in a reference cycle.
    """
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def _exit(code: int, lines: Sequence[str]) -> None:
    """Print lines to stderr and exit.

    The launcher kills all ranks once one of them has exited. Other ranks therefore wait, so that
    rank 0 can print first.
    """
    if not distributed.is_main() and code == signals.EXIT_CODE:
        lines = []  # all ranks received the signal, and rank 0 prints the line
    elif not distributed.is_main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)
        lines = [f"process {distributed.rank()}: {line}" for line in lines]  # only this rank failed
    for line in lines:
        print(printable(line), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # With several ranks, the shutdown of the interpreter would wait for ranks that are gone.
    os._exit(code) if distributed.world_size() > 1 else sys.exit(code)
