"""Run ``accelerate launch`` in this process and return the exit code of the run.

The launcher itself exits with 1 and a traceback, whatever the run's exit code is.
"""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from align.errors import RecipeError


def check_launch_configuration(file: Path) -> None:
    """Check that a file is a launch configuration that accelerate can read.

    Raises:
        RecipeError: The file is missing, or accelerate rejects it.
    """
    if not file.is_file():
        raise RecipeError(f"{file}: no such launch configuration; accelerate_configs/ has examples")
    from accelerate.commands.config.config_args import load_config_from_file
    from yaml import YAMLError

    try:
        load_config_from_file(str(file))
    except (AttributeError, KeyError, OSError, TypeError, ValueError, YAMLError) as error:
        # accelerate raises an AttributeError or a TypeError for a file without a mapping
        unclear = isinstance(error, AttributeError | TypeError)
        reason = "expected a mapping" if unclear else " ".join(str(error).split())
        raise RecipeError(
            f"{file}: not a launch configuration of accelerate ({reason.rstrip('.')}); "
            "accelerate_configs/ has examples"
        ) from None


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
