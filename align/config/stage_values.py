"""The values of one stage of a recipe: their validation, and its errors in our words."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from pydantic import ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from align.config import renamed_keys, trl_fields
from align.config.base import Stage
from align.config.control.algorithms import UnknownAlgorithm, algorithms_with
from align.config.control.base import Control
from align.config.overrides import declared_type, nested_models
from align.config.raw_recipe import RawRecipe, stage_class
from align.config.stages import STAGES
from align.errors import did_you_mean, mismatch, most_similar, nearest, shown

_EXPECTED = {  # by pydantic's type of error
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
}


ENVIRONMENT = ("environment", "environment_options")
DECISIVE = ("revision", "chat_template_path", "data_split", *ENVIRONMENT)
"""Keys without which a check could find errors that are none."""


@dataclass(frozen=True, slots=True)
class InvalidStage:
    """A stage with errors, or one that depends on such a stage, for further checks."""

    config: Stage
    """Its settings. Wrong ones have the default, or are empty if they are required."""
    wrong: frozenset[tuple[str, ...]] = frozenset()
    """The keys whose values are wrong."""
    wrong_inputs: frozenset[tuple[str, ...]] = frozenset()
    """The keys that name no input."""
    contradicted: frozenset[str] = frozenset()
    """The keys of the environment that an error between keys is about."""

    def lacks(self, keys: Sequence[str]) -> bool:
        """Whether the value at ``keys`` is wrong, part of a wrong one, or contradicted."""
        return not self.contradicted.isdisjoint(keys[:1]) or any(
            tuple(keys[: len(wrong)]) == wrong for wrong in self.wrong
        )

    def lacks_input(self, keys: tuple[str, ...]) -> bool:
        """Whether ``keys`` name no input."""
        return keys in self.wrong_inputs or self.lacks(keys)


def invalid_stages(
    raw: RawRecipe, stages: Mapping[str, Stage], valid: Container[str]
) -> Iterator[tuple[str, InvalidStage]]:
    """The names of the stages that are not ``valid``, with what can be checked further.

    ``stages`` are those whose keys have valid values.
    """
    for name, (_, values) in raw.stages.items():
        cls = stage_class(name, values)
        if name in valid or cls is None:
            continue
        wrong = raw.wrong.get(name, set())
        config = stages[name] if not wrong else _without(cls, values, wrong)
        if config is not None:
            inputs = frozenset(raw.wrong_inputs.get(name, ()))
            contradicted = _contradicted(cls, raw.reports.get(name, ()))
            yield name, InvalidStage(config, frozenset(filter(None, wrong)), inputs, contradicted)


def _contradicted(
    cls: type[Stage], reports: Iterable[tuple[tuple[str | int, ...], str]]
) -> frozenset[str]:
    """The keys of a Gymnasium environment that errors name: it would be refused once more."""
    keys = ENVIRONMENT if issubclass(cls, Control) else ()
    return frozenset(
        key
        for key in keys
        for at, message in reports
        if key in at[:1] or re.search(rf"`{key}\b", message)
    )


def _without(
    cls: type[Stage], values: dict[str, Any], wrong: Collection[tuple[str, ...]]
) -> Stage | None:
    """The configuration of a stage without its wrong values; None if too little is left of it."""
    names = {each for keys in wrong for each in keys[:2]}
    if any(name in DECISIVE or most_similar(name, DECISIVE) for name in names):
        return None
    if issubclass(cls, Control) and any(_is_misspelled_algorithm(name) for name in names):
        return None  # the class may be another one
    values = copy.deepcopy(values)
    for keys in wrong:
        _remove(values, keys)
    unchecked = _without_checks(cls)
    for _ in range(2):
        try:
            valid = unchecked.model_validate(values)
        except ValidationError as error:  # the rest of a mapping is not valid without the value
            for detail in error.errors(include_url=False):
                values.pop(str(detail["loc"][0]), None)
        else:
            return cls.model_construct(valid.model_fields_set, **valid.__dict__)
    return None


def _remove(values: Any, keys: tuple[str, ...]) -> None:
    """Remove a value from nested mappings; if it is in a list, the whole list."""
    for i, key in enumerate(keys):
        if not isinstance(values, dict) or key not in values:
            return
        if i == len(keys) - 1 or not isinstance(values[key], dict):
            del values[key]
            return
        values = values[key]


def _placeholder(annotation: Any) -> Any:
    """The value of a required key that is missing: empty, or None."""
    return "" if annotation is str else [] if get_origin(annotation) is list else None


@functools.cache
def _without_checks(cls: type[Stage]) -> type[Stage]:
    """A class with the same keys, all of them optional and none compared with another."""
    checks = cls.__pydantic_decorators__.model_validators
    optional: dict[str, Any] = {
        name: (field.rebuild_annotation(), _placeholder(field.annotation))
        for name, field in cls.model_fields.items()
        if field.is_required()
    }
    unchecked: dict[str, Any] = {
        name: model_validator(mode="after")(lambda self: self)
        for name, check in checks.items()
        if check.info.mode == "after"
    }
    return create_model(cls.__name__, __base__=cls, __validators__=unchecked, **optional)


def validate_values(name: str, values: dict[str, Any], raw: RawRecipe) -> Stage | None:
    """The configuration of a stage; None if it has errors, which are reported."""
    cls = stage_class(name, values)
    if cls is None:
        kind = values.get("stage", name)
        hint = nearest(str(kind), STAGES)
        if "stage" in values:
            raw.report(name, ["stage"], f"expected a kind of stage, got {shown(kind)}{hint}")
        else:
            message = f"no kind of stage is called `{name}`{hint}"
            raw.report(name, [], f"{message} (any other name needs `stage: KIND`)")
        return None
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        if issubclass(cls, Control):
            details = _without_consequences(details)
        for detail in details:
            _report(name, cls, detail, raw)
        if all(detail["loc"] for detail in details):  # pydantic compares valid keys only
            for message in _conflicts(cls, values, raw.wrong[name]):
                raw.report(name, [], message)
        return None


def _is_misspelled_algorithm(key: str) -> bool:
    """Whether a key is like the one that decides the class of a ``control`` stage."""
    return key != "algorithm" and most_similar(key, Control.model_fields) == "algorithm"


def _without_consequences(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """The errors of a ``control`` stage that do not depend on an ``algorithm`` that is misspelled.

    Without that key, the class is that of the default algorithm.
    """
    unknown = {str(each["loc"][-1]) for each in details if each["type"] == "extra_forbidden"}
    if not any(_is_misspelled_algorithm(key) for key in unknown):
        return details
    required = {key for key, field in UnknownAlgorithm.model_fields.items() if field.is_required()}
    return [
        each
        for each in details
        if not (each["type"] == "missing" and each["loc"][-1] not in required)
        and not (each["type"] == "extra_forbidden" and algorithms_with(str(each["loc"][-1])))
    ]


def _conflicts(
    cls: type[Stage], values: dict[str, Any], wrong: Collection[tuple[str, ...]]
) -> Iterator[str]:
    """The errors between the keys of a stage with ``wrong`` ones.

    Those that name a wrong key, or one like it, are left out.
    """
    config = _without(cls, values, wrong)
    required = {key for key, field in cls.model_fields.items() if field.is_required()}
    if config is None or not required <= config.model_fields_set:
        return
    names = {each for keys in wrong for each in keys}
    names |= {most_similar(name, cls.model_fields) or name for name in names}
    for message in config.conflicts():
        if not any(name in message for name in names):
            yield message


def _report(name: str, cls: type[Stage], detail: ErrorDetails, raw: RawRecipe) -> None:
    """Report an error of pydantic in our words."""
    keys = [key for key in detail["loc"] if not str(key).startswith("«")]  # without tags
    value = detail["input"]
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            message = f"unknown key{_key_hint(cls, keys)}"
        case "missing":
            message = "missing; it has no default"
        case "literal_error":
            expected = re.sub(
                r"\b(True|False)\b", lambda word: word[0].lower(), context["expected"]
            )
            message = f"expected {expected}, got {shown(value)}"
            if isinstance(value, str):
                choices = re.findall(r"'([^']+)'", context["expected"])
                message += did_you_mean(value, choices)
        case "value_error":
            *others, message = str(context["error"]).split("\n")
            for other in others:
                raw.report(name, keys, other)
        case kind if kind in _EXPECTED:
            message = mismatch(_EXPECTED[kind], value, raw.text(name, keys))
        case _:
            message = f"{detail['msg'].replace('Input should', 'must')}, got {shown(value)}"
    raw.report(name, keys, message)


def _key_hint(cls: type[Stage], keys: list[str | int]) -> str:
    """What an unknown key may have been meant to be."""
    key = str(keys[-1])
    if len(keys) == 1:
        renamed = renamed_keys.hint([cls], key)
        if renamed:
            return renamed
        fields = trl_fields.trl_fields(cls.trainer_config) if cls.trainer_config else {}
        if key in fields and not trl_fields.reserved(str(cls.trainer_config), key):
            return f"; it is a field of TRL's {cls.trainer_config}; put it under `trainer:`"
    if len(keys) == 1 and issubclass(cls, Control) and (others := algorithms_with(key)):
        return f"; algorithms with this key: {', '.join(others)}; remove it, or change `algorithm`"
    declared: Any = cls if len(keys) == 1 else declared_type(cls, [str(k) for k in keys[:-1]])
    known = list(dict.fromkeys(n for each in nested_models(declared) for n in each.model_fields))
    if key in known:  # of another one of several mappings, such as two kinds of judge
        return "; it has no meaning beside the other keys here; remove it or them"
    return nearest(key, known)


def check_trainer(name: str, cls: type[Stage], values: dict[str, Any], raw: RawRecipe) -> None:
    """Check the fields under ``trainer`` against TRL's class."""
    trainer = values.get("trainer")
    if cls.trainer_config is None or not isinstance(trainer, dict):
        return
    for key, value in trainer.items():
        keys = ("trainer", key)
        text = raw.text(name, keys)
        for below, message in trl_fields.check(cls.trainer_config, key, value, text):
            if "no field" in message and key in cls.model_fields:
                message = f"no field of TRL's {cls.trainer_config}; `{key}` is a key of the stage"
            raw.report(name, (*keys, *below), message)
