"""Processes that have imported the libraries already: forks of a server, not of the pytest worker.

A new interpreter imports torch, transformers and TRL for about eight seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 900  # no process of the tests takes that long, also on a busy machine


def start(
    target: Callable[..., object],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str] = os.environ,
) -> BaseProcess:
    """Call ``target`` in a new process and process group, in the folder of the file ``log``.

    Both output streams are appended to ``log``.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["helpers.preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # inherited by a server that starts now
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        process = server.Process(
            target=_become, args=(dict(environment), log, target, arguments), daemon=True
        )
        process.start()
    return process


def _become(
    environment: dict[str, str], log: Path, target: Callable[..., object], arguments: Any
) -> None:
    """Replace what a fork has inherited from the server, and call ``target``.

    The process ends without the shutdown of the interpreter, which gloo's threads may block.
    """
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(log.parent)
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def ranks(
    target: Callable[..., object],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str] = MappingProxyType({"ACCELERATE_USE_CPU": "true"}),
) -> Iterator[list[BaseProcess]]:
    """Two connected processes, as a launcher starts them. What still runs at the end is killed."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused.getsockname()[1])}
    common = os.environ | place | {"WORLD_SIZE": "2"} | dict(environment)
    processes = [
        start(target, *arguments, log=log, environment=common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait(process: BaseProcess) -> int:
    """Wait for the end of a process. Returns its exit code."""
    process.join(SECONDS)
    assert process.exitcode is not None, f"it still runs after {SECONDS} seconds"
    return process.exitcode
