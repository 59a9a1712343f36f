"""A lack of memory leaves a stage as it was raised, so that the runner can name what lowers it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM, Trainer

from align.config.training import DPO, KTO, SFT, Reward
from align.models import loading
from align.stages import dpo, kto, reward, sft
from align.training import trl_trainer

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("module", "config", "rows"),
    [
        pytest.param(sft, SFT, "demonstrations", id="sft"),
        pytest.param(dpo, DPO, "pairs", id="dpo"),
        pytest.param(reward, Reward, "pairs", id="reward"),
        pytest.param(kto, KTO, "preferences", id="kto"),
    ],
)
def test_it_passes_through_training_and_the_checkpoints_stay(
    module: ModuleType,
    config: Any,
    rows: str,
    world: tiny_models.World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training_step, calls = Trainer.training_step, []

    def failing(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ERROR
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", failing)
    settings = config(
        model="sft",
        trainer=tiny_models.TRAINER | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1},
    )
    with pytest.raises(torch.OutOfMemoryError):
        tiny_models.stage(module, settings, {"model": world.sft, rows: world.data}, tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_it_is_not_taken_for_a_fault_of_the_files_or_of_the_settings(
    world: tiny_models.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ERROR

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load_merged(world.sft, dtype="float32")
    with pytest.raises(torch.OutOfMemoryError), trl_trainer.trl_errors_as_user_errors():
        fail()
