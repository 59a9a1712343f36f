"""runtime.locks"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from align.errors import UserError
from align.runtime import artifacts, distributed
from align.runtime.progress import Display

if TYPE_CHECKING:
    from align.runtime.progress import Logger


@contextmanager
def folder_lock(folder: Path, display: Display) -> Iterator[None]:
    """One run a stage: a second one says who holds it, and waits. The system frees the lock of a killed one."""
    if not distributed.is_main():
        distributed.barrier()
        yield
        return
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be a folder ({error.strerror}); move it away") from None
    holder = folder / artifacts.WORKING
    lock = FileLock(holder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        display.info(f"{folder}: held by {_holder(holder)}; waiting for it to finish")
        lock.acquire()
    try:
        since = datetime.now().isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": os.uname().nodename, "since": since}
        # Written through another name would replace the locked file: its content is changed in place.
        holder.write_text(json.dumps(who), encoding="utf-8")
        distributed.barrier()
        yield
        if artifacts.read_artifact(folder) is not None:
            holder.unlink(missing_ok=True)
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another run"


@contextlib.contextmanager
def cache_lock(folder: Path, logger: Logger) -> Iterator[None]:
    """One run at a time looks, scores and writes; another waits for it, and then reads what it wrote."""
    if not distributed.is_main():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / artifacts.WORKING)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"{folder}: another run is at it; waiting for it to finish")
        lock.acquire()
    try:
        yield
        (folder / artifacts.WORKING).unlink(missing_ok=True)
    finally:
        lock.release()
