"""The fields of TRL's configuration classes, and the checks of the values under ``trainer``.

They are read from ``trl_fields.json``, because importing TRL takes seconds. After an upgrade of
TRL, write that file again: ``python -m align.training.trl_field_table``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from align.errors import did_you_mean, mismatch, nearest, shown

FILE = Path(__file__).with_name("trl_fields.json")
COMMON = "common"  # the key of the fields that all classes share
_NAMES: dict[str, Any] = {"Any": Any, "Literal": Literal, "None": None, "__builtins__": {}}
_NAMES |= {t.__name__: t for t in (bool, int, float, str, list, dict)}
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list": "a list",
    "dict": "a mapping (key: value)",
    "Literal": "false",
}

RESERVED = {  # field → what to do instead
    "output_dir": "Align writes under `--runs`",
    "seed": "set `seed` on the stage",
    "data_seed": "set `seed` on the stage",
    "beta": "set `beta` on the stage",
    "desirable_weight": "set `desirable_weight` on the stage",
    "undesirable_weight": "set `undesirable_weight` on the stage",
    "resume_from_checkpoint": "Align resumes by itself; `--force STAGE` starts again",
    "use_cpu": "choose the device with `accelerate launch --config_file`",
    "do_train": "a stage always trains",
    "do_eval": "set `eval_strategy`",
    "do_predict": "use an `evaluate` stage",
    "disable_tqdm": "Align displays the progress itself",
    "push_to_hub": "push the finished folder with `huggingface-cli upload`",
    "save_only_model": "Align needs complete checkpoints to resume",
    "precompute_ref_log_probs": "Align computes them once before training and caches them",
    "model_init_kwargs": "set `dtype` and `revision` on the stage",
    "trust_remote_code": "Align never runs the code of a model repository",
    "ignore_data_skip": "a resumed run reads each row as often as an uninterrupted one",
}
"""Fields that the pipeline sets itself."""

MINIMUM = {
    "learning_rate": 0,
    "weight_decay": 0,
    "num_train_epochs": 1e-9,  # above 0: without a step, a stage would leave the model unchanged
    "save_total_limit": 2,  # one checkpoint may be incomplete after an interruption
    "max_length": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
"""Lower bounds that TRL's classes do not check: PyTorch does, with a traceback, once training
begins."""


@dataclass(frozen=True, slots=True)
class TRLField:
    """One field of a configuration class; the type of an enumeration is ``str``."""

    annotation: str
    default: Any = None
    choices: tuple[str, ...] = ()


@cache
def trl_fields(config: str) -> dict[str, TRLField]:
    """All fields of a TRL configuration class such as ``"DPOConfig"``, including inherited ones."""
    classes = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: TRLField(each["type"], each.get("default"), tuple(each.get("choices", ())))
        for name, each in (classes[COMMON] | classes[config]).items()
    }


def check(config: str, name: str, value: object, text: str | None) -> Iterator[tuple[Any, str]]:
    """The errors of one field under ``trainer``: the keys below the field, and the message.

    ``text`` is the value as written in the file, if known.
    """
    field = trl_fields(config).get(name)
    if field is None:
        hint = did_you_mean(name, trl_fields(config))
        yield (), f"no field of TRL's {config}{hint}"
    elif name in RESERVED:
        yield (), f"cannot be set under `trainer`; {RESERVED[name]}"
    elif not fits(field, value):
        yield (), mismatch(expected(field), value, text)
    elif too_small(name, value):
        yield (), f"must be at least {MINIMUM[name]}, got {shown(value)}"
    else:
        for position, item in invalid_choices(field, value):
            below = () if position is None else (position,)
            yield below, f"no such {name}: {item}{nearest(item, field.choices)}"


@cache
def python_type(annotation: str) -> Any:
    """The type of an annotation as written in ``trl_fields.json``."""
    return eval(annotation, dict(_NAMES))  # the text comes from this package


@cache
def _adapter(annotation: str) -> TypeAdapter[Any]:
    return TypeAdapter(python_type(annotation), config=ConfigDict(strict=True))


def fits(field: TRLField, value: object) -> bool:
    """Whether ``value`` has the type of the field."""
    try:
        _adapter(field.annotation).validate_python(value)
    except ValidationError:
        # A list-valued field also accepts one item (`loss_type: sigmoid`), as the class does.
        return "list[str]" in field.annotation and isinstance(value, str)
    return True


def expected(field: TRLField) -> str:
    """The type in words: ``a number``, ``text``, ``a mapping (key: value) or text``."""
    parts = [part.partition("[")[0] for part in field.annotation.split(" | ")]
    return " or ".join(dict.fromkeys(_EXPECTED.get(p, "text") for p in parts if p != "None"))


def invalid_choices(field: TRLField, value: object) -> list[tuple[int | None, str]]:
    """The texts in ``value`` that the field does not accept, with their positions in a list."""
    items: list[tuple[int | None, object]] = [(None, value)]
    if isinstance(value, list):
        items = list(enumerate(value))
    return [
        (position, item)
        for position, item in items
        if field.choices and isinstance(item, str) and item not in field.choices
    ]


def too_small(name: str, value: object) -> bool:
    """Whether a number is below the smallest valid one."""
    return name in MINIMUM and isinstance(value, int | float) and not value >= MINIMUM[name]
