"""Checks between the stages of a recipe: missing inputs, missing splits, conflicting keys.

The stages declare what they need (:mod:`align.config.base`). No training library is imported, so
errors that TRL would raise after an hour are reported within a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from align.config.base import Stage
from align.config.inputs import Input, input_names
from align.config.stages import STAGES, accepted_kinds, stage_classes
from align.errors import did_you_mean, shown

Report = Callable[[str, Iterable[str | int], str], None]  # stage, keys below it, message
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
"""A name that may be a model or a data set on the Hub: owner/name."""


def validate_inputs(
    name: str,
    stage: type[Stage],
    values: Mapping[str, Any],
    classes: Mapping[str, type[Stage] | None],
    report: Report,
) -> None:
    """Report the inputs of a stage that name nothing.

    ``values`` are the raw settings of the stage; ``classes`` has the classes of all stages of the
    recipe, in order.
    """
    defaults = {key: stage.model_fields[key].default for key in stage.inputs}
    for key, target in input_names(stage.inputs, defaults | dict(values)).items():
        message = _input_error(target, stage.inputs[key.split(".")[0]], name, classes)
        if message:
            report(
                name, [int(part) if part.isdigit() else part for part in key.split(".")], message
            )


def validate_stage(name: str, stage: Stage, stages: Mapping[str, Stage], report: Report) -> None:
    """Report errors between keys that are valid by themselves, within and between stages."""
    for problem in stage.problems(stages):
        report(name, problem.keys, problem.message)
    lora = getattr(stage, "lora", None)
    if lora is not None and lora.dropout and stage.trains_without_dropout:
        enable = ", or set `trainer: {disable_dropout: false}`" * (stage.trainer_config is not None)
        reason = f"no effect, because this stage trains without dropout; remove it{enable}"
        report(name, ("lora", "dropout"), reason)
    for held_out in stage.held_out():
        source = getattr(stage, held_out.input)
        message = source in stages and stages[source].missing_split(held_out.split, source, stages)
        if message:
            report(name, held_out.keys, message)


def _input_error(
    target: str, expected: Input, name: str, classes: Mapping[str, type[Stage] | None]
) -> str | None:
    """The error message of an input, or None."""
    if target in classes:
        return _stage_error(target, expected, name, list(classes), classes[target])
    try:
        if Path(target).expanduser().is_dir():
            return None
    except (OSError, RuntimeError, ValueError) as error:  # the name is too long, or no such user
        return f"invalid path: {shown(target)}: {error}; name an earlier stage, or a folder"
    if target.lower().endswith(".gguf") and expected.models:
        return _gguf_error(target, expected)
    if "/" not in target and "\\" not in target:
        fitting = _fitting_stages(expected, name, classes)
        hint = did_you_mean(target, [*fitting, *expected.words])
        words = "".join(f"; or `{word}`" for word in expected.words)
        hint = hint or f"; earlier stages that fit: {', '.join(fitting) or 'none'}{words}"
        notes = ["a folder is a path that exists", "a Hub id is owner/name"] * expected.models
        notes += ["a function is module:function"] * expected.functions
        note = f" ({'; '.join(notes)})" if notes else ""
        return f"no earlier stage `{target}`{hint}{note}"
    if not expected.models:
        kinds = " or ".join(f"`{kind}`" for kind in accepted_kinds(expected))
        return f"no such folder: {target}; name an earlier {kinds} stage, or its folder"
    if not HUB_ID.match(target) or Path(target.split("/")[0]).is_dir():
        repair = "name an earlier stage, a folder with a model, or a Hub id (owner/name)"
        return f"no such folder: {target}; {repair}"
    return None


def _gguf_error(target: str, expected: Input) -> str | None:
    """The error message of an input that names a GGUF file, or None."""
    if not expected.policies:
        kinds = " or ".join(f"`{kind}`" for kind in accepted_kinds(expected))
        return (
            f"{target}: a GGUF file contains a language model; name a {kinds} stage or its folder"
        )
    if not Path(target).expanduser().is_file():
        return f"no such file: {target}; name a GGUF file that exists, or a folder with a model"
    return None


def _fitting_stages(
    expected: Input, name: str, classes: Mapping[str, type[Stage] | None]
) -> list[str]:
    """The stages before ``name`` of a kind that the input may name."""
    order = list(classes)
    accepted = [cls for kind in accepted_kinds(expected) for cls in stage_classes(kind)]
    return [each for each in order[: order.index(name)] if classes[each] in accepted]


def _stage_error(
    target: str, expected: Input, name: str, order: list[str], target_class: type[Stage] | None
) -> str | None:
    if order.index(target) >= order.index(name):
        return f"stage `{target}` does not precede `{name}`; stages run in the order of the file"
    kind = next((kind for kind in STAGES if target_class in stage_classes(kind)), None)
    accepted = accepted_kinds(expected)
    if kind is not None and kind not in accepted:
        return f"stage `{target}` is of kind `{kind}`; expected {' or '.join(accepted)}"
    return None
