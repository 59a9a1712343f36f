"""Configurations of TRL, LLaMA-Factory and axolotl as recipes.

Keys that Hugging Face's training arguments share keep their names under ``trainer:``; the tables
rename the others. A key without a counterpart, or whose value Align refuses, becomes a comment with
the reason, so that nothing is lost without a trace. Left out: configurations of several data sets
with weights, whose first data set is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.recipe import read_recipe
from align.config.yaml_loader import read_yaml
from align.errors import NUMBER, RecipeError, shown

TOOLS = ("TRL", "LLaMA-Factory", "axolotl")
METHODS = ("sft", "dpo", "kto", "reward")
"""Kinds of stages that a configuration may become."""
_PROBLEM = re.compile(r"[^:]*: (?P<keys>[\w.]+): (?P<reason>.*)", re.DOTALL)
_DATA_KEY = {"sft": "demonstrations", "dpo": "pairs", "kto": "preferences", "reward": "pairs"}


@dataclass(slots=True)
class Translation:
    """A recipe under construction, and what it could not take over."""

    tool: str
    method: str
    prepare: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, Any, str]] = field(default_factory=list)
    """Keys of the configuration that have no counterpart, their values, and the reason."""

    def recipe(self) -> dict[str, Any]:
        """The recipe as a mapping."""
        stage = dict(self.stage)
        if self.lora:
            stage["lora"] = self.lora
        if self.trainer:
            stage["trainer"] = self.trainer
        stage[_DATA_KEY[self.method]] = "prepare"
        return {"stages": {"prepare": self.prepare, self.method: stage}}


def translate(file: Path, method: str | None = None) -> Translation:
    """Read a configuration of another tool; ``method`` names the stage where the file does not.

    Raises:
        RecipeError: The file cannot be read, is none of the three tools', or names no method.
    """
    document = read_yaml(file)
    if document.problems:
        raise RecipeError(*document.problems)
    content = document.data
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: expected a mapping of keys, got {shown(content)}")
    tool = _tool(content)
    if tool is None:
        raise RecipeError(
            f"{file}: no configuration of {', '.join(TOOLS)}: no `model_name_or_path` and no "
            "`base_model`"
        )
    online = [key for key in _ONLINE_RL if key in content]
    if method is None and online:
        raise RecipeError(
            f"{file}: `{online[0]}` belongs to online RL, whose configurations are not converted; "
            f"write the stage as in docs/ppo.md, or choose one with --method: {', '.join(METHODS)}"
        )
    found = method or _method(tool, content)
    if found is None:
        raise RecipeError(
            f"{file}: names no method; choose one with --method: {', '.join(METHODS)}"
        )
    translation = Translation(tool, found)
    tables = {"TRL": _TRL, "LLaMA-Factory": _LLAMA_FACTORY, "axolotl": _AXOLOTL}
    for key, value in content.items():
        _place(translation, tables[tool], str(key), value)
    _complete(translation)
    _move_refused(translation)
    return translation


def _tool(content: Mapping[str, Any]) -> str | None:
    if "base_model" in content:
        return "axolotl"
    if "model_name_or_path" not in content:
        return None
    return "LLaMA-Factory" if {"finetuning_type", "template"} & content.keys() else "TRL"


def _method(tool: str, content: Mapping[str, Any]) -> str | None:
    """The kind of stage that a configuration names or implies."""
    if tool == "LLaMA-Factory":
        names = {"sft": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
        return names.get(str(content.get("stage", "")))
    if tool == "axolotl":
        if content.get("reward_model"):
            return "reward"
        names = {"None": "sft", "dpo": "dpo", "ipo": "dpo", "kto": "kto"}
        return names.get(str(content.get("rl")))
    if {"desirable_weight", "undesirable_weight"} & content.keys():
        return "kto"
    if "center_rewards_coefficient" in content:
        return "reward"
    return "dpo" if "beta" in content else None


_ONLINE_RL = ("num_generations", "max_completion_length", "reward_funcs", "reward_model_path")
"""Keys of TRL's GRPO, RLOO and PPO, which have `beta` as DPO has."""

Action = Callable[[Translation, Any], str | None]
"""Puts a value into a translation; returns the reason if it cannot."""


def _to(part: str, key: str) -> Action:
    def act(translation: Translation, value: Any) -> None:
        getattr(translation, part)[key] = value

    return act


def _no(reason: str) -> Action:
    return lambda translation, value: reason


def _list(value: Any) -> list[Any]:
    """A list of names, which some files write with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if isinstance(value, list) else [value]


def _targets(translation: Translation, value: Any) -> None:
    names = _list(value)
    every = names in (["all"], ["all-linear"])
    translation.lora["target_modules"] = "all-linear" if every else names


def _linear_targets(translation: Translation, value: Any) -> None:
    if value:
        translation.lora["target_modules"] = "all-linear"


def _source(translation: Translation, value: Any) -> str | None:
    """The first data set: a name, names with commas, a mapping of weights, or a list."""
    first = value
    if isinstance(value, Mapping):
        first = next(iter(value), "")
    elif isinstance(value, str) and "," in value:
        first = value.partition(",")[0].strip()
    elif isinstance(value, list):
        first = value[0] if value else ""
    if isinstance(first, Mapping):
        translation.prepare["source"] = str(first.get("path", ""))
        if first.get("name"):
            translation.prepare["config"] = first["name"]
        if first.get("split"):
            translation.prepare["data_split"] = first["split"]
    else:
        translation.prepare["source"] = str(first)
    several = isinstance(value, Mapping | list) and len(value) > 1
    return "only the first data set; list several under `mixture`" if several else None


def _registered_source(translation: Translation, value: Any) -> str | None:
    """A data set that a file of LLaMA-Factory describes."""
    _source(translation, value)
    return "`source` is a file, a folder or a Hub id, not a name in dataset_info.json"


def _four_bits(translation: Translation, value: Any) -> str | None:
    if value in (True, 4):
        translation.stage["quantization"] = "nf4"
        return None
    return None if value in (False, None) else "4 bits (`quantization: nf4`) are supported"


def _adapter(translation: Translation, value: Any) -> str | None:
    if value == "qlora":
        translation.stage["quantization"] = "nf4"
    if value in ("lora", "qlora"):
        translation.lora.setdefault("r", 16)
        return None
    return None if value in ("full", None) else "full fine-tuning and LoRA are supported"


def _precision(translation: Translation, value: Any) -> None:
    translation.trainer["bf16"] = value in (True, "auto", "full")


def _fraction(translation: Translation, value: Any) -> str | None:
    if isinstance(value, int | float) and 0 <= value < 1:
        translation.prepare["validation_fraction"] = value
        return None
    return "`validation_fraction` is a share of the prompts"


def _loss(translation: Translation, value: Any) -> None:
    if value == "ipo":
        translation.trainer["loss_type"] = "ipo"


def _nothing(translation: Translation, value: Any) -> None:
    return None


_ATTENTION = _no("prefix sharing chooses the attention")
_PADDING = _no("batches are padded to their longest row")
_TEMPLATE = _no("the chat template of the model is used")
_TRACKED = {
    "output_dir": _no("results are written under `--runs`"),
    "overwrite_output_dir": _no("`--force STAGE` runs a stage again"),
    "eval_dataset": _no("`prepare` holds out prompts: `test_fraction`, `validation_fraction`"),
}
_SHARED: dict[str, Action] = _TRACKED | {
    "seed": _to("stage", "seed"),
    "beta": _to("stage", "beta"),
    "lora_alpha": _to("lora", "alpha"),
    "lora_dropout": _to("lora", "dropout"),
    "lora_target_modules": _targets,
    "warmup_ratio": _to("trainer", "warmup_steps"),
    "load_in_4bit": _four_bits,
    "load_in_8bit": _no("4 bits (`quantization: nf4`) are supported"),
    "attn_implementation": _ATTENTION,
}
_TRL: dict[str, Action] = _SHARED | {
    "model_name_or_path": _to("stage", "model"),
    "model_revision": _to("stage", "revision"),
    "dtype": _to("stage", "dtype"),
    "torch_dtype": _to("stage", "dtype"),
    "dataset_name": _source,
    "dataset_mixer": _source,
    "datasets": _source,
    "dataset_config": _to("prepare", "config"),
    "dataset_train_split": _to("prepare", "data_split"),
    "use_peft": _nothing,
    "lora_r": _to("lora", "r"),
    "desirable_weight": _to("stage", "desirable_weight"),
    "undesirable_weight": _to("stage", "undesirable_weight"),
    "chat_template": _TEMPLATE,
}
_LLAMA_FACTORY: dict[str, Action] = _SHARED | {
    "stage": _nothing,
    "do_train": _nothing,
    "model_name_or_path": _to("stage", "model"),
    "adapter_name_or_path": _to("stage", "model"),
    "finetuning_type": _adapter,
    "lora_rank": _to("lora", "r"),
    "lora_target": _targets,
    "quantization_bit": _four_bits,
    "dataset": _registered_source,
    "dataset_dir": _no("`source` is a path"),
    "max_samples": _to("prepare", "max_rows"),
    "val_size": _fraction,
    "cutoff_len": _to("trainer", "max_length"),
    "template": _TEMPLATE,
    "pref_beta": _to("stage", "beta"),
    "pref_loss": _to("trainer", "loss_type"),
    "preprocessing_num_workers": _no("rows are prepared in one process"),
}
_AXOLOTL: dict[str, Action] = _SHARED | {
    "base_model": _to("stage", "model"),
    "revision_of_model": _to("stage", "revision"),
    "datasets": _source,
    "rl": _loss,
    "rl_beta": _to("stage", "beta"),
    "dpo_beta": _to("stage", "beta"),
    "reward_model": _nothing,
    "adapter": _adapter,
    "lora_r": _to("lora", "r"),
    "lora_target_linear": _linear_targets,
    "sequence_len": _to("trainer", "max_length"),
    "sample_packing": _to("trainer", "packing"),
    "micro_batch_size": _to("trainer", "per_device_train_batch_size"),
    "num_epochs": _to("trainer", "num_train_epochs"),
    "lr_scheduler": _to("trainer", "lr_scheduler_type"),
    "optimizer": _to("trainer", "optim"),
    "val_set_size": _fraction,
    "bf16": _precision,
    "chat_template": _TEMPLATE,
    "special_tokens": _no("the tokenizer of the model is used; `trainer.eos_token` ends a turn"),
    "flash_attention": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "pad_to_sequence_len": _PADDING,
    "evals_per_epoch": _no("`trainer.eval_strategy` and `eval_steps` evaluate in training"),
    "saves_per_epoch": _no("`trainer.save_steps` sets when checkpoints are written"),
}


def _place(translation: Translation, table: Mapping[str, Action], key: str, value: Any) -> None:
    """Put one key of the configuration where it belongs; unknown ones under ``trainer``."""
    if isinstance(value, str) and NUMBER.match(value):
        value = float(value)  # YAML reads 5e-6 as text, and these tools convert it
    action = table.get(key, _to("trainer", key))
    reason = action(translation, value) if value is not None else None
    if reason is not None:
        translation.notes.append((key, value, reason))


def _complete(translation: Translation) -> None:
    """Add what a recipe needs and the configuration does not have."""
    translation.prepare.setdefault("source", "FILE")
    translation.prepare.setdefault("test_fraction", 0.1)
    if translation.lora:
        translation.lora.setdefault("r", 16)
        translation.lora.setdefault("alpha", 2 * translation.lora["r"])


def _move_refused(translation: Translation) -> None:
    """Turn what a recipe refuses into notes, until nothing is left that it refuses."""
    parts = {
        ("trainer",): translation.trainer,
        ("lora",): translation.lora,
        (): translation.stage,
    }
    while True:
        moved = False
        for line in read_recipe(translation.recipe(), name="recipe").problems:
            match = _PROBLEM.match(line)
            if match is None:
                continue
            stage, *above, key = match["keys"].split(".")
            part = parts.get(tuple(above), {})
            if stage == "prepare":
                part = translation.prepare
            if key in part and (stage, key) not in (("prepare", "source"), (stage, "model")):
                reason = " ".join(match["reason"].partition("; did you mean")[0].split())
                translation.notes.append((key, part.pop(key), reason))
                moved = True
        if not moved:
            return


def as_yaml(translation: Translation, origin: str) -> str:
    """The recipe as YAML text, with a comment for every key that it could not take over."""
    lines = [f"# From {origin}, a configuration of {translation.tool}.", "stages:"]
    for name, settings in translation.recipe()["stages"].items():
        lines.append(f"  {name}:")
        lines += _lines(settings, "    ")
        if name == translation.method and translation.notes:
            lines.append("    # Not carried over:")
            for key, value, reason in translation.notes:
                lines.append(f"    #   {key}: {_scalar(value)} ({reason})")
    return "\n".join(lines) + "\n"


def _lines(settings: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            lines.append(f"{indent}{key}:")
            lines += _lines(value, f"{indent}  ")
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    """A value in the notation of JSON, which YAML reads; plain words without quotes."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value):
        return value if value.lower() not in _WORDS else json.dumps(value)
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else repr(value)
    return json.dumps(value, ensure_ascii=False, default=str)


_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
"""Words that YAML reads as something else than text."""
