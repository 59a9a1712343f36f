"""Checks of models in 4 bits and of optimizers of bitsandbytes, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from align.config.base import NewModel
from align.config.memory import new_model_size
from align.config.recipe import ErrorCollector
from align.errors import ArtifactError, UserError
from align.models import files, gguf_files, linear_layers
from align.models.quantization import width_problem
from align.pipeline.plan import PlannedStage
from align.runtime import artifacts

NOT_QUANTIZED = ("rewards",)
"""Inputs of ``ppo`` that keep their type unless they share the backbone of the policy."""


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


def remarks(pending: Sequence[PlannedStage]) -> Iterator[str]:
    """A line for each paged optimizer without paging, and each adapter on a base of another type.

    Such an adapter was trained on a base in 4 bits, and is read on one in full precision.
    """
    stages = {stage.folder: stage for stage in pending}
    for stage in pending:
        optimizer = str(getattr(stage.config, "optimizer_name", ""))
        if "paged" in optimizer and not _has_accelerator():
            yield f"{stage.name}: {optimizer} keeps its state in memory: a CPU has no paging"
        if getattr(stage.config, "quantization", "no such key") is not None:
            continue
        for target in dict.fromkeys(
            target
            for key, target in stage.inputs.items()
            if stage.config.inputs[key.split(".")[0]].models and _trained_in_4_bits(target, stages)
        ):
            name = stages[target].name if target in stages else target
            yield (
                f"{stage.name}: the adapters of {name} are trained on a base in 4 bits, and read "
                "here on a base that is not quantized; `quantization` decides"
            )


def _trained_in_4_bits(target: Path | str, stages: Mapping[Path, PlannedStage]) -> bool:
    """Whether a stage, planned or finished, trains adapters on a base in 4 bits."""
    if isinstance(target, str):
        return False
    if target in stages:
        config = stages[target].config
        return config.trains_model and getattr(config, "quantization", None) is not None
    try:
        artifact = artifacts.read_artifact(target)
    except ArtifactError:
        return False  # reported where inputs are checked
    return artifact is not None and artifact.recipe.get("quantization") is not None


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
