"""Start `align/run.py` in a separate process, and stop it.

The recipe is `recipe.yaml` beside the runs folder. Output is appended to the file `log` beside it.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers import forks

SCRIPT = str(forks.ROOT / "align" / "run.py")


def run_in_new_interpreter(runs: Path, *arguments: str) -> int:
    """Run to the end in a process that imports everything itself. Returns the exit code."""
    command = [sys.executable, SCRIPT, "recipe.yaml", "--runs", str(runs), *arguments]
    with (runs.parent / "log").open("a") as log:
        return subprocess.run(
            command, cwd=runs.parent, stdout=log, stderr=log, timeout=forks.SECONDS, check=False
        ).returncode


def call_script(runs: Path, *arguments: str) -> None:
    """Run `align/run.py` in this process."""
    sys.argv = [SCRIPT, "recipe.yaml", "--runs", str(runs), *arguments]
    sys.path.insert(0, "")  # replaced by the script
    runpy.run_path(SCRIPT, run_name="__main__")


@contextmanager
def running(runs: Path, *arguments: str) -> Iterator[BaseProcess]:
    """A run that is killed at the end if it still runs."""
    process = forks.start(call_script, runs, *arguments, log=runs.parent / "log")
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run(runs: Path, *arguments: str) -> int:
    """Run to the end. Returns the exit code."""
    with running(runs, *arguments) as process:
        return forks.wait(process)


def run_on_two_processes(runs: Path, *arguments: str) -> int:
    """Run to the end on two connected processes. Returns the exit code of rank 0."""
    with forks.ranks(call_script, runs, *arguments, log=runs.parent / "log") as ranks:
        return forks.wait(ranks[0])


def stop(
    runs: Path,
    *arguments: str,
    when: Callable[[], object],
    number: signal.Signals = signal.SIGKILL,
    delay: float = 0.0,
) -> int:
    """Run until ``when()`` is true and ``delay`` seconds longer, then send a signal.

    Returns the exit code.
    """
    with running(runs, *arguments) as process:
        wait_until(when, process, runs)
        time.sleep(delay)
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, number)
        return forks.wait(process)


def kill_at_random_moments(runs: Path, stage: str, *, seconds: float, kills: int) -> None:
    """Kill the runs of a stage that takes ``seconds``, later each time, until it is finished."""
    generator = random.Random(stage)
    for moment in range(kills):
        if list(runs.glob(f"{stage}-*/artifact.json")):
            break  # faster than the uninterrupted run was
        delay = seconds * (moment + generator.random()) / kills
        stop(runs, "--until", stage, when=stage_started(runs, stage), delay=delay)


def wait_until(when: Callable[[], object], process: BaseProcess, runs: Path) -> None:
    """Wait until ``when()`` is true. A run that ends before is an error."""
    deadline = time.monotonic() + forks.SECONDS
    while not when():
        assert process.is_alive(), log(runs)
        assert time.monotonic() < deadline, log(runs)
        time.sleep(0.005)


def file_exists(runs: Path, pattern: str) -> Callable[[], bool]:
    """Condition: a file that matches ``pattern`` exists below the runs folder."""
    return lambda: any(runs.glob(pattern))


def stage_started(runs: Path, stage: str) -> Callable[[], bool]:
    """Condition: since this call the log has the line with which ``stage`` begins."""
    before = len(log(runs))
    return lambda: any(
        line.startswith(f"{stage}: ") and "→" in line for line in log(runs)[before:].splitlines()
    )


def logged_step(runs: Path, stage: str, step: int) -> Callable[[], bool]:
    """Condition: the metrics of ``step`` are in the stage's `metrics.jsonl`."""

    def reached() -> bool:
        files = runs.glob(f"{stage}-*/metrics.jsonl")
        return any(f'"step": {step},' in file.read_text() for file in files)

    return reached


def log(runs: Path) -> str:
    """Everything that the runs have printed."""
    file = runs.parent / "log"
    return file.read_text() if file.exists() else ""
