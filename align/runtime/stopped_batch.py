"""The batch at which training stopped because a number was not finite, kept for inspection."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.runtime import distributed

FILE = "not-finite.json"


def save(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the batch of this process below the folder of a stage; returns the file.

    JSON has no NaN and no infinity, so these numbers are written as text. Each list of numbers is
    one line.
    """
    rank = distributed.rank()
    file = folder / (FILE if rank == 0 else f"not-finite-{rank}.json")
    # A half of a surrogate pair in the data becomes its escape sequence, which JSON reads.
    file.write_text(_as_json(content) + "\n", encoding="utf-8", errors="backslashreplace")
    return file


def beside() -> str:
    """The end of a message that names one of the files that all processes wrote."""
    return "" if distributed.world_size() == 1 else " of one process, with the others beside it"


def remove(folder: Path) -> None:
    """Remove the batches of an earlier attempt. Only the main process does."""
    if distributed.is_main():
        for file in folder.glob(f"{FILE.removesuffix('.json')}*.json"):
            file.unlink(missing_ok=True)


def _as_json(value: Any, indent: str = "") -> str:
    inner = indent + " "
    if isinstance(value, Mapping) and value:
        entries = [f"{_as_json(str(key))}: {_as_json(v, inner)}" for key, v in value.items()]
        begin, end = "{}"
    elif isinstance(value, list | tuple) and any(not isinstance(v, int | float) for v in value):
        entries = [_as_json(entry, inner) for entry in value]
        begin, end = "[]"
    elif isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_json, value))}]"
    else:
        is_number = not isinstance(value, float) or math.isfinite(value)
        return json.dumps(value if is_number else str(value), ensure_ascii=False)
    return f"{begin}\n{inner}" + f",\n{inner}".join(entries) + f"\n{indent}{end}"
