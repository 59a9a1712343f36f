"""YAML with line numbers: plain data, where each key stands, and what is wrong with the text itself.

Left out on purpose: merge keys (``<<``). A recipe is complete where it stands; ``needs:`` joins recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError

Path_ = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """A YAML file as plain data.

    ``lines`` and ``texts`` give, for a path of keys, the line (from 1) and the scalar as written: ``no`` for ``False``.
    """

    path: Path
    data: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    texts: dict[Path_, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def line(self, keys: Path_) -> int:
        """The line of ``keys``, or of the nearest key above it that stands in the file."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return self.lines.get(keys, 1)


def read_yaml(path: Path) -> Document:
    """Read one YAML file. Syntax errors and duplicate keys are in ``problems``, each with its line.

    Raises:
        UserError: The file cannot be opened, or is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{_near_file(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a recipe{_near_file(path / 'x')}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    document = Document(path)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                document.data = _plain(node, (), loader, document, active=[])
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        document.problems.append(f"{path}:{line}: not YAML: {error.problem or error.context}")
    except (yaml.YAMLError, ValueError) as error:
        document.problems.append(f"{path}:1: not YAML: {' '.join(str(error).split())}")
    return document


def _near_file(path: Path) -> str:
    """The recipes that lie where a missing one was looked for."""
    found = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; there are {', '.join(found)}" if found else ""


def _plain(
    node: yaml.Node,
    keys: Path_,
    loader: yaml.SafeLoader,
    document: Document,
    *,
    active: list[yaml.Node],
) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(keys, line)
    if any(node is parent for parent in active):
        document.problems.append(f"{document.path}:{line}: an alias that contains itself")
        return None
    active = [*active, node]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, keys, loader, document, active)
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(item, (*keys, i), loader, document, active=active)
            for i, item in enumerate(node.value)
        ]
    document.texts[keys] = node.value
    return loader.construct_object(node)


def _mapping(
    node: yaml.MappingNode,
    keys: Path_,
    loader: yaml.SafeLoader,
    document: Document,
    active: list[yaml.Node],
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{document.path}:{line}: {'.'.join(map(str, keys)) or 'top level'}"
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{where}: a key must be a plain word")
            continue
        key = key_node.value
        if key_node.tag == "tag:yaml.org,2002:merge":
            document.problems.append(f"{where}: `<<` is not supported: write the keys out")
            continue
        if key in result:
            first = document.lines[(*keys, key)]
            document.problems.append(f"{where}: `{key}` stands twice (first in line {first})")
            continue
        document.lines[(*keys, key)] = line
        result[key] = _plain(value_node, (*keys, key), loader, document, active=active)
    return result


def scalar(text: str) -> Any:
    """One value as YAML reads it; text that is not YAML is the text."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def deep_set(data: dict[str, Any], keys: tuple[str, ...], value: object) -> bool:
    """Set ``data[k1][k2]… = value``, making mappings on the way; false where something else is in the way."""
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
