"""Runs that were killed or interrupted and started again end in the same weights, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import recipe_runs

from align.runtime import artifacts, checkpoints

pytestmark = pytest.mark.slow  # the default tier has the signals of control

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 120}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}
    trainer: &trainer
      learning_rate: 1.0e-3
      max_steps: 24
      per_device_train_batch_size: 4
      save_steps: 2
      logging_steps: 2
      lr_scheduler_type: constant_with_warmup
      bf16: false
      gradient_checkpointing: false
  dpo:
    model: sft
    trainer: *trainer
  kto: # 24 steps are two epochs, and each epoch has another order
    model: sft
    trainer:
      learning_rate: 1.0e-3
      max_steps: 24
      per_device_train_batch_size: 16
      save_steps: 2
      logging_steps: 2
      lr_scheduler_type: constant_with_warmup
      bf16: false
      gradient_checkpointing: false
  dpo_seed_1:
    stage: dpo
    model: sft
    seed: 1
    trainer: *trainer
  sft_lora:
    stage: sft
    model: sft
    lora: {r: 2, alpha: 4, dropout: 0.1}
    trainer: *trainer
  dpo_lora:
    stage: dpo
    model: sft_lora
    lora: {r: 2, alpha: 4} # dropout is off in this stage
    trainer: *trainer
"""
ORDER = ["prepare", "sft", "dpo", "kto", "dpo_seed_1", "sft_lora", "dpo_lora"]


LAST_STEP = 24


def stage_folder(runs: Path, stage: str) -> Path:
    (folder,) = runs.glob(f"{stage}-*")
    return folder


def weights(runs: Path, stage: str) -> bytes:
    folder = stage_folder(runs, stage)
    assert artifacts.read_artifact(folder) is not None
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of a chain that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "recipe.yaml").write_text(RECIPE)
    runs = folder / "runs"
    assert recipe_runs.run_in_new_interpreter(runs) == 0, recipe_runs.log(runs)
    yield runs
    shutil.rmtree(folder)


def runs_before(stage: str, uninterrupted: Path, folder: Path) -> Path:
    """A new runs folder in which everything before ``stage`` is finished."""
    (folder / "recipe.yaml").write_text(RECIPE)
    runs = folder / "runs"
    runs.mkdir()
    for name in ORDER[: ORDER.index(stage)]:
        source = stage_folder(uninterrupted, name)
        shutil.copytree(source, runs / source.name)
    return runs


def assert_as_if_uninterrupted(runs: Path, uninterrupted: Path, stage: str) -> None:
    assert weights(runs, stage) == weights(uninterrupted, stage)
    folder = stage_folder(runs, stage)
    names = [path.name for path in folder.iterdir()]
    assert not [name for name in names if name.startswith(("checkpoint", ".")) or name == "ref"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert set(range(2, LAST_STEP + 1, 2)) <= set(steps)


def damage_last_checkpoint(folder: Path) -> None:
    """Leave the newest checkpoint as if the kill had hit the writing of it."""
    last = checkpoints.list_checkpoints(folder)[-1:]
    for checkpoint in last:
        (checkpoint / checkpoints.COMPLETE_MARK).unlink()
        for weights_file in checkpoint.glob("*.safetensors"):
            weights_file.write_bytes(b"half")


def test_killed_in_two_stages_a_chain_ends_in_the_same_weights(uninterrupted, tmp_path):
    runs = runs_before("kto", uninterrupted, tmp_path)
    generator = random.Random(0)
    stages = ("kto", "dpo_lora")
    for stage in stages:
        # A line of metrics comes just before a checkpoint, so some kills hit the writing of one.
        step, delay = generator.randrange(4, 22, 2), generator.random() / 10
        code = recipe_runs.stop(runs, when=recipe_runs.logged_step(runs, stage, step), delay=delay)
        assert code == -signal.SIGKILL
        damage_last_checkpoint(stage_folder(runs, stage))
    assert recipe_runs.run(runs) == 0, recipe_runs.log(runs)
    for stage in stages:
        assert_as_if_uninterrupted(runs, uninterrupted, stage)


@pytest.mark.parametrize(("stage", "kills"), [("sft_lora", 2), ("dpo_lora", 2)])
def test_killed_at_random_moments_a_stage_ends_in_the_same_weights(
    uninterrupted, tmp_path, stage, kills
):
    runs = runs_before(stage, uninterrupted, tmp_path)
    artifact = artifacts.read_artifact(stage_folder(uninterrupted, stage))
    assert artifact is not None
    recipe_runs.kill_at_random_moments(runs, stage, seconds=artifact.seconds, kills=kills)
    assert recipe_runs.run(runs, "--until", stage) == 0, recipe_runs.log(runs)
    assert_as_if_uninterrupted(runs, uninterrupted, stage)


def test_a_damaged_checkpoint_is_skipped_and_no_step_is_trained_twice(uninterrupted, tmp_path):
    runs = runs_before("sft", uninterrupted, tmp_path)
    marked = recipe_runs.file_exists(runs, "sft-*/checkpoint-6/complete.json")
    recipe_runs.stop(runs, "--until", "sft", when=marked)
    folder = stage_folder(runs, "sft")
    assert len(checkpoints.list_checkpoints(folder)) > 1
    damage_last_checkpoint(folder)

    # Killed after the last step, while the weights are written or just after.
    written = recipe_runs.file_exists(runs, "sft-*/model.safetensors")
    recipe_runs.stop(runs, "--until", "sft", when=written)
    (folder / artifacts.FILE).unlink(missing_ok=True)
    temporaries = [folder / ".artifact.json.123", folder / "metrics.tmp"]  # of a killed process
    for path in temporaries:
        path.write_text("{")
    assert recipe_runs.run(runs, "--until", "sft") == 0, recipe_runs.log(runs)
    assert not any(path.exists() for path in temporaries)
    assert_as_if_uninterrupted(runs, uninterrupted, "sft")
    artifact = artifacts.read_artifact(folder)
    assert artifact is not None
    assert artifact.metrics["steps"] == LAST_STEP


def test_a_signal_saves_a_checkpoint_from_which_the_same_command_resumes(uninterrupted, tmp_path):
    runs = runs_before("dpo", uninterrupted, tmp_path)
    # KTO's 16th step is in its second epoch, whose order of rows differs from the first.
    for stage, step, number in (("dpo", 4, signal.SIGTERM), ("kto", 16, signal.SIGINT)):
        marked = recipe_runs.file_exists(runs, f"{stage}-*/checkpoint-{step}/complete.json")
        assert recipe_runs.stop(runs, when=marked, number=number) == 130
        assert "interrupted" in recipe_runs.log(runs).splitlines()[-1]
        folder = stage_folder(runs, stage)
        assert artifacts.read_artifact(folder) is None
        last = checkpoints.list_checkpoints(folder)[-1]
        state = json.loads((last / "trainer_state.json").read_text())
        assert (state["epoch"] > 1) == (stage == "kto")
        assert state["global_step"] >= step
    for stage in ("dpo", "kto"):
        assert recipe_runs.run(runs, "--until", stage) == 0, recipe_runs.log(runs)
    assert recipe_runs.log(runs).count(f"from step {state['global_step']}") == 1
    for stage in ("dpo", "kto"):
        assert_as_if_uninterrupted(runs, uninterrupted, stage)


def test_another_seed_ends_in_other_weights(uninterrupted):
    assert weights(uninterrupted, "dpo_seed_1") != weights(uninterrupted, "dpo")
