"""Stages with a TRL trainer on two processes: under DDP, and where weights are sharded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import forks, recipe_runs, sharded_run
from safetensors.torch import load_file
from torch.testing import assert_close

from align.runtime import artifacts

NO_DEEPSPEED = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
# With a file of a checkpoint, since accelerate may silently replace what shards.
CONFIGURATIONS = [
    pytest.param("cpu", "rng_state_1.pth"),
    pytest.param("zero2", "zero_pp_rank_1_mp_rank_00_optim_states.pt", marks=NO_DEEPSPEED),
    pytest.param("zero3", "zero_pp_rank_1_mp_rank_00_model_states.pt", marks=NO_DEEPSPEED),
    pytest.param("fsdp2", "pytorch_model_fsdp.bin"),
]
# 48 rows: a last batch that accelerate fills up by repeated rows would differ from one process.
# Adam divides a gradient by its size: with the default epsilon, rounding errors of a gradient near
# zero change a weight as much as any other gradient.
RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 60, test_fraction: 0.2}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
    trainer: &trainer
      learning_rate: 1.0e-2
      adam_epsilon: 1.0e-4
      max_steps: 5
      per_device_train_batch_size: 4
      save_steps: 2
      logging_steps: 1
      bf16: false
      gradient_checkpointing: false
  reward: {model: sft, trainer: *trainer}
  kto: {model: sft, preferences: prepare, trainer: *trainer}
  tokens:
    stage: dpo
    model: sft
    tokens_per_batch: 500 # 18 batches: one process divides the rows as two do
    trainer: {learning_rate: 1.0e-2, adam_epsilon: 1.0e-4, max_steps: 5, logging_steps: 1, bf16: false, gradient_checkpointing: false}
  dpo: {model: sft, trainer: *trainer}
  lora_sft: {stage: sft, model: sft, lora: {r: 2, alpha: 4}, trainer: *trainer}
  lora_reward: {stage: reward, model: sft, lora: {r: 2, alpha: 4}, trainer: *trainer}
  lora_kto: {stage: kto, model: sft, preferences: prepare, lora: {r: 2, alpha: 4}, trainer: *trainer}
  lora_dpo: {stage: dpo, model: sft, lora: {r: 2, alpha: 4}, trainer: *trainer}
"""
STAGES = (
    "sft",
    "reward",
    "kto",
    "tokens",
    "dpo",
    "lora_sft",
    "lora_reward",
    "lora_kto",
    "lora_dpo",
)
KILLED = ("sft", "reward", "kto", "dpo")
TOLERANCE = {"rtol": 0, "atol": 1e-4}
"""The same sums in another order: float32 losses and weights differ by about 1e-6."""


def stage_folder(runs: Path, stage: str, processes: int = 2) -> Path:
    folder = sharded_run.stage_folder(runs, stage)
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    assert artifact.world_size == processes
    return folder


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process whose batches are those of two."""
    runs = tmp_path_factory.mktemp("alone") / "runs"
    (runs.parent / "recipe.yaml").write_text(RECIPE)
    batches = [
        "tokens.trainer.gradient_accumulation_steps=2"
        if stage == "tokens"
        else f"{stage}.trainer.per_device_train_batch_size=8"
        for stage in STAGES
    ]
    assert recipe_runs.run(runs, *batches) == 0, recipe_runs.log(runs)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), CONFIGURATIONS)
def test_two_processes_learn_what_one_does_and_resume(name, part, alone, tmp_path, kill_generator):
    configuration = forks.ROOT / "accelerate_configs" / f"{name}.yaml"
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    runs = tmp_path / "runs"
    assert sharded_run.run(configuration, runs) == 0, recipe_runs.log(runs)
    for stage in STAGES:
        whole, sharded = stage_folder(alone, stage, 1), stage_folder(runs, stage)
        assert len(losses(whole)) == 5
        assert max(losses(whole)) - min(losses(whole)) > 0.001, (
            f"{stage}: flat, which proves nothing"
        )
        assert losses(sharded) == pytest.approx(losses(whole), rel=0, abs=1e-4), stage
        # The folders are the same, whole weights included.
        names = [{file.name for file in folder.iterdir()} for folder in (sharded, whole)]
        assert names[0] == names[1]
        pair = (load_file(sharded_run.weights(each, stage)) for each in (runs, alone))
        assert_close(*pair, **TOLERANCE)

    sharded_run.kill_and_resume(configuration, runs, KILLED, range(3, 6), kill_generator, part=part)
