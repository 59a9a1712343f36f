"""Ways to damage a file, for tests of what Align does with damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": Path.unlink,
    "a folder": replace_by_folder,
    "a link to itself": replace_by_loop,
    "other JSON": lambda file: file.write_text("[1]"),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe{}"),
    "deep JSON": lambda file: file.write_text("[" * 100_000),
}
