"""The fields of TRL's configuration classes, and the checks of the values under ``trainer``.

They are read from ``trl_fields.json``, because importing TRL takes seconds. After an upgrade of
TRL, write that file again: ``python -m align.training.trl_field_table``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from align.config import optimizers
from align.errors import did_you_mean, mismatch, nearest, shown

FILE = Path(__file__).with_name("trl_fields.json")
COMMON = "common"  # the key of the fields that all classes share
SCHEDULERS = "lr_scheduler_kwargs"  # the key of the arguments of each schedule
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

_BY_LAUNCHER = "set it in the file of `accelerate launch --config_file`"
_BY_HUB = "push the finished folder with `hf upload`"
_FINITE = "a loss that is not finite ends the stage, with its step and batch"
_EVALUATION = "an evaluation during training computes the loss and TRL's metrics"
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
    "save_only_model": "Align needs complete checkpoints to resume",
    "precompute_ref_log_probs": "Align computes them once before training and caches them",
    "model_init_kwargs": "set `dtype` and `revision` on the stage",
    "trust_remote_code": "Align never runs the code of a model repository",
    "ignore_data_skip": "a resumed run reads each row as often as an uninterrupted one",
    **dict.fromkeys(
        ("push_to_hub", "hub_always_push", "hub_model_id", "hub_private_repo"), _BY_HUB
    ),
    **dict.fromkeys(("hub_revision", "hub_strategy", "hub_token"), _BY_HUB),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _BY_LAUNCHER),
    **dict.fromkeys(("local_rank", "ddp_backend"), _BY_LAUNCHER),
    **dict.fromkeys(("debug", "logging_nan_inf_filter"), _FINITE),
    **dict.fromkeys(("batch_eval_metrics", "eval_do_concat_batches", "label_names"), _EVALUATION),
    **dict.fromkeys(("eval_use_gather_object", "include_for_metrics"), _EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "prediction_loss_only"), _EVALUATION),
    "auto_find_batch_size": "set `per_device_train_batch_size`, which is part of the result",
    "dataset_kwargs": "TRL tokenizes the conversations of the prepared tables",
    "dataset_text_field": "the prepared tables have conversations",
    "enable_jit_checkpoint": "Align writes a checkpoint when it is stopped",
    "length_column_name": "the prepared tables have no lengths; TRL counts the tokens",
    "log_on_each_node": "the main process logs",
    "restore_callback_states_from_checkpoint": "Align's callbacks have no state",
    "save_on_each_node": "all processes share the folder of the stage",
    "use_cache": "training needs no key/value cache",
}
"""Fields that the pipeline sets itself, or that would have no effect in it."""
_REWARD_ROWS = "set it in the `sft` stage; the reward model reads the rows of its policy"
RESERVED_IN = {
    "KTOConfig": {"dataloader_drop_last": "all batches of an epoch are full"},
    "DPOConfig": {"padding_free": "TRL ignores it; `prefix_sharing` skips padding"},
    "SFTConfig": {
        "assistant_only_loss": "set `train_on` on the stage",
        "padding_free": "it requires rows without a limit; `prefix_sharing` skips padding",
    },
    "RewardConfig": dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), _REWARD_ROWS),
}
"""Fields that are reserved in one class of TRL."""

RANGES = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), "[0, inf)"),
    **dict.fromkeys(("router_aux_loss_coef", "center_rewards_coefficient"), "[0, inf)"),
    **dict.fromkeys(("eval_delay", "warmup_steps", "dataloader_num_workers"), "[0, inf)"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), "[0, 1)"),
    **dict.fromkeys(("ld_alpha", "ref_model_mixup_alpha"), "[0, 1]"),
    "label_smoothing": "[0, 0.5)",
    # Without a step, a stage would leave the model unchanged.
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), "(0, inf)"),
    **dict.fromkeys(("neftune_noise_alpha", "discopop_tau"), "(0, inf)"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "[1, inf)"),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), "[1, inf)"),
    **dict.fromkeys(("ref_model_sync_steps", "precompute_ref_batch_size"), "[1, inf)"),
    **dict.fromkeys(("dataset_num_proc", "dataloader_prefetch_factor"), "[1, inf)"),
    **dict.fromkeys(("ddp_timeout", "ddp_bucket_cap_mb", "torch_empty_cache_steps"), "[1, inf)"),
    **dict.fromkeys(("pad_to_multiple_of", "max_steps"), "[1, inf)"),
    "max_length": "[2, inf)",  # of a single token, nothing is predicted
    "save_total_limit": "[2, inf)",  # one checkpoint may be incomplete after an interruption
}
"""Intervals of numbers that TRL's classes do not check; a default outside of them is valid too.

PyTorch checks some of them, with a traceback, once training begins.
"""

_CHECKPOINTING = {
    "use_reentrant": "bool", "preserve_rng_state": "bool", "determinism_check": "str",
    "debug": "bool", "early_stop": "bool", "selective": "bool",
}  # fmt: skip
MAPPINGS = {
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "accelerator_config": {"even_batches": "bool", "non_blocking": "bool"},
}
"""The keys of mappings, with their types.

Of ``accelerator_config``, those that keep the batches and the order of rows.
"""

PAIR_CONFIGS = ("DPOConfig", "RewardConfig")
"""Classes whose trainers read pairs."""
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "discopop_tau": ("loss_type", ("discopop",)),
    "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
    "label_smoothing": ("loss_type", ("exo_pair", "robust", "aot", "aot_unpaired")),
    "label_smoothing_factor": ("loss_type", ("nll",)),
    "ref_model_mixup_alpha": ("sync_ref_model", (True,)),
    "ref_model_sync_steps": ("sync_ref_model", (True,)),
    "packing_strategy": ("packing", (True,)),
    "eval_packing": ("packing", (True,)),
    "eval_steps": ("eval_strategy", ("steps",)),
    "eval_delay": ("eval_strategy", ("steps", "epoch")),
    "save_steps": ("save_strategy", ("steps",)),
    "logging_steps": ("logging_strategy", ("steps",)),
    "greater_is_better": ("metric_for_best_model", ()),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", (True,)),
    "liger_kernel_config": ("use_liger_kernel", (True,)),
    "dataloader_prefetch_factor": ("dataloader_num_workers", ()),
    "dataloader_persistent_workers": ("dataloader_num_workers", ()),
    "dataloader_multiprocessing_context": ("dataloader_num_workers", ()),
}
"""Fields that have an effect only with a value of another field; any value except the default, if
none is listed."""

REPORTING = frozenset((
    "report_to", "run_name", "project", "include_num_input_tokens_seen",
    "skip_memory_metrics", "logging_steps", "logging_strategy", "logging_first_step",
    "log_level", "log_level_replica",
    "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "ddp_timeout",
))  # fmt: skip
"""Fields that change what is logged, where, or how fast, and never the trained model."""
PLAIN = REPORTING | {
    "learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps",
    "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "max_length", "bf16", "gradient_checkpointing", "loss_type",
    "loss_weights", "label_smoothing", "chat_template_path", "eos_token", "eval_strategy",
    "eval_steps", "save_steps", "save_total_limit", "center_rewards_coefficient",
}  # fmt: skip
"""Fields with values that TRL accepts once they have passed the checks here."""
SAVING = frozenset(("save_strategy", "save_steps", "save_total_limit"))
"""Fields that decide which checkpoints exist: a resumed run trains the same model from any."""


@dataclass(frozen=True, slots=True)
class TRLField:
    """One field of a configuration class; the type of an enumeration is ``str``."""

    annotation: str
    default: Any = None
    choices: tuple[str, ...] = ()


@cache
def _file() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


@cache
def trl_fields(config: str) -> dict[str, TRLField]:
    """All fields of a TRL configuration class such as ``"DPOConfig"``, including inherited ones."""
    classes = _file()
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
    elif reason := reserved(config, name):
        yield (), f"cannot be set under `trainer`; {reason}"
    elif not fits(field, value):
        yield (), mismatch(expected(field), value, text)
    elif isinstance(value, float) and not math.isfinite(value):
        yield (), f"must be a finite number, got {shown(value)}"
    elif out_of_range(name, value) and value != field.default:
        yield (), f"must be {_in_words(RANGES[name])}, got {shown(value)}"
    elif name in MAPPINGS and value is not None:
        yield from _mapping_errors(MAPPINGS[name], value)
    else:
        for position, item in invalid_choices(field, value):
            below = () if position is None else (position,)
            yield below, f"no such {name}: {item}{nearest(item, field.choices)}"


def reserved(config: str, name: str) -> str | None:
    """What to do instead of setting a field; None if it can be set."""
    return RESERVED.get(name) or RESERVED_IN.get(config, {}).get(name)


def conflicts(config: str, trainer: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The errors between fields under ``trainer``: their keys, and the messages."""
    fields = trl_fields(config)
    valid = {name: value for name, value in trainer.items() if name in fields}

    def value_of(name: str) -> Any:
        return valid.get(name, fields[name].default)

    for name in valid.keys() & NEEDS.keys():
        other, values = NEEDS[name]
        if valid[name] == fields[name].default:
            continue
        if other not in fields:
            yield (name,), f"has no effect in {config}; remove it"
        elif not _is_met(value_of(other), values, fields[other].default):
            choices = " or ".join(str(v).lower() if v in (True, False) else v for v in values)
            needed = f"`{other}: {choices}`" if values else f"`{other}`"
            reason = f"it has an effect only with {needed}"
            yield (name,), f"{reason}; set {needed}, or remove `{name}`"
    if value_of("lr_scheduler_type") == "constant" and value_of("warmup_steps"):
        yield (
            ("warmup_steps",),
            "`lr_scheduler_type: constant` has no warmup; set `constant_with_warmup`",
        )
    by_length = ("group_by_length", "batch_rebalance")
    if config in PAIR_CONFIGS and valid.get("train_sampling_strategy") in by_length:
        yield (
            ("train_sampling_strategy",),
            "TRL cannot measure the length of pairs; set `random` or `sequential`",
        )
    losses = valid.get("loss_type")
    if "exo_pair" in (losses if isinstance(losses, list) else [losses]):
        if value_of("label_smoothing") == 0:
            yield (
                ("loss_type",),
                "`exo_pair` requires label smoothing; set `label_smoothing` above 0 "
                "(1.0e-3 in the paper)",
            )
    if valid.get("fp16") is True and valid.get("bf16") is True:
        yield ("fp16",), "at most one of `fp16` and `bf16` can be true; remove one of them"
    accelerator = valid.get("accelerator_config")
    if isinstance(accelerator, dict) and accelerator.get("even_batches") is False:
        message = "processes with fewer batches would let the others wait for ever; remove it"
        yield ("accelerator_config", "even_batches"), message
    weights = valid.get("loss_weights")
    if isinstance(weights, list):
        losses = value_of("loss_type")
        n_losses = len(losses) if isinstance(losses, list) else 1
        if len(weights) != n_losses:
            message = f"{len(weights)} weights for {n_losses} of `loss_type`; list one for each"
            yield ("loss_weights",), message
    changed = {name: value for name, value in valid.items() if value != fields[name].default}
    for name, message in optimizers.field_errors(str(value_of("optim")), changed):
        yield (name,), message
    scheduler = str(value_of("lr_scheduler_type"))
    kwargs = valid.get("lr_scheduler_kwargs")
    if kwargs is not None and scheduler in scheduler_fields():
        for below, message in _mapping_errors(scheduler_fields()[scheduler], kwargs):
            yield ("lr_scheduler_kwargs", *below), f"{message} (of `{scheduler}`)"


def _is_met(value: Any, values: tuple[Any, ...], default: Any) -> bool:
    """Whether a field has one of the values; without values, whether it is not the default."""
    items = value if isinstance(value, list) else [value]
    return any(item in values for item in items) if values else value != default


def scheduler_fields() -> dict[str, dict[str, str]]:
    """The keys of ``lr_scheduler_kwargs`` for each schedule, with their types."""
    schedules: dict[str, dict[str, str]] = _file()[SCHEDULERS]
    return schedules


def _mapping_errors(
    keys: Mapping[str, str], value: object
) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The errors of a mapping whose keys have these types."""
    if not isinstance(value, dict):
        yield (), mismatch("a mapping (key: value)", value, None)
        return
    for key, item in value.items():
        if key not in keys:
            allowed = ", ".join(keys) or "no keys"
            yield (key,), f"no such key{did_you_mean(str(key), keys)}; allowed: {allowed}"
        elif not fits(field := TRLField(keys[key]), item):
            yield (key,), mismatch(expected(field), item, None)


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


def out_of_range(name: str, value: object) -> bool:
    """Whether a number lies outside of the interval of a field."""
    if name not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = _ends(RANGES[name])
    above = value > low if RANGES[name][0] == "(" else value >= low
    below = value < high if RANGES[name][-1] == ")" else value <= high
    return not (above and below)


def _ends(interval: str) -> tuple[float, float]:
    low, high = map(float, interval[1:-1].split(","))
    return low, high


def _in_words(interval: str) -> str:
    """An interval in words.

    >>> _in_words("[0, inf)"), _in_words("(0, inf)"), _in_words("[0, 1)")
    ('at least 0', 'above 0', 'at least 0 and below 1')
    """
    low, high = _ends(interval)
    words = f"{'above' if interval[0] == '(' else 'at least'} {low:g}"
    if math.isinf(high):
        return words
    return f"{words} and {'below' if interval[-1] == ')' else 'at most'} {high:g}"
