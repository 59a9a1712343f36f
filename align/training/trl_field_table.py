"""Write ``align/config/trl_fields.json``, the fields of TRL's configuration classes.

Run ``python -m align.training.trl_field_table`` after an upgrade of TRL. Importing TRL takes
seconds, and ``align plan`` should take one, so :mod:`align.config.trl_fields` reads this file
instead. A test compares it with the installed TRL.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

from align.config.stages import STAGES
from align.config.trl_fields import COMMON, FILE, SCHEDULERS
from align.training.trl_trainer import config_class

_WORD = r"`'?(\w+)'?`(?: \(\w+\))?"  # a value in a help text: `'hinge'`, or `reverse_kl` (default)
_UNDECLARED_CHOICES = {
    "report_to": ["none", "all", *INTEGRATION_TO_CALLBACK],
    "pad_to_multiple_of": ["auto"],
    "include_num_input_tokens_seen": ["all", "non_padding", "no"],
}
_CHOICES = re.compile(rf"Possible values are: ({_WORD}(?:, {_WORD})*)")


def table() -> dict[str, dict[str, Any]]:
    """The fields of each class by name, those that are equal in all classes under one key."""
    names = sorted({cls.trainer_config for cls in STAGES.values() if cls.trainer_config})
    classes = {name: _fields(config_class(name)) for name in names}
    first = classes[names[0]]
    common = {f: v for f, v in first.items() if all(c.get(f) == v for c in classes.values())}
    own = {n: {f: v for f, v in c.items() if f not in common} for n, c in classes.items()}
    return {COMMON: common, **own, SCHEDULERS: _schedulers()}


def text() -> str:
    """The content of the file: one field per line."""
    parts = []
    for name, fields in table().items():
        lines = [f"  {json.dumps(f)}: {json.dumps(v)}" for f, v in sorted(fields.items())]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _schedulers() -> dict[str, dict[str, str]]:
    """The arguments of each schedule of the learning rate, with their types."""
    given = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
    classes = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    return {
        str(kind.value): {
            name: _scheduler_type(parameter)
            for name, parameter in inspect.signature(
                classes.get(kind.value, function)
            ).parameters.items()
            if name not in given
        }
        for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()
    }


def _scheduler_type(parameter: inspect.Parameter) -> str:
    """The annotation of a parameter, else the type of its default."""
    hint = str(parameter.annotation).replace("typing.", "")
    return type(parameter.default).__name__ if "inspect._empty" in hint else hint


def _fields(cls: Any) -> dict[str, dict[str, Any]]:
    hints = get_type_hints(cls)
    return {
        field.name: _field(field, hints[field.name])
        for field in dataclasses.fields(cls)
        if field.init
    }


def _field(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    result: dict[str, Any] = {"type": " | ".join(dict.fromkeys(_type_name(part) for part in parts))}
    default: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is not dataclasses.MISSING:
        result["default"] = default.value if isinstance(default, enum.Enum) else default
    choices = _choices(field, parts)
    return result | ({"choices": choices} if choices else {})


def _type_name(part: Any) -> str:
    if part is type(None):
        return "None"
    if get_origin(part) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(part)))}]"
    if part in (bool, int, float, str, list, dict):
        return str(part.__name__)
    name = str(part).replace("typing.", "")
    return name if get_origin(part) in (list, dict) and "." not in name else "str"  # or an enum


def _choices(field: dataclasses.Field[Any], parts: tuple[Any, ...]) -> list[str]:
    """The values in the metadata, else those in the help text, else those of an enumeration."""
    if field.name in _UNDECLARED_CHOICES:
        return _UNDECLARED_CHOICES[field.name]
    declared = field.metadata.get("choices")
    if isinstance(declared, list):
        return declared
    listed = _CHOICES.search(str(field.metadata.get("help", "")))
    if listed:
        return re.findall(_WORD, listed[1])
    enums = (part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum))
    return next(([str(item.value) for item in part] for part in enums), [])


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
