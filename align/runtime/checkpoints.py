"""Checkpoints of a stage. One counts only if its mark and all of its files are intact."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from align.errors import ArtifactError
from align.runtime import checksums, sharding
from align.runtime.artifacts import write_json

COMPLETE_MARK = "complete.json"
NAME = re.compile(r"checkpoint-\d+")
DAMAGED = "damaged-"
"""Prefix of the names of damaged checkpoints that are kept for inspection."""


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints ``checkpoint-<step>`` in a folder, oldest first.

    A checkpoint without a mark was interrupted while it was written; one that lacks a file of its
    mark, or has it with another size, is damaged or was interrupted while it was removed.
    """
    return [path for path in _entries(folder) if not _size_problems(path)]


def _entries(folder: Path) -> list[Path]:
    """Everything in a folder that has the name of a checkpoint, by step."""
    try:
        paths = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(paths, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _size_problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, as far as names and sizes show it."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return [f"{checkpoint}: not a folder"]
    try:
        mark = _read_mark(checkpoint)
    except ArtifactError as error:
        return list(error.lines)
    if mark["checkpoint"] != _identity(checkpoint):
        return [f"{checkpoint}: a renamed or copied {mark['checkpoint']}"]
    return checksums.size_problems(checkpoint, mark["files"])


def _content_problems(checkpoint: Path) -> list[str]:
    return _size_problems(checkpoint) or checksums.content_problems(
        checkpoint, _read_mark(checkpoint)["files"]
    )


def _read_mark(checkpoint: Path) -> dict[str, Any]:
    try:
        return checksums.read_sealed(checkpoint / COMPLETE_MARK)
    except FileNotFoundError:
        raise ArtifactError(f"{checkpoint}: no {COMPLETE_MARK}") from None


def _identity(checkpoint: Path) -> str:
    """Names of stage folder and checkpoint: one of another stage or step does not count."""
    return f"{checkpoint.resolve().parent.name}/{checkpoint.name}"


def mark_complete(checkpoint: Path, *, world_size: int) -> None:
    """Flush a checkpoint to the disk and mark it as complete.

    The mark has the size and the SHA-256 of each file, the world size, the kind of sharding, and
    the content so far of the stage's JSONL files.
    """
    mark = checkpoint / COMPLETE_MARK
    mark.unlink(missing_ok=True)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    logs = [path for path in checkpoint.parent.glob("*.jsonl") if path.is_file()]
    content = {
        "checkpoint": _identity(checkpoint),
        "world_size": world_size,
        "sharding": sharding.kind(),
        "files": checksums.record_files(checkpoint, files),
        "logs": checksums.record_files(checkpoint.parent, logs),
    }
    write_json(mark, checksums.seal(content))


def remove_interrupted(folder: Path) -> None:
    """Remove the checkpoints without a mark: a run was killed while it wrote or removed them."""
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink() and not (path / COMPLETE_MARK).exists():
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: Path, *, world_size: int) -> Path | None:
    """The newest complete checkpoint, to resume from; None if there is none.

    Raises:
        ArtifactError: Another number of processes wrote it, so a resumed run would end in other
            weights, or another kind of sharding, whose files this run does not read.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    mark = _read_mark(checkpoints[-1])
    written_by, written_with = mark["world_size"], mark.get("sharding")
    if written_by != world_size:
        raise ArtifactError(
            f"{checkpoints[-1]}: written by {written_by} processes, and this run has "
            f"{world_size}; launch {written_by} processes, or start the stage over with "
            "--force"
        )
    if written_with != sharding.kind():
        raise ArtifactError(
            f"{checkpoints[-1]}: written with {written_with or 'DDP'}, and this run uses "
            f"{sharding.kind() or 'DDP'}; launch it as before, or start the stage over with --force"
        )
    return checkpoints[-1]


# Damage -------------------------------------------------------------------------------------------


def set_aside_damaged(folder: Path, announce: Callable[[str], None]) -> None:
    """Rename the damaged checkpoints of a stage that would be newer than its last intact one.

    Reads the newest checkpoint in full; called once, by the main process, before a stage runs.
    ``announce`` is called with one line per damaged checkpoint and per log that has changed since
    the checkpoint.
    """
    intact = newest_intact(_entries(folder), announce)
    if intact is not None:
        for name, record in _read_mark(intact)["logs"].items():
            if not _begins_with(folder / name, record):
                announce(f"{folder / name}: changed after it was written; its lines may be wrong")


def newest_intact(checkpoints: Iterable[Path], announce: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint; newer ones that are damaged are renamed and announced.

    A folder without a mark was interrupted while it was written, so it is left to be overwritten.
    """
    for checkpoint in sorted(checkpoints, key=step_of, reverse=True):
        problems = _content_problems(checkpoint)
        if not problems:
            return checkpoint
        is_folder = checkpoint.is_dir() and not checkpoint.is_symlink()
        if not is_folder or (checkpoint / COMPLETE_MARK).exists():
            kept_as = _free_name(checkpoint)
            checkpoint.rename(kept_as)
            announce(f"{'; '.join(problems)}; passed over, and kept as {kept_as.name}")
    return None


def _free_name(checkpoint: Path) -> Path:
    path, number = checkpoint.with_name(DAMAGED + checkpoint.name), 1
    while path.exists() or path.is_symlink():
        number += 1
        path = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}-{number}")
    return path


def _begins_with(file: Path, record: dict[str, Any]) -> bool:
    """Whether a log begins with the bytes that its record describes."""
    try:
        with file.open("rb") as stream:
            return hashlib.sha256(stream.read(record["bytes"])).hexdigest() == record["sha256"]
    except OSError:
        return False
