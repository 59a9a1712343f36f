"""Start `align/run.py` in processes of their own, and stop them.

A run is a fork of a server that has imported the libraries, so that it starts at once.
:func:`run_in_new_interpreter` starts one as users do. The server is never the pytest worker.

The recipe is `recipe.yaml` beside the runs folder. Output is appended to the file `log` beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "align" / "run.py")
SECONDS = 240  # no run of the tests takes that long


def run_in_new_interpreter(runs: Path, *arguments: str) -> int:
    """Run to the end in a process that imports everything itself. Returns the exit code."""
    command = [sys.executable, SCRIPT, "recipe.yaml", "--runs", str(runs), *arguments]
    with (runs.parent / "log").open("a") as log:
        return subprocess.run(
            command, cwd=runs.parent, stdout=log, stderr=log, timeout=SECONDS, check=False
        ).returncode


@contextmanager
def running(runs: Path, *arguments: str) -> Iterator[BaseProcess]:
    """A run in a new process group. What still runs at the end is killed."""
    process = start(runs, arguments)
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def start(
    runs: Path, arguments: Sequence[str], environment: Mapping[str, str] = os.environ
) -> BaseProcess:
    """Start a run as a fork of the server."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["helpers.preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # inherited by a server that starts now
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        process = server.Process(
            target=_run, args=(runs, [*arguments], dict(environment)), daemon=True
        )
        process.start()
    return process


def _run(runs: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """Become a run that a shell has started."""
    os.setsid()
    with (runs.parent / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(runs.parent)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [SCRIPT, "recipe.yaml", "--runs", str(runs), *arguments]
    sys.path.insert(0, "")  # replaced by the script
    runpy.run_path(SCRIPT, run_name="__main__")


def wait(process: BaseProcess, runs: Path) -> int:
    """Wait for the end of a run. Returns its exit code."""
    process.join(SECONDS)
    assert process.exitcode is not None, log(runs)
    return process.exitcode


def run(runs: Path, *arguments: str) -> int:
    """Run to the end. Returns the exit code."""
    with running(runs, *arguments) as process:
        return wait(process, runs)


def run_on_two_processes(runs: Path, *arguments: str) -> int:
    """Run to the end on two connected processes. Returns the exit code of the first rank."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused.getsockname()[1])}
    common = os.environ | place | {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        start(runs, arguments, common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    try:
        return wait(ranks[0], runs)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


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
        return wait(process, runs)


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
    deadline = time.monotonic() + SECONDS
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
