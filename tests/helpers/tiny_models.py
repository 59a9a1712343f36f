"""Tiny data and models for tests: prepared data, an SFT model and an adapter on it.

Both are trained with a learning rate that moves them far. Near their initial weights they would be
equal, and a test could not detect that one was used in place of the other.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from align.config.base import Lora, NewModel, Stage
from align.config.data import Prepare
from align.config.training import SFT
from align.runtime import artifacts, distributed, environment
from align.runtime.progress import Logger, NullDisplay

POSITIONS = 192
LORA = Lora(r=4, alpha=8)
LOG_2 = torch.tensor(2.0).log().item()  # float32, as the loss is
FOUR_WAYS = [
    pytest.param("sft", None, id="SFT full, then full"),
    pytest.param("sft", LORA, id="SFT full, then adapter"),
    pytest.param("lora", LORA, id="SFT adapter, trained further"),
    pytest.param("lora", None, id="SFT adapter, merged, then full"),
]
"""Initial policy and `lora` of a preference stage: full fine-tuning or an adapter, twice."""
TRAINER = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1.0e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
}

# transformers 5.23 renamed gradient to activation checkpointing; its own code, peft and TRL still
# use the old name.


@dataclass(frozen=True, slots=True)
class World:
    """Folders of finished stages. ``sft`` has full weights, ``lora`` is an adapter on it."""

    folder: Path
    data: Path
    sft: Path
    lora: Path


@functools.cache
def world(folder: Path) -> World:
    """Build the data and models below ``folder`` once, in about five seconds."""
    environment.quiet_libraries()
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    distributed.init_process_group()
    from align.stages import prepare
    from align.stages import sft as stages_sft

    gc.collect()
    # accelerate collects garbage at the start of each training: half a second for imported modules
    gc.freeze()
    data, full, lora = (folder / "world" / name for name in ("data", "sft", "lora"))
    stage(prepare, Prepare(source="embedded", max_rows=60, test_fraction=0.25), {}, data)
    new = NewModel(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
    )
    settings = SFT(model=new, trainer=TRAINER | {"max_steps": 30})
    stage(stages_sft, settings, {"demonstrations": data}, full)
    settings = SFT(
        model="sft", lora=LORA, trainer=TRAINER | {"max_steps": 8, "learning_rate": 5.0e-2}
    )
    stage(stages_sft, settings, {"model": full, "demonstrations": data}, lora)
    return World(folder / "world", data, full, lora)


def stage(
    module: ModuleType, settings: Stage, inputs: Mapping[str, Path | str], folder: Path
) -> dict[str, Any]:
    """Run a stage as the pipeline does and write its ``artifact.json``. Returns its metrics."""
    name = module.__name__.rpartition(".")[2]
    folder.mkdir(parents=True, exist_ok=True)
    seed = getattr(settings, "seed", 0)
    distributed.reset_process_state(seed)
    result = module.run(settings, inputs, folder, logger(name, folder))
    artifact = artifacts.Artifact(
        stage=name,
        name=folder.name,
        digest=artifacts.digest(str(folder)),
        recipe=settings.model_dump(),
        inputs={
            role: {"folder": str(target), "digest": artifacts.digest_folder(Path(target))}
            for role, target in inputs.items()
        },
        metrics=result.metrics,
        versions={},
        commit=None,
        seed=seed,
        world_size=1,
        seconds=0.0,
        peak_memory_bytes=None,
        headline=result.headline,
        remarks=list(result.remarks),
        tables=[dataclasses.asdict(table) for table in result.tables],
    )
    artifacts.write_artifact(folder, artifact)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return result.metrics


def logger(name: str, folder: Path) -> Logger:
    """A logger that displays nothing."""
    display = NullDisplay()
    display.start(name, folder, "running")
    return Logger(name, folder, display, main=True)


def rows(data: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a prepared table, such as ``pairs-train``."""
    return pq.read_table(data / f"{table}.parquet").to_pylist()


def slow_logps(model: Any, ids: list[int], start: int) -> float:
    """Log-probability of ``ids[start:]`` given the tokens before: one forward pass per token."""
    total = 0.0
    with torch.no_grad():
        for place in range(start, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
            total += torch.log_softmax(logits.double(), dim=-1)[ids[place]].item()
    return total
