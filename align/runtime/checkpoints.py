"""Checkpoints of a stage. One counts only if its mark and all of its files exist."""

from __future__ import annotations

import json
from pathlib import Path

from align.errors import ArtifactError
from align.runtime.artifacts import write_json

COMPLETE_MARK = "complete.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints ``checkpoint-<step>`` in a folder, oldest first.

    A checkpoint without a mark was interrupted while it was written; one that lacks a file of its
    mark, or has it with another size, is damaged or was interrupted while it was removed.
    """
    complete = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    return sorted(complete, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / COMPLETE_MARK).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def mark_complete(checkpoint: Path, *, world_size: int) -> None:
    """Mark a checkpoint as complete; the mark has the sizes of its files and the world size."""
    (checkpoint / COMPLETE_MARK).unlink(missing_ok=True)
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in paths}
    write_json(checkpoint / COMPLETE_MARK, {"world_size": world_size, "files": files})


def last_checkpoint(folder: Path, *, world_size: int) -> Path | None:
    """The newest complete checkpoint, to resume from; None if there is none.

    Raises:
        ArtifactError: Another number of processes wrote it, so a resumed run would end in other
            weights.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    mark = json.loads((checkpoints[-1] / COMPLETE_MARK).read_text(encoding="utf-8"))
    if mark["world_size"] != world_size:
        raise ArtifactError(
            f"{checkpoints[-1]}: written by {mark['world_size']} processes, and this run has "
            f"{world_size}; launch {mark['world_size']} processes, or start the stage over with "
            "--force"
        )
    return checkpoints[-1]
