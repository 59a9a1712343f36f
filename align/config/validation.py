"""What a recipe means as a whole: inputs that name something, and keys that fit each other.

All of it is looked up without importing a training library: what TRL would refuse after an hour is told in a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from align.config.base import Input, Stage
from align.config.data import COLUMNS, Label, Prepare, Sample
from align.config.evaluate import Evaluate
from align.config.ppo import PPO
from align.config.stages import STAGES
from align.config.training import DPO, KTO, Reward, TrainingStage, TRLStage
from align.errors import nearest, shown

Report = Callable[[str, Iterable[str | int], str], None]  # stage, keys below it, message
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*$")  # module:function
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def stage_inputs(stage: Stage) -> dict[str, str]:
    """What a stage reads, by role: ``{"model": "sft", "pairs": "prepare"}``; ``policies.0`` for items of a list."""
    return _references(type(stage), {key: getattr(stage, key) for key in stage.inputs})


def _references(cls: type[Stage], data: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, Any] = {}
    for key in cls.inputs:
        value = data.get(key, cls.model_fields[key].default)
        items = enumerate(value) if isinstance(value, list) else ()
        found |= {key: value} | {f"{key}.{i}": item for i, item in items}
    return {
        role: target
        for role, target in found.items()
        if isinstance(target, str) and not _by_itself(cls.inputs[role.split(".")[0]], target)
    }


def _by_itself(wanted: Input, target: str) -> bool:
    return target in wanted.words or (wanted.functions and FUNCTION.match(target) is not None)


def validate_inputs(
    name: str,
    cls: type[Stage],
    data: Mapping[str, Any],
    kinds: Mapping[str, type[Stage] | None],
    report: Report,
) -> None:
    """Report inputs that name nothing. ``kinds`` has all stages of the recipe in order, with their classes."""
    for role, target in _references(cls, data).items():
        wanted = cls.inputs[role.split(".")[0]]
        message = _wrong_reference(target, wanted, name, kinds)
        if message:
            keys = [int(key) if key.isdigit() else key for key in role.split(".")]
            report(name, keys, message)


def validate_stage(name: str, stage: Stage, stages: Mapping[str, Stage], report: Report) -> None:
    """Report what is wrong between keys that are right by themselves."""
    if isinstance(stage, Prepare):
        for key in stage.columns:
            if key not in COLUMNS:
                report(name, ["columns", key], f"no column of ours{nearest(key, COLUMNS)}")
    if isinstance(stage, Evaluate) and len(set(stage.policies)) < len(stage.policies):
        report(name, ["policies"], "a policy stands twice; name each once")
    if isinstance(stage, Evaluate | Sample) and stage.split != "train":
        _check_held_out(name, ["split"], stage.prompts, stage.split, stages, report)
    if isinstance(stage, PPO) and stage.eval_steps is not None:
        _check_held_out(name, ["eval_steps"], stage.prompts, stage.eval_split, stages, report)
    if isinstance(stage, TrainingStage):
        _check_adapter(name, stage, stages, report)
    if isinstance(stage, TRLStage):
        _check_training(name, stage, stages, report)


def _check_training(
    name: str, stage: TRLStage, stages: Mapping[str, Stage], report: Report
) -> None:
    data = next(getattr(stage, role) for role in stage.inputs if role != "model")
    strategy = stage.trainer.get("eval_strategy", "no")
    if isinstance(strategy, str) and strategy != "no":
        keys = ["trainer", "eval_strategy"]
        _check_held_out(name, keys, data, "validation", stages, report)
    elif stage.trainer.get("eval_on_start") is True:
        keys = ["trainer", "eval_on_start"]
        _check_held_out(name, keys, data, "validation", stages, report)
    losses = stage.trainer.get("loss_type")
    smoothing = stage.trainer.get("label_smoothing", 0)
    if "exo_pair" in (losses if isinstance(losses, list) else [losses]) and smoothing == 0:
        # TRL refuses it too, but when it builds the trainer: all stages before this one have trained by then.
        report(
            name,
            ["trainer", "loss_type"],
            "`exo_pair` needs smooth labels: set `label_smoothing` above 0 (1.0e-3 in the paper)",
        )
    if isinstance(stage, KTO):
        _check_batches(name, stage, report)


def _check_adapter(
    name: str, stage: TrainingStage, stages: Mapping[str, Stage], report: Report
) -> None:
    before = stages.get(stage.model) if isinstance(stage, DPO | KTO | PPO | Reward) else None
    if (
        isinstance(before, TrainingStage)
        and before.lora
        and stage.lora
        and before.lora != stage.lora
    ):
        # An adapter is trained on, not stacked: its shape is given once, where it was first made.
        report(
            name,
            ["lora"],
            f"`{name}` trains the adapter of `{getattr(stage, 'model', '')}` on, so its `lora` must be that one: "
            f"{before.lora!r}; without `lora` the adapter is merged and all weights are trained",
        )


def _check_batches(name: str, stage: KTO, report: Report) -> None:
    """Report what would undo the batches that a ``kto`` stage puts together."""
    refused = {
        "train_sampling_strategy": "rows are shuffled by `seed` already, anew in every epoch: remove it",
        "dataloader_persistent_workers": "its workers would keep the first epoch's order: remove it",
    }
    for key, why in refused.items():
        if stage.trainer.get(key) not in (None, False, "sequential"):
            report(name, ["trainer", key], why)
    size = stage.trainer.get("per_device_train_batch_size")
    if isinstance(size, int) and size < 2:
        report(
            name,
            ["trainer", "per_device_train_batch_size"],
            f"a batch holds both labels, so 2 or more; got {size}",
        )


def _check_held_out(
    name: str,
    keys: list[str],
    data: str,
    split: str,
    stages: Mapping[str, Stage],
    report: Report,
) -> None:
    """Report ``keys``, which need rows of ``split``, where the stage ``data`` holds none out."""
    prepare = stages.get(data)
    fraction = f"{split}_fraction"
    if isinstance(prepare, Prepare) and getattr(prepare, fraction) == 0:
        repair = f"set `{data}.{fraction}` above 0"
        report(name, keys, f"`{data}` holds no {split} split out; {repair}")
    if isinstance(prepare, Label):
        sample = stages.get(prepare.completions)
        if isinstance(sample, Sample) and sample.split != split:
            report(
                name,
                keys,
                f"`{data}` labels completions of the {sample.split} split only; remove it",
            )


def _wrong_reference(
    target: str, wanted: Input, name: str, kinds: Mapping[str, type[Stage] | None]
) -> str | None:
    order = list(kinds)
    if target in kinds:
        found = next((k for k, c in STAGES.items() if c is kinds[target]), None)
        if order.index(target) >= order.index(name):
            return f"stage `{target}` does not come before `{name}`; stages run in the order they are written"
        if found is not None and found not in wanted.stages:
            return f"stage `{target}` is a `{found}` stage; expected one of kind {' or '.join(wanted.stages)}"
        return None
    try:
        if Path(target).expanduser().is_dir():
            return None
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user
        return f"no name of a folder: {shown(target)}: {error}; name an earlier stage, or a folder"
    earlier = order[: order.index(name)]
    if "/" not in target and "\\" not in target:
        near = (
            nearest(target, earlier, only_near=True)
            or f"; earlier stages: {', '.join(earlier) or 'none'}"
        )
        others = (
            " (a folder is a path that exists; a Hub id is owner/name)" if wanted.models else ""
        )
        return f"no earlier stage `{target}`{near}{others}"
    if not wanted.models:
        return f"no such folder: {target}; name an earlier {' or '.join(f'`{kind}`' for kind in wanted.stages)} stage, or its folder"
    first = target.split("/")[0]
    if not _HUB_ID.match(target) or Path(first).is_dir():
        return f"no such folder: {target}; name an earlier stage, a folder with a model, or a Hub id (owner/name)"
    return None
