"""Overrides of the command line, ``STAGE.KEY=VALUE``, read by the declared type of the key."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from align.config import renamed_keys, trl_fields
from align.config.base import Stage
from align.config.raw_recipe import COMMAND_LINE, RawRecipe, stage_class
from align.config.yaml_loader import CONTROL_CHARACTER, deep_set, scalar
from align.errors import NUMBER, nearest


def apply_override(text: str, recipe: RawRecipe) -> None:
    """Set a key of one stage, or of all stages that have it; add errors to the recipe."""
    if CONTROL_CHARACTER.search(text):
        problem = "contains a line break, a control character or invalid bytes; remove it"
        recipe.problems.append(f"{COMMAND_LINE}: {text!r:.80}: {problem}")
        return
    address, equals, value = text.partition("=")
    name, *keys = address.split(".")
    if not equals or not keys or not all(keys):
        message = "expected STAGE.KEY=VALUE, such as dpo.beta=0.2"
        recipe.problems.append(f"{COMMAND_LINE}: {text}: {message}")
        return
    names = [name] if name in recipe.stages else []
    if name == "all":
        names = [n for n, (_, values) in recipe.stages.items() if _has_key(n, values, keys)]
        if not names:
            key = ".".join(keys)
            message = (
                f"no stage has a key `{key}`{renamed_keys.hint(recipe.classes().values(), key)}"
            )
            recipe.problems.append(f"{COMMAND_LINE}: {text}: {message}")
    elif not names:
        message = f"no stage `{name}`{nearest(name, [*recipe.stages, 'all'])}"
        recipe.problems.append(f"{COMMAND_LINE}: {text}: {message}")
    for stage in names:
        values = recipe.stages[stage][1]
        recipe.overridden.add((stage, *keys))
        declared = declared_type(stage_class(stage, values), keys)
        if not deep_set(values, tuple(keys), parse_value(value, declared)):
            recipe.report(stage, keys, f"`{'.'.join([stage, *keys[:-1]])}` has no keys below it")


def _has_key(name: str, values: dict[str, Any], keys: list[str]) -> bool:
    return declared_type(stage_class(name, values), keys) is not None


def declared_type(cls: type[Stage] | None, keys: list[str]) -> Any:
    """The declared type of a key; None if there is no such key."""
    if cls is None:
        return None
    if len(keys) == 2 and keys[0] == "trainer" and cls.trainer_config:
        known = trl_fields.trl_fields(cls.trainer_config)
        return trl_fields.python_type(known[keys[1]].annotation) if keys[1] in known else None
    declared: Any = cls
    for key in keys:
        models = list(nested_models(declared))
        if not models:  # a plain mapping, such as `columns`, or a value without keys
            return get_args(declared)[1] if get_origin(declared) is dict else None
        if key.isdigit():  # an item of a list
            continue
        fields = next((m.model_fields for m in models if key in m.model_fields), None)
        if fields is None:
            return None
        declared = fields[key].annotation
    return declared


def is_key(cls: type[Stage], keys: list[str]) -> bool:
    """Whether a stage declares a key, or its TRL class the field of ``trainer``.

    Keys of plain mappings are not declared.
    """
    if len(keys) == 2 and keys[0] == "trainer":
        return declared_type(cls, keys) is not None
    *above, last = keys
    parent = declared_type(cls, above) if above else cls
    if last.isdigit():
        return get_origin(parent) is list
    return any(last in model.model_fields for model in nested_models(parent))


def nested_models(declared: Any) -> Iterator[type[BaseModel]]:
    """The configuration classes in a declared type, which may be a union."""
    if isinstance(declared, type) and issubclass(declared, BaseModel):
        yield declared
    elif get_origin(declared) in (Union, types.UnionType, Annotated, list):
        parts: Iterable[Any] = get_args(declared)
        for part in parts:
            yield from nested_models(part)


def parse_value(text: str, declared: Any) -> Any:
    """The first interpretation of ``text`` that fits its type: YAML, a number, text.

    Where the declared type is text, the text itself is the value.
    """
    if declared is str:
        return text
    candidates: list[Any] = [scalar(text)]
    if NUMBER.match(text):
        candidates.append(float(text))
    candidates.append(text)
    if declared is None:
        return candidates[0]
    is_model = isinstance(declared, type) and issubclass(declared, BaseModel)
    adapter: TypeAdapter[Any] = TypeAdapter(
        declared, config=None if is_model else ConfigDict(strict=True)
    )
    for candidate in candidates:
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return candidate
    return candidates[0]
