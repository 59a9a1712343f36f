"""Recipes: YAML files that name stages in order. Reading one finds every mistake at once, before anything runs.

A recipe object stops at its stage: below it go plain arguments.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from align.config import trl_fields, validation
from align.config.base import TAGS, Stage
from align.config.overrides import (
    COMMAND_LINE,
    apply_override,
    declared_type,
    nested_models,
    stage_class,
)
from align.config.stages import STAGES
from align.config.yaml_loader import Document, read_yaml
from align.errors import UserError, mismatch, nearest, shown

_TOP = ("needs", "stages")
_NAME = re.compile(r"[a-z][a-z0-9_]*$")
_WORDS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
}


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read, with all that it needs: stages by name, in the order in which they run."""

    path: Path
    stages: Mapping[str, Stage]
    _lines: Mapping[tuple[str, ...], str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The path below the folder ``recipes``, joined by ``-``: ``hh-dpo`` for ``recipes/hh/dpo.yaml``."""
        parts = self.path.resolve().with_suffix("").parts
        if "recipes" in parts[:-1]:
            last = len(parts) - 1 - parts[:-1][::-1].index("recipes") - 1
            return "-".join(parts[last + 1 :])
        return parts[-1]

    def at(self, *keys: str) -> str:
        """``file:line: stage.key``, for messages found after reading."""
        place = next(
            (self._lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self._lines),
            str(self.path),
        )
        return f"{place}: {'.'.join(keys)}"


def kind(stage: Stage) -> str:
    """The kind of a stage: ``dpo`` for settings of the class DPO."""
    return next(name for name, cls in STAGES.items() if type(stage) is cls)


@dataclass
class _Reading:
    """Recipes while they are read: raw settings of each stage, where they stand, and what is wrong."""

    documents: dict[Path, Document] = field(default_factory=dict)
    stages: dict[str, tuple[Document, dict[str, Any]]] = field(default_factory=dict)
    overridden: set[tuple[str, ...]] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def place(self, name: str, *keys: str | int) -> str:
        address = (name, *map(str, keys))
        if any(address[: len(o)] == o for o in self.overridden):
            return COMMAND_LINE
        document = self.stages[name][0]
        return f"{document.path}:{document.line(('stages', name, *keys))}"

    def report(self, name: str, keys: Iterable[str | int], message: str) -> None:
        keys = tuple(keys)
        address = ".".join(map(str, (name, *keys)))
        self.problems.append(f"{self.place(name, *keys)}: {address}: {message}")


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, the recipes it needs, and overrides ``stage.key=value``.

    Raises:
        UserError: One line for every mistake in all of them, each with its place and its repair.
    """
    reading = _Reading()
    root = Path(os.path.normpath(path))
    _collect(root, reading, chain=[])
    for override in overrides:
        apply_override(override, reading)
    kinds = {name: stage_class(name, data) for name, (_, data) in reading.stages.items()}
    stages: dict[str, Stage] = {}
    for name, (_, data) in reading.stages.items():
        stage = _validate(name, data, reading)
        if stage is not None:
            stages[name] = stage
        cls = kinds[name]
        if cls is not None:
            _check_trainer(name, cls, data, reading)
            validation.validate_inputs(name, cls, data, kinds, reading.report)
    for name, stage in stages.items():
        validation.validate_stage(name, stage, stages, reading.report)
    if reading.problems:
        raise UserError(*sorted(dict.fromkeys(reading.problems), key=_by_line))
    return Recipe(root, stages, _lines(reading))


def load_stage(name: str, overrides: Iterable[str]) -> Any:
    """Settings of one stage from ``key=value`` alone, as a command has them; mistakes as in :func:`read`.

    Raises:
        UserError: One line for every mistake.
    """
    reading = _Reading()
    reading.stages[name] = (Document(Path(COMMAND_LINE)), {})
    reading.overridden.add((name,))
    for override in overrides:
        apply_override(f"{name}.{override}", reading)
    stage = _validate(name, reading.stages[name][1], reading)
    if stage is not None:
        validation.validate_stage(name, stage, {name: stage}, reading.report)
    if reading.problems:
        raise UserError(*dict.fromkeys(reading.problems))
    return stage


def _by_line(problem: str) -> tuple[bool, str, int]:
    """Problems in the order of their places; the command line's last."""
    place = re.match(r"(.*?):(\d+): ", problem)
    return (False, place[1], int(place[2])) if place else (True, "", 0)


def _lines(reading: _Reading) -> dict[tuple[str, ...], str]:
    lines = {}
    for name, (document, _) in reading.stages.items():
        for keys in document.lines:
            if keys[:2] == ("stages", name):
                lines[tuple(map(str, keys[1:]))] = reading.place(name, *keys[2:])
    return lines | dict.fromkeys(reading.overridden, COMMAND_LINE)


# Files ---------------------------------------------------------------------------------------------------------------


def _collect(path: Path, reading: _Reading, chain: list[Path]) -> None:
    try:
        key = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(path)!r}: no name of a file: {error}") from None
    if key in (seen.resolve() for seen in chain):
        way = " → ".join(map(str, [*chain, path]))
        raise UserError(f"a cycle: {way}; remove one of these `needs`")
    if key in reading.documents:
        return
    document = reading.documents[key] = read_yaml(path)
    reading.problems += document.problems
    data = document.data
    if not isinstance(data, dict):
        if not document.problems:
            reading.problems.append(
                f"{path}:1: expected a mapping with `stages:`, got {shown(data)}"
            )
        return
    for top in data.keys() - set(_TOP):
        where = f"{path}:{document.line((top,))}: {top}"
        known = "; a stage goes under `stages:`" if top in STAGES else nearest(top, _TOP)
        reading.problems.append(f"{where}: unknown key{known}")
    _collect_needs(document, data.get("needs"), reading, [*chain, path])
    _collect_stages(document, data, reading)


def _collect_needs(document: Document, needs: Any, reading: _Reading, chain: list[Path]) -> None:
    if needs is None:
        return
    if isinstance(needs, str):
        needs = [needs]
    if not isinstance(needs, list) or not all(isinstance(need, str) for need in needs):
        where = f"{document.path}:{document.line(('needs',))}: needs"
        reading.problems.append(
            f"{where}: expected a list of recipes, such as [sft.yaml], got {shown(needs)}"
        )
        return
    for i, need in enumerate(needs):
        target = Path(os.path.normpath(document.path.parent / need))
        try:
            _collect(target, reading, chain)
        except UserError as error:
            where = f"{document.path}:{document.line(('needs', i))}: needs"
            reading.problems += [f"{where}: {line}" for line in error.lines]


def _collect_stages(document: Document, data: dict[str, Any], reading: _Reading) -> None:
    stages = data.get("stages")
    if stages is None and data.get("needs"):
        return
    where = f"{document.path}:{document.line(('stages',))}"
    if not isinstance(stages, dict) or not stages:
        reading.problems.append(
            f"{where}: stages: expected a mapping of stages, got {shown(stages)}"
        )
        return
    for name, config in stages.items():
        where = f"{document.path}:{document.line(('stages', name))}: {name}"
        if not _NAME.match(name):
            reading.problems.append(f"{where}: a stage's name is lower-case letters, digits and _")
        elif name in reading.stages:
            other = reading.place(name)
            reading.problems.append(
                f"{where}: {other} has a stage of this name already; call this one `{name}_2: "
                f"{{stage: {name}, …}}`, or remove it"
            )
        elif config is not None and not isinstance(config, dict):
            reading.problems.append(
                f"{where}: expected a mapping (key: value), got {shown(config)}"
            )
        else:
            reading.stages[name] = (document, dict(config or {}))


# One stage -----------------------------------------------------------------------------------------------------------


def _validate(name: str, data: dict[str, Any], reading: _Reading) -> Stage | None:
    cls = stage_class(name, data)
    if cls is None:
        found = data.get("stage", name)
        hint = nearest(str(found), STAGES)
        if "stage" in data:
            message = f"expected a kind of stage, got {shown(found)}{hint}"
            reading.report(name, ["stage"], message)
        else:
            message = f"no kind of stage is called `{name}`{hint}"
            reading.report(name, [], f"{message} (a name of your own needs `stage: KIND`)")
        return None
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _report(name, cls, detail, reading)
        return None


def _report(name: str, cls: type[Stage], detail: ErrorDetails, reading: _Reading) -> None:
    keys = [key for key in detail["loc"] if key not in TAGS]
    found = detail["input"]
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            message = f"unknown key{_nearest_key(cls, keys)}"
        case "missing":
            message = "missing; it has no default"
        case "literal_error":
            message = f"expected {context['expected']}, got {shown(found)}"
            if isinstance(found, str):
                known = re.findall(r"'([^']+)'", context["expected"])
                message += nearest(found, known, only_near=True)
        case "value_error":
            message = str(context["error"])
        case wrong if wrong in _WORDS:
            message = mismatch(_WORDS[wrong], found, _text(name, keys, reading))
        case _:
            message = f"{detail['msg'].replace('Input should', 'must')}, got {shown(found)}"
    reading.report(name, keys, message)


def _text(name: str, keys: Iterable[str | int], reading: _Reading) -> str | None:
    document = reading.stages[name][0]
    if reading.place(name, *keys) == COMMAND_LINE:
        return None
    return document.texts.get(("stages", name, *keys))


def _nearest_key(cls: type[Stage], keys: list[str | int]) -> str:
    declared: Any = cls if len(keys) == 1 else declared_type(cls, [str(k) for k in keys[:-1]])
    known = [name for model in nested_models(declared) for name in model.model_fields]
    word = str(keys[-1])
    if len(keys) == 1 and cls.trainer_config:
        if word in trl_fields.trl_fields(cls.trainer_config) and word not in trl_fields.OWNED:
            return f"; it is a field of TRL's {cls.trainer_config}: put it under `trainer:`"
    return nearest(word, known)


def _check_trainer(name: str, cls: type[Stage], data: dict[str, Any], reading: _Reading) -> None:
    given = data.get("trainer")
    if cls.trainer_config is None or not isinstance(given, dict):
        return
    known = trl_fields.trl_fields(cls.trainer_config)
    for word, value in given.items():
        keys = ["trainer", word]
        if word not in known:
            own = f"; `{word}` is a key of the stage itself" if word in cls.model_fields else ""
            hint = own or nearest(word, known, only_near=True)
            reading.report(name, keys, f"no field of TRL's {cls.trainer_config}{hint}")
        elif word in trl_fields.OWNED:
            reading.report(name, keys, f"not to be set here: {trl_fields.OWNED[word]}")
        elif not trl_fields.fits(known[word], value):
            expected = trl_fields.expected(known[word])
            reading.report(name, keys, mismatch(expected, value, _text(name, keys, reading)))
        elif trl_fields.too_small(word, value):
            least = trl_fields.LEAST[word]
            reading.report(name, keys, f"must be at least {least}, got {shown(value)}")
        else:
            for place, item in trl_fields.not_a_choice(known[word], value):
                at = [*keys, *([] if place is None else [place])]
                reading.report(
                    name, at, f"no such {word}: {item}{nearest(item, known[word].choices)}"
                )
