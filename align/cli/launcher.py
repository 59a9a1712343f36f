"""Run ``accelerate launch`` in this process and return the exit code of the run.

The launcher itself exits with 1 and a traceback, whatever the run's exit code is.
"""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType


def launch(arguments: Sequence[str]) -> int:
    """Run ``accelerate launch`` with these arguments.

    Returns the exit code of the first process that failed, or 0.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It advises to run `accelerate config`, even for one process.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the run as well
    signal.signal(signal.SIGTERM, _forward)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        return _shell_code(error.returncode)
    except ChildFailedError as error:
        return _shell_code(error.get_first_failure()[1].exitcode)
    except SignalException:
        return 130
    return 0


def _shell_code(code: int) -> int:
    """The code with which a shell reports a process: 128 + n if signal n killed it."""
    return code if code > 0 else 128 - code


def _forward(number: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)
