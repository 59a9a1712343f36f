"""The batch at which training stopped because a number was not finite, kept for inspection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.runtime import distributed
from align.runtime.artifacts import write_json

FILE = "not-finite.json"


def save(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the batch of this process below the folder of a stage; returns the file.

    JSON has no NaN and no infinity, so these numbers are written as text.
    """
    rank = distributed.rank()
    file = folder / (FILE if rank == 0 else f"not-finite-{rank}.json")
    write_json(file, _as_json(content))
    return file


def remove(folder: Path) -> None:
    """Remove the batches of an earlier attempt. Only the main process does."""
    if distributed.is_main():
        for file in folder.glob(f"{FILE.removesuffix('.json')}*.json"):
            file.unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
