"""Ways to damage a file, for tests of what Align does with damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def reverse(file: Path) -> None:
    """Reverse the rows of a table, the lines of a text, or the bytes of anything else."""
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        pq.write_table(table.take(list(range(len(table)))[::-1]), file)
        return
    content = file.read_bytes()
    is_text = file.suffix in (".jsonl", ".md", ".jinja")
    parts = content.splitlines(keepends=True) if is_text else [bytes([b]) for b in content]
    file.write_bytes(b"".join(reversed(parts)))


def change_a_type(file: Path) -> None:
    """Replace the first value of a JSON object by one of another type."""
    data = json.loads(file.read_text()) if file.suffix == ".json" else {"x": 1}
    name = next(iter(data))
    data[name] = [data[name]] if isinstance(data[name], dict) else {"x": data[name]}
    file.write_text(json.dumps(data))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": Path.unlink,
    "a folder": replace_by_folder,
    "a link to itself": replace_by_loop,
    "other JSON": lambda file: file.write_text("[1]"),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe{}"),
    "reversed": reverse,
    "a value of another type": change_a_type,
    "deep JSON": lambda file: file.write_text("[" * 100_000),
}
