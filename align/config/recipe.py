"""Recipes: YAML files that list stages in the order in which they run.

Loading a recipe reports every error of it and of the recipes that it needs at once, each with its
place in the file, before anything runs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import validation
from align.config.base import Stage
from align.config.overrides import apply_override, is_key
from align.config.python_values import plain_values
from align.config.raw_recipe import COMMAND_LINE, RawRecipe
from align.config.shipped import find_recipe
from align.config.stage_values import (
    InvalidStage,
    check_trainer,
    invalid_stages,
    validate_values,
)
from align.config.stages import STAGES
from align.config.yaml_loader import CONTROL_CHARACTER, Document, read_yaml
from align.errors import RecipeError, UserError, nearest, shown

_TOP_KEYS = ("needs", "stages")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9_]{,63}\Z")
MAX_NEEDS = 20  # recipes that need each other, one below the other
MAX_STAGES = 1000


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe, with those that it needs: its stages by name, in running order."""

    path: Path
    stages: Mapping[str, Stage]
    _places: Mapping[tuple[str, ...], str] = field(default_factory=dict, repr=False)
    problems: tuple[str, ...] = ()
    """The errors of a recipe that was read by :func:`read_recipe`, one line each."""
    names: tuple[str, ...] = ()
    """The names of all stages, including those with errors, which ``stages`` leaves out."""
    overrides: tuple[str, ...] = ()
    """The overrides as they were given."""
    invalid: Mapping[str, InvalidStage] = field(default_factory=dict, repr=False)
    """Stages with errors, and those that depend on them, as far as they can be checked further."""
    run_name: str | None = None
    """A name for the folder of the run; None: that of the recipe."""

    @property
    def name(self) -> str:
        """The given name, or the path below the folder ``recipes`` joined by ``-``: ``hh-dpo``."""
        if self.run_name is not None:
            return self.run_name
        parts = self.path.resolve().with_suffix("").parts
        for folder in ("recipes", "_recipes"):
            if folder in parts[:-1]:
                last = len(parts) - 2 - parts[:-1][::-1].index(folder)
                return "-".join(parts[last + 1 :])
        return parts[-1]

    def at(self, *keys: str | int) -> str:
        """The place of a key, ``file:line: stage.key``, for error messages."""
        address = tuple(map(str, keys))
        prefixes = (address[:n] for n in range(len(address), 0, -1))
        place = next((self._places[p] for p in prefixes if p in self._places), str(self.path))
        return f"{place}: {'.'.join(address)}"

    def line(self, keys: Iterable[str | int], message: str) -> str:
        """An error about the key at ``keys``, which begin with the name of its stage.

        A message that begins with the same key or one below it, such as ``trainer.optim: ``, is an
        error about that key, unless an input of the stage has this name.
        """
        name, *above = map(str, keys)
        first, colon, rest = message.partition(": ")
        below = first.split(".")
        stage = self.stages.get(name)
        if stage is None and name in self.invalid:
            stage = self.invalid[name].config
        if colon and stage is not None and first not in stage.input_names().values():
            for address in (below, [*above[:-1], *below], [*above, *below]):
                if address[: len(above)] == above and is_key(type(stage), address):
                    return f"{self.at(name, *address)}: {rest}"
        return f"{self.at(name, *above)}: {message}"


class ErrorCollector:
    """Collects user errors with their places in the recipe, and raises them as one.

    The errors that were found when the recipe was read are the first of them.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.lines: list[str] = list(recipe.problems)

    def add(self, keys: Iterable[str | int], *messages: str) -> None:
        """Add messages about the key at ``keys``, which begin with the name of its stage."""
        name, *below = map(str, keys)
        invalid = self.recipe.invalid.get(name)
        if invalid is None or not invalid.lacks(below):  # else its error has been reported
            self.lines += [self.recipe.line((name, *below), message) for message in messages]

    @contextlib.contextmanager
    def at(self, *keys: str | int) -> Iterator[None]:
        """Collect a user error that is raised inside, as one about the key at ``keys``."""
        try:
            yield
        except UserError as error:
            self.add(keys, *error.lines)

    def raise_any(self) -> None:
        """Raise what was collected, in the order of the places.

        Raises:
            RecipeError: At least one error was collected.
        """
        if self.lines:
            raise RecipeError(*sorted(dict.fromkeys(self.lines), key=_by_line))


def load_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    name: str = "recipe",
) -> Recipe:
    """Read a recipe, the recipes that it needs, and overrides ``stage.key=value``.

    ``recipe`` is a file, the name of a shipped recipe such as ``dpo`` or ``control/cartpole_ppo``,
    or a mapping with the content of a recipe, which gets ``name``. In a mapping, a reward may be a
    Python function, defined at the top level of a module, script or notebook.

    Raises:
        RecipeError: One line for each error in all of them, with its place and its repair.
    """
    loaded = read_recipe(recipe, overrides, name=name)
    ErrorCollector(loaded).raise_any()
    return loaded


def read_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    name: str = "recipe",
) -> Recipe:
    """Read a recipe as :func:`load_recipe` does, with its errors as ``problems`` of the result.

    Its ``stages`` are those without errors whose inputs have none either, so that they can be
    checked further and all errors be reported together.

    Raises:
        RecipeError: There is no such recipe, or it cannot be read.
    """
    raw = RawRecipe()
    if isinstance(recipe, Mapping):
        file = Path(name)
        _collect_document(Document(file, data=plain_values(recipe)), raw, parents=[file])
    else:
        file = find_recipe(recipe)
        _collect(file, raw, parents=[])
    if CONTROL_CHARACTER.search(file.name):  # it is part of the name of a folder
        raise RecipeError(
            f"{str(file)!r}: the name has a line break or control character; rename it"
        )
    if not file.stem.strip(". "):  # the summary of `...yaml` would be outside the runs folder
        raise RecipeError(f"{file}: the name of a recipe must not consist of dots; rename it")
    if len(raw.stages) > MAX_STAGES:
        raise RecipeError(f"{file}: {len(raw.stages):,} stages, more than {MAX_STAGES:,}; split it")
    overrides = tuple(overrides)
    for override in overrides:
        apply_override(override, raw)
    classes = raw.classes()
    stages: dict[str, Stage] = {}
    for stage_name, (_, values) in raw.stages.items():
        stage = validate_values(stage_name, values, raw)
        if stage is not None:
            stages[stage_name] = stage
        cls = classes[stage_name]
        if cls is not None:
            check_trainer(stage_name, cls, values, raw)
            validation.validate_inputs(stage_name, cls, values, classes, raw.report_input)
    for stage_name, stage in stages.items():
        validation.validate_stage(stage_name, stage, stages, raw.report_conflict)
    valid = _valid_stages(stages, raw)
    return Recipe(
        file,
        valid,
        raw.places(),
        tuple(raw.problems),
        tuple(raw.stages),
        overrides,
        invalid=dict(invalid_stages(raw, stages, valid)),
    )


def _valid_stages(stages: Mapping[str, Stage], raw: RawRecipe) -> dict[str, Stage]:
    """The stages without errors whose inputs have none either."""
    valid: dict[str, Stage] = {}
    for name, stage in stages.items():
        inputs = [target for target in stage.input_names().values() if target in raw.stages]
        if name not in raw.invalid and all(target in valid for target in inputs):
            valid[name] = stage
    return valid


def load_stage(
    kind: str, overrides: Iterable[str] = (), *, values: Mapping[str, Any] | None = None
) -> Any:
    """Configure one stage from ``values`` and ``key=value`` alone, as on a command line.

    Raises:
        RecipeError: One line for each error.
    """
    raw = RawRecipe()
    place = COMMAND_LINE if values is None else "keys"
    raw.stages[kind] = (Document(Path(place)), plain_values(values or {}))
    if values is None:
        raw.overridden.add((kind,))
    for override in overrides:
        apply_override(f"{kind}.{override}", raw)
    stage = validate_values(kind, raw.stages[kind][1], raw)
    if stage is not None:
        validation.validate_stage(kind, stage, {kind: stage}, raw.report)
    if raw.problems:
        raise RecipeError(*dict.fromkeys(raw.problems))
    return stage


def _by_line(problem: str) -> tuple[bool, str, int]:
    """Sort key of problems: their places in the files; those of the command line come last."""
    place = re.match(r"(.*?):(\d+): ", problem)
    return (False, place[1], int(place[2])) if place else (True, "", 0)


# Files


def _collect(path: Path, raw: RawRecipe, parents: list[Path]) -> None:
    """Read a recipe after those that it needs; ``parents`` are the recipes that need it."""
    try:
        key = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"{str(path)!r}: invalid path: {error}") from None
    if key in (parent.resolve() for parent in parents):
        cycle = " → ".join(map(str, [*parents, path]))
        raise RecipeError(f"a cycle: {cycle}; remove one of these `needs`")
    if len(parents) > MAX_NEEDS:
        raise RecipeError(f"more than {MAX_NEEDS} recipes deep in `needs`; join some of them")
    if key in raw.documents:
        return
    document = raw.documents[key] = read_yaml(path)
    raw.problems += document.problems
    _collect_document(document, raw, [*parents, path])


def _collect_document(document: Document, raw: RawRecipe, parents: list[Path]) -> None:
    """Read the content of a recipe, which is the last of ``parents``."""
    path, data = document.path, document.data
    if not isinstance(data, dict):
        if not document.problems:
            raw.problems.append(f"{path}:1: expected a mapping with `stages:`, got {shown(data)}")
        return
    for top in data.keys() - set(_TOP_KEYS):
        where = f"{document.place((top,))}: {top}"
        hint = "; a stage goes under `stages:`" if top in STAGES else nearest(top, _TOP_KEYS)
        raw.problems.append(f"{where}: unknown key{hint}")
    _collect_needs(document, data.get("needs"), raw, parents)
    _collect_stages(document, data, raw)


def _collect_needs(document: Document, needs: Any, raw: RawRecipe, parents: list[Path]) -> None:
    if needs is None:
        return
    if isinstance(needs, str):
        needs = [needs]
    if not isinstance(needs, list) or not all(isinstance(need, str) for need in needs):
        where = f"{document.place(('needs',))}: needs"
        message = f"expected a list of recipes, such as [sft.yaml], got {shown(needs)}"
        raw.problems.append(f"{where}: {message}")
        return
    for i, need in enumerate(needs):
        target = Path(os.path.normpath(document.path.parent / need))
        try:
            _collect(find_recipe(need, target), raw, parents)
        except UserError as error:
            where = f"{document.place(('needs', i))}: needs"
            raw.problems += [f"{where}: {line}" for line in error.lines]


def _collect_stages(document: Document, data: dict[str, Any], raw: RawRecipe) -> None:
    stages = data.get("stages")
    if stages is None and data.get("needs"):
        return
    if not isinstance(stages, dict) or not stages:
        where = f"{document.place(('stages',))}: stages"
        raw.problems.append(f"{where}: expected a mapping of stages, got {shown(stages)}")
        return
    for name, values in stages.items():
        problem = None
        if not _STAGE_NAME.match(name):
            problem = (
                "the name of a stage must consist of at most 64 lower-case letters, digits and _"
            )
        elif name in raw.stages:
            problem = (
                f"{raw.place(name)} already has a stage of this name; rename this one to "
                f"`{name}_2: {{stage: {name}, …}}`, or remove it"
            )
        elif values is not None and not isinstance(values, dict):
            problem = f"expected a mapping (key: value), got {shown(values)}"
        if problem is None:
            raw.stages[name] = (document, dict(values or {}))
        else:
            where = f"{document.place(('stages', name))}: {name}"
            raw.problems.append(f"{where}: {problem}")
