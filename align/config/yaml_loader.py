"""YAML with line numbers: plain data, lines and texts of the keys, syntax errors.

Merge keys (``<<``) are not supported: a recipe is complete as written, and ``needs:`` joins
recipes. Size, depth and number of values are bounded, and values are numbers, words and texts of
one line: whatever a file contains, reading it ends within seconds and without a traceback.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.errors import RecipeError

Address = tuple[str | int, ...]  # the keys from the top of the document down
MAX_BYTES = 128 * 1024
MAX_DEPTH = 30
MAX_VALUES = 20_000
"""Bounds of one file. Values that an alias repeats count each time."""
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
"""Characters that no key and no value of a recipe contains."""
_OTHER_BASE = re.compile(r"[-+]?(0\d|.*:)")  # YAML 1.1 reads 010 as 8, and 1:30 as 90


@dataclass(slots=True)
class Document:
    """A YAML file as plain data."""

    path: Path
    data: Any = None
    lines: dict[Address, int] = field(default_factory=dict)
    """The line of each key, counted from 1."""
    texts: dict[Address, str] = field(default_factory=dict)
    """Each scalar as written, such as ``no`` for ``False``."""
    problems: list[str] = field(default_factory=list)
    """Syntax errors and duplicate keys, each with its line."""

    def line(self, address: Address) -> int:
        """The line of a key, or of the nearest key above it that is in the file."""
        while address and address not in self.lines:
            address = address[:-1]
        return self.lines.get(address, 1)

    def place(self, address: Address) -> str:
        """``file:line`` of a key; the name alone for a recipe that was not read from a file."""
        return f"{self.path}:{self.line(address)}" if self.lines else str(self.path)


def read_yaml(path: Path) -> Document:
    """Read one YAML file. Errors of its content are in ``problems``.

    Raises:
        RecipeError: The file cannot be opened, is too large, or is not text.
    """
    return parse(_read_text(path), path)


def _read_text(path: Path) -> str:
    """The text of a regular file of at most ``MAX_BYTES``."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise RecipeError(f"{path}: a folder, not a recipe{_existing_recipes(path)}")
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            raise RecipeError(f"{path}: a pipe or device, not a recipe; name a regular file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{_existing_recipes(path.parent)}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(f"{path}: cannot be read: {reason}; name a recipe file") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(
            f"{path}: cannot be read: larger than {MAX_BYTES // 1024} KiB; a recipe is a short "
            "YAML file that names its data"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}: cannot be read: line {line} is not UTF-8 text; save the file as UTF-8"
        ) from None


def parse(text: str, path: Path) -> Document:
    """Parse the text of a file. Errors are in ``problems``."""
    document = Document(path)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                document.data = _plain(node, (), loader, document, parents=[])
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join((error.problem or error.context or "").split())
        document.problems.append(f"{path}:{line}: not YAML: {problem}")
    except (yaml.YAMLError, ValueError) as error:
        document.problems.append(f"{path}:1: not YAML: {' '.join(str(error).split())}")
    return document


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, which is recursive, with a bound on the depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, unless it is nested too deeply."""
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} deep",
                problem_mark=self.peek_event().start_mark,
            )
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _existing_recipes(folder: Path) -> str:
    """The recipes in the folder in which one was looked for."""
    try:
        files = sorted(str(p) for p in folder.glob("*.yaml"))
    except OSError:
        files = []
    more = f" and {len(files) - 20} more" if len(files) > 20 else ""
    return f"; there are {', '.join(files[:20])}{more}" if files else ""


def _plain(
    node: yaml.Node,
    address: Address,
    loader: yaml.SafeLoader,
    document: Document,
    *,
    parents: list[yaml.Node],
) -> Any:
    """Convert a node to plain data, and record its line."""
    line = node.start_mark.line + 1
    document.lines.setdefault(address, line)
    if len(document.lines) > MAX_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MAX_VALUES:,} values, counting those that aliases repeat",
            problem_mark=node.start_mark,
        )
    if any(node is parent for parent in parents):
        document.problems.append(f"{document.path}:{line}: an alias that contains itself")
        return None
    parents = [*parents, node]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, address, loader, document, parents)
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(item, (*address, i), loader, document, parents=parents)
            for i, item in enumerate(node.value)
        ]
    document.texts[address] = node.value
    problem = _scalar_problem(node, loader)
    if problem:
        where = f"{document.path}:{line}: {_dotted(address)}"
        document.problems.append(f"{where}: {problem}")
        return None
    return loader.construct_object(node)


def _scalar_problem(node: yaml.Node, loader: yaml.SafeLoader) -> str | None:
    """The error of a scalar that a recipe cannot contain."""
    if CONTROL_CHARACTER.search(node.value):
        return f"{node.value!r:.60} contains a line break or control character; remove it"
    try:
        value = loader.construct_object(node)
    except ValueError:  # a date or a number that Python does not accept
        return f"{node.value!r:.60} is not a value that YAML can read; write it in quotes"
    if not isinstance(value, str | int | float | None):
        return f"YAML reads {node.value} as a {type(value).__name__}; write it in quotes"
    if isinstance(value, int | float) and _OTHER_BASE.match(node.value):
        return f"YAML reads {node.value} as {value}; write {value}, or '{node.value}' in quotes"
    return None


def _dotted(address: Address) -> str:
    """The address of a key for messages."""
    return ".".join(map(str, address)) or "top level"


def _mapping(
    node: yaml.MappingNode,
    address: Address,
    loader: yaml.SafeLoader,
    document: Document,
    parents: list[yaml.Node],
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{document.path}:{line}: {_dotted(address)}"
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{where}: a key must be a plain word")
            continue
        key = key_node.value
        if CONTROL_CHARACTER.search(key):
            problem = f"the key {key!r:.60} contains a line break or control character; remove it"
            document.problems.append(f"{where}: {problem}")
            continue
        if key_node.tag == "tag:yaml.org,2002:merge":
            document.problems.append(f"{where}: `<<` is not supported; write the keys out")
            continue
        if key in result:
            first = document.lines[(*address, key)]
            document.problems.append(
                f"{where}: duplicate key `{key}`, first in line {first}; remove one"
            )
            continue
        document.lines[(*address, key)] = line
        result[key] = _plain(value_node, (*address, key), loader, document, parents=parents)
    return result


def scalar(text: str) -> Any:
    """One value as YAML reads it; text that is not YAML is returned unchanged."""
    document = parse(text, Path())
    return text if document.problems else document.data


def deep_set(data: dict[str, Any], keys: tuple[str, ...], value: object) -> bool:
    """Set ``data[k1][k2]… = value`` and create missing mappings.

    Returns False if one of the upper keys has a value that is not a mapping.
    """
    for key in keys[:-1]:
        below = data.get(key)
        if below is None:
            below = data[key] = {}
        elif isinstance(below, Mapping):
            below = data[key] = dict(below)
        else:
            return False
        data = below
    data[keys[-1]] = value
    return True
