"""Recipes without bounds: each is refused within seconds, with one line that names the place."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import pytest

from align.config.recipe import read_recipe
from align.errors import UserError

SECONDS = 10
PREPARE = "stages: {prepare: {source: embedded}}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{below}'] * 9)}]\n"
    for below, key in zip("abcdefgh", "bcdefghi", strict=True)
)

FILES = {
    "nested lists": ("[" * 1000 + "]" * 1000, ":1: not YAML: nested more than 30 deep"),
    "nested mappings": ("{a: " * 1000 + "}" * 1000, ":1: not YAML: nested more than 30 deep"),
    "nested keys": ("? " * 1000 + "x", ":1: not YAML: nested more than 30 deep"),
    "aliases of aliases": (BOMB, "not YAML: more than 20,000 values, counting those that aliases"),
    "100,000 stages": (
        "stages:\n" + "".join(f"  s{i}: {{stage: prepare}}\n" for i in range(100_000)),
        "r.yaml: cannot be read: larger than 128 KiB; a recipe is a short YAML file",
    ),
    "1,200 stages": (
        "stages:\n" + "".join(f"  s{i}: {{stage: prepare}}\n" for i in range(1200)),
        "r.yaml: 1,200 stages, more than 1,000; split it",
    ),
    "a date": (
        "stages:\n  prepare:\n    source: 2001-01-01\n",
        "r.yaml:3: stages.prepare.source: YAML reads 2001-01-01 as a date; write it in quotes",
    ),
    "an impossible date": ("needs: 2001-99-99", "r.yaml:1: needs: '2001-99-99' is not a value"),
    "a number of 5,000 digits": ("needs: " + "9" * 5000, "is not a value that YAML can read"),
    "an octal number": ("needs: 010", "r.yaml:1: needs: YAML reads 010 as 8; write 8, or '010' in"),
    "a time": ("needs: 1:30", "r.yaml:1: needs: YAML reads 1:30 as 90; write 90, or '1:30' in"),
    "a NUL": ('needs: "a\\0"', "r.yaml:1: needs: 'a\\x00' contains a line break or control char"),
    "half a character": ('"\\ud800": 1', "r.yaml:1: top level: the key '\\ud800' contains a line"),
    "an escape sequence": ('needs: "\\e[2J"', "needs: '\\x1b[2J' contains a line break or control"),
    "a long name of a stage": (
        f"stages: {{{'a' * 300}: {{stage: prepare}}}}",
        "the name of a stage must consist of at most 64 lower-case letters, digits and _",
    ),
    "a long path": (f"needs: {'a/' * 3000}b", "r.yaml:1: needs: a/a/"),
    "UTF-16": (PREPARE.encode("utf-16"), "r.yaml: cannot be read: line 1 is not UTF-8 text; save"),
}


def problems(recipe: Any, *overrides: str) -> list[str]:
    """The errors of a recipe, found within ``SECONDS``."""
    started = time.monotonic()
    try:
        lines = list(read_recipe(recipe, overrides).problems)
    except UserError as error:
        lines = list(error.lines)
    assert time.monotonic() - started < SECONDS
    assert not any("\n" in line or "\x1b" in line for line in lines)
    return lines


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES.keys())
def test_a_file_without_bounds_is_refused(
    content: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert any(message in line for line in problems("r.yaml"))


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert problems(path) == [f"{path}: a pipe or device, not a recipe; name a regular file"]


def test_a_chain_of_needs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for i in range(300):
        stages = f"stages: {{p{i}: {{stage: prepare, source: embedded}}}}"
        Path(f"{i}.yaml").write_text(f"needs: [{i + 1}.yaml]\n{stages}\n")
    Path("300.yaml").write_text(PREPARE)
    message = "20.yaml:1: needs: more than 20 recipes deep in `needs`; join some of them"
    assert message in problems("0.yaml")
    assert problems("285.yaml") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "prepare.max_rows=" + "[" * 2000,
            "prepare.max_rows: expected a whole number, got the text",
        ),
        ("prepare.columns=" + "{a: " * 2000, "prepare.columns: expected a mapping"),
        ("prepare.source=\udcff", "contains a line break, a control character or invalid bytes"),
        ("prepare.x\n=1", "contains a line break, a control character or invalid bytes"),
    ],
)
def test_an_override_without_bounds_is_refused(override: str, message: str):
    recipe = {"stages": {"prepare": {"source": "embedded"}}}
    lines = problems(recipe, override)
    assert message in lines[0]


def test_a_recipe_in_python_is_bounded_as_a_file_is():
    recursive: dict[str, Any] = {}
    recursive["stages"] = recursive
    assert problems(recursive)[0].endswith("…: nested more than 30 deep; remove a level")
    for value, message in [
        (datetime.date(2001, 1, 1), "expected text, a number, a list or a mapping, got date"),
        (b"x", "expected text, a number, a list or a mapping, got bytes"),
        ("a\0", "'a\\x00' contains a line break or control character"),
    ]:
        lines = problems({"stages": {"prepare": {"source": value}}})
        assert lines == [f"stages.prepare.source: {message}"]


def test_of_many_known_keys_the_most_similar_are_listed():
    recipe = {"stages": {"prepare": {"source": "embedded"}, "ppo": {"xyz_rate": 1}}}
    line = next(line for line in problems(recipe) if "xyz_rate" in line)
    assert line.endswith(" more (docs/reference/configuration.md)")
    assert "unknown key; known: learning_rate, " in line
    assert len(line) < 400
