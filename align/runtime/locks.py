"""One writer per folder, by a lock that the operating system releases when its process ends."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from align.errors import ArtifactError
from align.runtime import artifacts, distributed


@contextlib.contextmanager
def folder_lock(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold ``folder`` for this run; create it if necessary.

    All ranks enter together, rank 0 holds the lock.

    If another run holds the folder, ``announce`` is called with one line that names it, and this
    run waits. The lock file is removed once the folder has an ``artifact.json``, and the folder
    if nothing was written into it.

    Raises:
        ArtifactError: The folder cannot be created or locked.
    """
    if not distributed.is_main():
        distributed.barrier()
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{folder}: cannot create this folder ({error.strerror}); move the file of this name "
            "away"
        ) from None
    path = folder / artifacts.WORKING
    if os.path.lexists(path) and not path.is_file():  # opening a pipe would wait for ever
        raise ArtifactError(f"{path}: not a file, so it cannot be locked; move it away")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"{folder}: held by {_holder(path)}; waiting for it to finish")
        _wait(lock, folder)
    try:
        since = datetime.now().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": os.uname().nodename, "since": since}
        # Written in place: an atomic rename would replace the file that is locked.
        path.write_text(json.dumps(holder), encoding="utf-8")
        distributed.barrier()
        yield
        if artifacts.read_artifact(folder) is not None:
            path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            if [file.name for file in folder.iterdir()] == [path.name]:  # the stage wrote nothing
                path.unlink()
                folder.rmdir()
        lock.release()


def _wait(lock: FileLock, folder: Path) -> None:
    while not lock.is_locked:
        try:
            lock.acquire()
        except FileNotFoundError:  # the holder has removed the folder, because it was empty
            folder.mkdir(parents=True, exist_ok=True)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
