"""Run ``accelerate launch`` in this process and return the exit code of the run.

The launcher itself exits with 1 and a traceback, whatever the run's exit code is, and does not pass
signals on, or kills the run 30 seconds after them.
"""

from __future__ import annotations

import importlib.util
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from align.errors import RecipeError, not_installed
from align.runtime import signals
from align.runtime.exit_codes import RESUMES

NO_DEEPSPEED = not_installed("deepspeed", "-e '.[deepspeed]'")


def check_launch_configuration(file: Path) -> None:
    """Check that a file is a launch configuration that accelerate can read.

    Raises:
        RecipeError: The file is missing, accelerate rejects it, or DeepSpeed is not installed.
    """
    if not file.is_file():
        raise RecipeError(f"{file}: no such launch configuration; accelerate_configs/ has examples")
    from accelerate.commands.config.config_args import load_config_from_file
    from yaml import YAMLError

    try:
        content = load_config_from_file(str(file))
    except (AttributeError, KeyError, OSError, TypeError, ValueError, YAMLError) as error:
        # accelerate raises an AttributeError or a TypeError for a file without a mapping
        unclear = isinstance(error, AttributeError | TypeError)
        reason = "expected a mapping" if unclear else " ".join(str(error).split())
        raise RecipeError(
            f"{file}: not a launch configuration of accelerate ({reason.rstrip('.')}); "
            "accelerate_configs/ has examples"
        ) from None
    if content.distributed_type == "DEEPSPEED" and not deepspeed_is_installed():
        raise RecipeError(f"{file}: distributed_type: {NO_DEEPSPEED}")


def deepspeed_is_installed() -> bool:
    """Whether the package that ``distributed_type: DEEPSPEED`` needs is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def launch(arguments: Sequence[str]) -> int:
    """Run ``accelerate launch`` with these arguments.

    Returns the exit code of the first process that failed, or 0.

    Raises:
        Interrupted: A signal ended the run before it could handle signals.
        RecipeError: accelerate cannot launch this configuration.
    """
    import psutil
    from accelerate.commands.launch import launch_command_parser

    # It advises to run `accelerate config`, even for one process.
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    # It warns that it handles no signals, which this function does, and logs exit codes.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    parsed = launch_command_parser().parse_args(arguments)
    events: SimpleQueue[int | None] = SimpleQueue()
    handled = signals.handled()
    for handled_signal in handled:
        signal.signal(handled_signal, lambda number, frame: events.put(number))
    run = _Launch(parsed, events)
    run.start()
    interrupted = False
    while (number := events.get()) is not None:
        interrupted = True
        for child in psutil.Process().children():
            try:
                child.send_signal(number)
            except psutil.NoSuchProcess:
                continue
    if run.error is not None:
        raise run.error
    if interrupted and -run.code in handled:
        raise signals.Interrupted
    if run.code < 0:
        name = signal.Signals(-run.code).name
        print(f"a process was killed by {name}; {RESUMES}", file=sys.stderr)
        return 128 - run.code  # as a shell reports a killed process
    return run.code


class _Launch(threading.Thread):
    """Runs ``accelerate launch``; the main thread is free for signals.

    ``events`` receives None at the end.
    """

    def __init__(self, arguments: Any, events: SimpleQueue[int | None]) -> None:
        super().__init__(daemon=True)
        self._arguments = arguments
        self._events = events
        self.code = 0
        """Exit code of the first process that failed; -n if signal n killed it."""
        self.error: BaseException | None = None

    def run(self) -> None:
        """Start the processes and wait for them."""
        from accelerate.commands.launch import launch_command
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            launch_command(self._arguments)
        except subprocess.CalledProcessError as error:
            self.code = error.returncode
        except ChildFailedError as error:
            self.code = error.get_first_failure()[1].exitcode
        except (AssertionError, ValueError, ConnectionError) as error:
            reason = " ".join(str(error).split())
            self.error = RecipeError(f"accelerate cannot launch this configuration: {reason}")
        except BaseException as error:
            self.error = error
        finally:
            self._events.put(None)
