"""config.overrides"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from align.config import trl_fields
from align.config.base import Stage
from align.config.stages import STAGES
from align.config.yaml_loader import deep_set, scalar
from align.errors import NUMBER, nearest

if TYPE_CHECKING:
    from align.config.recipe import _Reading

COMMAND_LINE = "command line"


# Overrides -----------------------------------------------------------------------------------------------------------


def apply_override(text: str, reading: _Reading) -> None:
    address, equals, value = text.partition("=")
    name, *keys = address.split(".")
    if not equals or not keys or not all(keys):
        reading.problems.append(
            f"{COMMAND_LINE}: {text}: expected STAGE.KEY=VALUE, such as dpo.beta=0.2"
        )
        return
    if name == "all":
        names = [
            n
            for n, (_, d) in reading.stages.items()
            if declared_type(stage_class(n, d), keys) is not None
        ]
        if not names:
            reading.problems.append(
                f"{COMMAND_LINE}: {text}: no stage has a key `{'.'.join(keys)}`"
            )
    elif name in reading.stages:
        names = [name]
    else:
        reading.problems.append(
            f"{COMMAND_LINE}: {text}: no stage `{name}`{nearest(name, [*reading.stages, 'all'])}"
        )
        return
    for name in names:
        data = reading.stages[name][1]
        declared = declared_type(stage_class(name, data), keys)
        reading.overridden.add((name, *keys))
        if not deep_set(data, tuple(keys), parse_value(value, declared)):
            reading.report(name, keys, f"`{'.'.join([name, *keys[:-1]])}` has no keys below it")


def stage_class(name: str, data: dict[str, Any]) -> type[Stage] | None:
    found = data.get("stage", name)
    return STAGES.get(found) if isinstance(found, str) else None


def declared_type(cls: type[Stage] | None, keys: list[str]) -> Any:
    """The type that a key is declared with; None where there is no such key."""
    if cls is None:
        return None
    if len(keys) == 2 and keys[0] == "trainer" and cls.trainer_config:
        known = trl_fields.trl_fields(cls.trainer_config)
        return trl_fields.python_type(known[keys[1]].annotation) if keys[1] in known else None
    declared: Any = cls
    for key in keys:
        fields = next((m.model_fields for m in nested_models(declared)), None)
        if fields is None:  # a plain mapping, such as `columns`, or nothing with keys
            return get_args(declared)[1] if get_origin(declared) is dict else None
        if key not in fields:
            return None
        declared = fields[key].annotation
    return declared


def nested_models(declared: Any) -> Iterable[type[BaseModel]]:
    if isinstance(declared, type) and issubclass(declared, BaseModel):
        yield declared
    elif get_origin(declared) in (Union, types.UnionType, Annotated):
        for part in get_args(declared):
            yield from nested_models(part)


def parse_value(text: str, declared: Any) -> Any:
    """The first reading of ``text`` that has the declared type: text only, YAML, a number, text."""
    if declared is str:
        return text
    candidates: list[Any] = [scalar(text)]
    if NUMBER.match(text):
        candidates.append(float(text))
    candidates.append(text)
    if declared is not None:
        config = (
            None
            if isinstance(declared, type) and issubclass(declared, BaseModel)
            else ConfigDict(strict=True)
        )
        adapter: TypeAdapter[Any] = TypeAdapter(declared, config=config)
        for candidate in candidates:
            try:
                adapter.validate_python(candidate)
            except ValidationError:
                continue
            return candidate
    return candidates[0]
