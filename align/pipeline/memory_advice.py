"""The line that ends a stage without enough memory: where, and what lowers its need."""

from __future__ import annotations

import shlex

from align.config.base import Stage
from align.config.online_rl import OnlineRL
from align.config.quantization import QuantizableStage
from align.config.recipe import Recipe
from align.config.training_base import BATCH_SIZE, TrainingStage, TRLStage
from align.pipeline.plan import PlannedStage
from align.runtime.out_of_memory import Shortage


def out_of_memory_line(shortage: Shortage, stage: PlannedStage, recipe: Recipe) -> str:
    """One line: the stage, the device, the settings in the order to try, and the plan's command."""
    settings = _settings(stage.config)
    advice = "free memory, or use a machine with more"
    if settings:
        advice = f"in this order, set {', '.join(settings)}"
    if isinstance(stage.config, QuantizableStage):  # the plan has a bill of these
        size = "SIZE" if shortage.capacity is None else f"{shortage.capacity / 1e9:.4g}GB"
        command = ["align", "plan", str(recipe.path), *recipe.overrides, "--gpu-memory", size]
        advice += f"; `{shlex.join(command)}` lists what the stages need and what would lower it"
    return f"{recipe.at(stage.name)}: {shortage}; {advice}"


def _settings(config: Stage) -> list[str]:
    """Settings that would lower the memory of a stage; those that it has already are left out."""
    settings = _batch_settings(config)
    if isinstance(config, OnlineRL) and not config.gradient_checkpointing:
        settings.append("`gradient_checkpointing: true`")
    if isinstance(config, TRLStage) and not config.trl_value("gradient_checkpointing"):
        settings.append("`trainer.gradient_checkpointing: true`")
    if isinstance(config, TrainingStage) and not config.lora:
        settings.append("`lora`")
    if isinstance(config, QuantizableStage) and not config.quantization:
        settings.append("`quantization: nf4`")
    return settings


def _batch_settings(config: Stage) -> list[str]:
    """Those of the size of a forward pass."""
    tokens = getattr(config, "tokens_per_batch", None)
    if isinstance(config, OnlineRL):
        size = "micro_batch_size" if tokens is None else "tokens_per_batch"
        return [
            f"a smaller `{size}` (results stay the same)",
            "a smaller `sample_batch_size`",
        ]
    if isinstance(config, TRLStage):
        if tokens is not None:
            return ["a smaller `tokens_per_batch`"]
        return [
            f"a smaller `trainer.{BATCH_SIZE}` with more `trainer.gradient_accumulation_steps`",
        ]
    return ["a smaller `batch_size`"] if hasattr(config, "batch_size") else []
