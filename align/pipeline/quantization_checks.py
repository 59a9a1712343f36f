"""Checks of models in 4 bits and of optimizers of bitsandbytes, without loading a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from align.config.base import NewModel
from align.config.memory import new_model_size
from align.config.recipe import ErrorCollector
from align.errors import ArtifactError, UserError
from align.models import files, gguf_files, linear_layers
from align.models.quantization import width_problem
from align.pipeline.plan import PlannedStage
from align.runtime import artifacts, hub

NOT_QUANTIZED = ("rewards",)
"""Inputs of ``ppo`` that keep their type unless they share the backbone of the policy."""
NO_KEY = "no such key"
IN_4_BITS, IN_FULL = "in 4 bits", "in full precision"


def check_quantization(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that a CPU can compute the layers that are in 4 bits."""
    stages = {stage.folder: stage for stage in pending}
    for stage in pending:
        if getattr(stage.config, "quantization", None) is None:
            continue
        for key, target in stage.inputs.items():
            declared = stage.config.inputs[key.split(".")[0]]
            if not declared.models or key.split(".")[0] in NOT_QUANTIZED:
                continue
            problem = width_problem(_layers(target, stages))
            if problem is not None and not _has_accelerator():
                source = stage.gguf_files.get(Path(target), target)
                errors.add((stage.name, "quantization"), f"{source}: {problem}")


def check_stored_types(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that weights that are stored in few bits are neither trained nor quantized again."""
    for stage in pending:
        for key, target in stage.inputs.items():
            declared = stage.config.inputs[key.split(".")[0]]
            stored = _stored_type(target, stage, key) if declared.models else None
            if stored is None:
                continue
            repair = "name the model in full precision"
            if getattr(stage.config, "quantization", None) not in (None, stored):
                message = f"the weights are stored as {stored} already; remove it, or {repair}"
                errors.add((stage.name, "quantization"), f"{target}: {message}")
            elif (
                key == "model"
                and stage.config.trains_model
                and not getattr(stage.config, "lora", None)
            ):
                message = f"its weights are stored as {stored}, which cannot be trained; set `lora`"
                errors.add((stage.name, *key.split(".")), f"{target}: {message}, or {repair}")


def _stored_type(target: Path | str, stage: PlannedStage, key: str) -> str | None:
    """The type of weights that the config of a model names, such as ``nf4`` or ``gptq``.

    None if they are not quantized, or not on this machine.
    """
    folder: Path | None
    if isinstance(target, Path):
        folder = target
        config = target / files.ADAPTER_CONFIG
        with contextlib.suppress(UserError):  # loading reports it
            if config.is_file():
                folder = Path(files.read_adapter_base(config, target).source)
    else:
        revision = getattr(stage.config, "revision", None) if key == "model" else None
        folder = hub.cached_folder(target, revision=revision)
    return None if folder is None else files.stored_type(folder)


def remarks(pending: Sequence[PlannedStage]) -> Iterator[str]:
    """A line for each paged optimizer without paging, and each adapter on a base of another type.

    Such an adapter was trained on a base in 4 bits and is read on one in full precision, or the
    other way round.
    """
    stages = {stage.folder: stage for stage in pending}
    for stage in pending:
        optimizer = str(getattr(stage.config, "optimizer_name", ""))
        if "paged" in optimizer and not _has_accelerator():
            yield f"{stage.name}: {optimizer} keeps its state in memory: a CPU has no paging"
        quantization = getattr(stage.config, "quantization", NO_KEY)
        if quantization == NO_KEY:
            continue
        for target in dict.fromkeys(_read_models(stage)):
            name = stages[target].name if target in stages else str(target)
            line = _mismatch(name, _trained(target, stages), quantization)
            if line is not None:
                yield f"{stage.name}: {line}; `quantization` decides"


def mismatch(source: Path | str, quantization: str | None) -> str | None:
    """A line about an adapter that is read on a base of another type than it was trained on.

    None if it is not, or if that is not known.
    """
    return _mismatch(str(source), _trained(source, {}), quantization)


def _mismatch(name: str, trained: str | None, quantization: str | None) -> str | None:
    if trained == IN_4_BITS and quantization is None:
        read = "in 4 bits, and read here on a base that is not quantized"
    elif trained == IN_FULL and quantization is not None:
        read = "that is not quantized, and read here on a base in 4 bits"
    else:
        return None
    return f"the adapters of {name} are trained on a base {read}"


def _read_models(stage: PlannedStage) -> Iterator[Path]:
    """The folders of the models that a stage reads as its key ``quantization`` says."""
    quantized = getattr(stage.config, "quantization", None) is not None
    for key, target in stage.inputs.items():
        first = key.split(".")[0]
        is_read_so = stage.config.inputs[first].models and not (
            quantized and first in NOT_QUANTIZED
        )
        if is_read_so and isinstance(target, Path):
            yield target


def _trained(target: Path | str, stages: Mapping[Path, PlannedStage]) -> str | None:
    """How the base of the adapters of a stage, planned or finished, is stored in their training.

    None without adapters, or if it is not known.
    """
    if isinstance(target, str):
        return None
    if target in stages:
        config = stages[target].config
        keys = {key: getattr(config, key, None) for key in ("lora", "quantization")}
    else:
        try:
            artifact = artifacts.read_artifact(target)
        except ArtifactError:
            return None  # reported where inputs are checked
        keys = {} if artifact is None else artifact.recipe
    if keys.get("quantization") is not None:
        return IN_4_BITS
    return IN_FULL if keys.get("lora") is not None else None


def _layers(
    target: Path | str, stages: Mapping[Path, PlannedStage]
) -> Mapping[str, tuple[int, int]]:
    """The linear layers of a model, or of the model that a stage will train; none if unknown."""
    if isinstance(target, str):
        return {}
    if target in stages:
        stage = stages[target]
        model = getattr(stage.config, "model", None)
        if isinstance(model, NewModel):
            return new_model_size(model).linear
        return _layers(stage.inputs.get("model", ""), stages)
    for stage in stages.values():
        if target in stage.gguf_files and not (target / artifacts.FILE).is_file():
            return linear_layers.of_gguf(gguf_files.read_header(stage.gguf_files[target]))
    config = target / files.ADAPTER_CONFIG
    if config.is_file():
        try:
            return _layers(Path(files.read_adapter_base(config, target).source), {})
        except UserError:
            return {}  # loading reports it
    return linear_layers.of_folder(target)


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
