"""Recipes while they are read: raw settings, their places in the files, and the errors so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import stages
from align.config.base import Stage
from align.config.yaml_loader import Document

COMMAND_LINE = "command line"
"""The place of an override in error messages."""


@dataclass
class RawRecipe:
    """Recipes while they are read: raw settings of the stages, places, errors so far."""

    documents: dict[Path, Document] = field(default_factory=dict)
    stages: dict[str, tuple[Document, dict[str, Any]]] = field(default_factory=dict)
    overridden: set[tuple[str, ...]] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    invalid: set[str] = field(default_factory=set)
    """The names of the stages that errors were reported for."""

    wrong: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    """The keys of each stage whose values are not valid by themselves."""
    wrong_inputs: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    """The keys of each stage that name no input."""
    reports: dict[str, list[tuple[tuple[str | int, ...], str]]] = field(default_factory=dict)
    """The errors of each stage: the key, and the message."""

    def classes(self) -> dict[str, type[Stage] | None]:
        """The class of each stage, in order; None for an unknown kind."""
        return {name: stage_class(name, values) for name, (_, values) in self.stages.items()}

    def place(self, name: str, *keys: str | int) -> str:
        """``file:line`` of a key, or ``command line`` for one that is overridden."""
        address = (name, *map(str, keys))
        if any(address[: len(o)] == o for o in self.overridden):
            return COMMAND_LINE
        document = self.stages[name][0]
        return f"{document.place(('stages', name, *keys))}"

    def places(self) -> dict[tuple[str, ...], str]:
        """The places of all keys."""
        places = {}
        for document in {id(each): each for each, _ in self.stages.values()}.values():
            for top, *keys in filter(None, document.lines):
                name = str(keys[0]) if keys else ""
                if top == "stages" and name in self.stages and self.stages[name][0] is document:
                    places[tuple(map(str, keys))] = self.place(name, *keys[1:])
        return places | dict.fromkeys(self.overridden, COMMAND_LINE)

    def text(self, name: str, keys: Iterable[str | int]) -> str | None:
        """A value as written in the file; None for an override."""
        if self.place(name, *keys) == COMMAND_LINE:
            return None
        return self.stages[name][0].texts.get(("stages", name, *keys))

    def report(self, name: str, keys: Iterable[str | int], message: str) -> None:
        """Add an error about the value of a key of a stage."""
        keys = tuple(keys)
        self.wrong.setdefault(name, set()).add(tuple(map(str, keys)))
        self.report_conflict(name, keys, message)

    def report_input(self, name: str, keys: Iterable[str | int], message: str) -> None:
        """Add an error about a key of a stage that names no input."""
        keys = tuple(keys)
        self.wrong_inputs.setdefault(name, set()).add(tuple(map(str, keys)))
        self.report_conflict(name, keys, message)

    def report_conflict(self, name: str, keys: Iterable[str | int], message: str) -> None:
        """Add an error between keys that are each valid, at one of them."""
        keys = tuple(keys)
        self.invalid.add(name)
        self.reports.setdefault(name, []).append((keys, message))
        address = ".".join(map(str, (name, *keys)))
        self.problems.append(f"{self.place(name, *keys)}: {address}: {message}")


def stage_class(name: str, values: dict[str, Any]) -> type[Stage] | None:
    """The class of a stage: by its ``stage`` key, else by its name; None for an unknown kind."""
    kind = values.get("stage", name)
    if not isinstance(kind, str) or kind not in stages.STAGES:
        return None
    return stages.stage_class(kind, values)
