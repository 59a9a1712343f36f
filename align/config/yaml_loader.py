"""YAML with line numbers: plain data, lines and texts of the keys, syntax errors.

Merge keys (``<<``) are not supported: a recipe is complete as written, and ``needs:`` joins
recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.errors import RecipeError

Address = tuple[str | int, ...]  # the keys from the top of the document down


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
        RecipeError: The file cannot be opened, or is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe{_existing_recipes(path)}") from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path}: a folder, not a recipe{_existing_recipes(path / 'x')}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    document = Document(path)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                document.data = _plain(node, (), loader, document, parents=[])
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        document.problems.append(f"{path}:{line}: not YAML: {error.problem or error.context}")
    except (yaml.YAMLError, ValueError) as error:
        document.problems.append(f"{path}:1: not YAML: {' '.join(str(error).split())}")
    return document


def _existing_recipes(path: Path) -> str:
    """The recipes in the folder in which a missing one was looked for."""
    files = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; there are {', '.join(files)}" if files else ""


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
    return loader.construct_object(node)


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
        where = f"{document.path}:{line}: {'.'.join(map(str, address)) or 'top level'}"
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{where}: a key must be a plain word")
            continue
        key = key_node.value
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
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


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
