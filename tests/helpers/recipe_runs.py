"""Start `align/run.py` as a subprocess, as users do, and stop it.

The recipe is `recipe.yaml` beside the runs folder. Output is appended to the file `log` beside it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 240  # no run of the tests takes that long


@contextmanager
def running(runs: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a new process group. What still runs at the end is killed."""
    command = [sys.executable, str(ROOT / "align" / "run.py"), "recipe.yaml", "--runs", str(runs)]
    with (runs.parent / "log").open("a") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=runs.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(runs: Path, *arguments: str) -> int:
    """Run to the end. Returns the exit code."""
    with running(runs, *arguments) as process:
        return process.wait(timeout=SECONDS)


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
        process.send_signal(number)
        return process.wait(timeout=SECONDS)


def kill_at_random_moments(runs: Path, stage: str, *, seconds: float, kills: int) -> None:
    """Kill the runs of a stage that takes ``seconds``, later each time, until it is finished."""
    generator = random.Random(stage)
    for moment in range(kills):
        if list(runs.glob(f"{stage}-*/artifact.json")):
            break  # faster than the uninterrupted run was
        delay = seconds * (moment + generator.random()) / kills
        stop(runs, "--until", stage, when=stage_started(runs, stage), delay=delay)


def wait_until(when: Callable[[], object], process: subprocess.Popen[bytes], runs: Path) -> None:
    """Wait until ``when()`` is true. A run that ends before is an error."""
    deadline = time.monotonic() + SECONDS
    while not when():
        assert process.poll() is None, log(runs)
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
