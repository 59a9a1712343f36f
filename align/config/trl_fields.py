"""The keys under ``trainer:``, read off the installed libraries without importing them.

Importing ``trl.DPOConfig`` takes six seconds and ``align plan`` answers in one, so the names, types and defaults of a
configuration class are taken from its source by ``ast``. They are therefore those of the installed version, always.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

_BASES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
)
_NAMES = {"Any": Any, "Literal": Literal}
_PLAIN = ("bool", "int", "float", "str", "list", "dict", "None")
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list": "a list",
    "dict": "a mapping (key: value)",
    "Literal": "false",
}
_WORD = (
    r"`'?(\w+)'?`(?: \(\w+\))?"  # as help texts write a value: `'hinge'`, or `reverse_kl` (default)
)
_CHOICES = re.compile(rf"Possible values are: ({_WORD}(?:, {_WORD})*)")

# What a chain decides itself, and where the user says it instead.
OWNED = {
    "output_dir": "Align writes under `--runs`",
    "seed": "set `seed` on the stage itself",
    "data_seed": "set `seed` on the stage itself",
    "beta": "set `beta` on the stage itself",
    "desirable_weight": "set `desirable_weight` on the stage itself",
    "undesirable_weight": "set `undesirable_weight` on the stage itself",
    "resume_from_checkpoint": "Align resumes by itself; `--force STAGE` starts anew",
    "use_cpu": "choose the device with `accelerate launch --config_file`",
    "do_train": "a stage always trains",
    "do_eval": "set `eval_strategy`",
    "do_predict": "use an `evaluate` stage",
    "disable_tqdm": "Align draws the progress itself",
    "push_to_hub": "push the finished folder with `huggingface-cli upload`",
    "save_only_model": "Align needs whole checkpoints to resume",
    "precompute_ref_log_probs": "Align computes them once, ahead, and keeps them beside the runs",
    "model_init_kwargs": "set `dtype` and `revision` on the stage itself",
    "ignore_data_skip": "a resumed run sees each row as often as one never stopped",
}

# Lower bounds that the configuration classes do not check: torch does, with a traceback, once training begins.
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "num_train_epochs": 1e-9,  # above 0: without a step a stage would leave what it found
    "save_total_limit": 2,  # one may be cut off while it is written
    "max_length": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


@dataclass(frozen=True, slots=True)
class TRLField:
    """One field of a configuration class: annotation and default as written, and the values it says it takes."""

    annotation: str
    default: str | None
    choices: tuple[str, ...] = ()


@cache
def _parsed(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is a dependency"
    path = Path(spec.submodule_search_locations[0]) / file
    return ast.parse(path.read_text(encoding="utf-8"))


def _class_fields(package: str, file: str, name: str) -> dict[str, TRLField]:
    tree = _parsed(package, file)
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    fields = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            fields[node.target.id] = TRLField(
                ast.unparse(node.annotation), _default(node.value), _choices(node.value)
            )
    return fields


def _default(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call):  # field(default=..., metadata=...)
        default = _argument(value, "default")
        return None if default is None else ast.unparse(default)
    return None if value is None else ast.unparse(value)


def _argument(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _choices(value: ast.expr | None) -> tuple[str, ...]:
    """The values in ``metadata={"choices": [...]}``; without it, those that the help text counts up."""
    metadata = _argument(value, "metadata") if isinstance(value, ast.Call) else None
    if not isinstance(metadata, ast.Dict):
        return ()
    told = {}
    for key, node in zip(metadata.keys, metadata.values, strict=True):
        try:
            told[ast.literal_eval(key) if key else None] = ast.literal_eval(node)
        except ValueError:
            continue  # computed when the class is made
    if isinstance(told.get("choices"), list):
        return tuple(told["choices"])
    counted = _CHOICES.search(str(told.get("help", "")))
    return tuple(re.findall(_WORD, counted[1])) if counted else ()


@cache
def trl_fields(config: str) -> dict[str, TRLField]:
    """All fields of a TRL configuration class such as ``"DPOConfig"``, the inherited ones included.

    Source: the installed packages' own files, so a new version of TRL needs no change here.
    """
    keys: dict[str, TRLField] = {}
    own = ("trl", f"trainer/{config.removesuffix('Config').lower()}_config.py", config)
    for base in (*_BASES, own):
        keys |= _class_fields(*base)
    enums = _enums()
    for name, key in keys.items():
        words = re.findall(r"\w+", key.annotation)
        choices = next((enums[word] for word in words if word in enums), ())
        if choices and not key.choices:
            keys[name] = replace(key, choices=choices)
    return keys


def _enums() -> dict[str, tuple[str, ...]]:
    """The values of transformers' enumerations of words, such as ``SchedulerType``."""
    found = {}
    for file in ("trainer_utils.py", "training_args.py"):
        for node in _parsed("transformers", file).body:
            if isinstance(node, ast.ClassDef) and "Enum" in " ".join(map(ast.unparse, node.bases)):
                values = [item.value for item in node.body if isinstance(item, ast.Assign)]
                texts = [v.value for v in values if isinstance(v, ast.Constant)]
                found[node.name] = tuple(text for text in texts if isinstance(text, str))
    return found


def python_type(annotation: str) -> Any:
    """The type behind an annotation as written; names that are not plain (enums of strings) become ``str``."""
    parts = []
    for node in _union(ast.parse(annotation, mode="eval").body):
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        plain = names <= {*_PLAIN, *_NAMES}
        parts.append(ast.unparse(node) if plain else "str")
    return eval(" | ".join(parts), dict(_NAMES))  # the text is from an installed package


def _union(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_union(node.left), *_union(node.right)]
    return [node]


@cache
def _adapter(annotation: str) -> TypeAdapter[Any]:
    return TypeAdapter(python_type(annotation), config=ConfigDict(strict=True))


def fits(key: TRLField, value: object) -> bool:
    """Whether ``value`` has the type that the field declares."""
    try:
        _adapter(key.annotation).validate_python(value)
    except ValidationError:
        # A list-valued field also takes one item alone (`loss_type: sigmoid`), as the class itself does.
        return "list[str]" in key.annotation and isinstance(value, str)
    return True


def expected(key: TRLField) -> str:
    """The declared type in words: ``a number``, ``text``, ``a mapping (key: value) or text``."""
    parts = [ast.unparse(node) for node in _union(ast.parse(key.annotation, mode="eval").body)]
    words = [_WORDS.get(part.partition("[")[0], "text") for part in parts if part != "None"]
    return " or ".join(dict.fromkeys(words))


def not_a_choice(key: TRLField, value: object) -> list[tuple[int | None, str]]:
    """The texts in ``value`` that the field does not take, each with its place where ``value`` is a list."""
    items: list[tuple[int | None, object]] = [(None, value)]
    if isinstance(value, list):
        items = list(enumerate(value))
    return [
        (place, item)
        for place, item in items
        if key.choices and isinstance(item, str) and item not in key.choices
    ]


def too_small(word: str, value: object) -> bool:
    """Whether a number is below what its field can mean."""
    return word in LEAST and isinstance(value, int | float) and not value >= LEAST[word]
