"""runtime.checkpoints"""

from __future__ import annotations

import json
from pathlib import Path

from align.errors import UserError
from align.runtime.artifacts import write_json

COMPLETE_MARK = "complete.json"


# Checkpoints ---------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first.

    One without its mark was cut off while it was written; one that lacks a file of its mark, while it was removed.
    """
    found = [p for p in folder.glob("checkpoint-*") if _is_complete(p)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / COMPLETE_MARK).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def mark_complete(checkpoint: Path, *, world_size: int) -> None:
    """Declare a checkpoint complete: the files that it has now, with their sizes."""
    (checkpoint / COMPLETE_MARK).unlink(missing_ok=True)
    paths = [p for p in sorted(checkpoint.rglob("*")) if p.is_file()]
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in paths}
    write_json(checkpoint / COMPLETE_MARK, {"world_size": world_size, "files": files})


def last_checkpoint(folder: Path, *, world_size: int) -> Path | None:
    """The checkpoint to go on from; None to start at the beginning.

    Raises:
        UserError: It was written by another number of processes, so going on would not end in the same weights.
    """
    found = list_checkpoints(folder)
    if not found:
        return None
    written = json.loads((found[-1] / COMPLETE_MARK).read_text(encoding="utf-8"))
    if written["world_size"] != world_size:
        raise UserError(
            f"{found[-1]}: written by {written['world_size']} processes, and this run has {world_size}; "
            f"launch {written['world_size']}, or start the stage anew with --force"
        )
    return found[-1]
