"""Kill PPO or a reward stage, start it again: the same weights, metrics and samples to the last bit.

Each run is a fork of this process, as in :mod:`test_resume`. Metrics are compared but for how long steps took.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import finish, wait_for
from test_resume import start as start_in

from align.runtime import artifacts, checkpoints, environment

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)

# One backbone has an adaptive coefficient and a warm-up of the critic; the separate models have a held-out evaluation.
RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 60, test_fraction: 0.2}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
    trainer: &trainer
      learning_rate: 1.0e-2
      max_steps: 12
      per_device_train_batch_size: 4
      save_steps: 2
      logging_steps: 2
      bf16: false
      gradient_checkpointing: false
  reward:
    model: sft
    lora: &lora {r: 2, alpha: 4}
    trainer: *trainer
  reward_whole:
    stage: reward
    model: sft
    trainer: *trainer
  ppo:
    model: sft
    rewards: [reward]
    lora: *lora
    steps: 8
    batch_size: 8
    n_completions: 2
    max_new_tokens: 8
    missing_eos_penalty: 1.0
    learning_rate: 5.0e-2
    critic_warmup_steps: 1
    kl_target: 0.05
    kl_horizon: 20
    epochs: 2
    minibatches: 2
    save_steps: 2
  ppo_whole:
    stage: ppo
    model: sft
    rewards: [reward_whole]
    steps: 8
    batch_size: 8
    max_new_tokens: 8
    learning_rate: 5.0e-3
    epochs: 2
    minibatches: 2
    eval_steps: 3
    eval_split: test
    n_eval_prompts: 4
    save_steps: 2
"""
ORDER = ["prepare", "sft", "reward", "reward_whole", "ppo", "ppo_whole"]
LATEST = {"ppo": 8, "ppo_whole": 8, "reward": 12, "reward_whole": 12}  # steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of a chain that nothing stopped."""
    import matplotlib.pyplot as plt  # the forks find them imported
    import trl

    assert trl.RewardTrainer
    assert trl.SFTTrainer
    assert plt
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    environment.quiet_libraries()
    gc.collect()
    gc.freeze()  # accelerate collects garbage whenever a training starts, over imported modules too
    assert finish(start_in(folder / "runs", "ppo_whole")) == 0, (folder / "log").read_text()
    yield folder / "runs"
    shutil.rmtree(folder)


def start(runs: Path, stage: str) -> int:
    """Run the recipe up to a stage in a fork, with a log of its own."""
    return start_in(runs, stage)


def beside(whole: Path, folder: Path, stage: str) -> Path:
    """New runs that have what comes before ``stage``: the same folders, as adapters stand on the path of their base."""
    (folder / "recipe.yaml").write_text(RECIPE)
    runs = folder / "runs"
    runs.mkdir()
    for name in ORDER[: ORDER.index(stage)]:
        source = one(whole, name)
        (runs / source.name).symlink_to(source)
    return runs


def one(runs: Path, stage: str) -> Path:
    (folder,) = runs.glob(f"{stage}-*")
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All that was logged, without how long it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith("seconds")
            and not key.endswith(("_per_second", "_runtime", "runtime"))
        }
        for line in lines
    ]


def assert_same(runs: Path, whole: Path, stage: str) -> None:
    """The stage is done, and nothing in it tells that it was stopped."""
    mine, other = one(runs, stage), one(whole, stage)
    made, expected = artifacts.read_artifact(mine), artifacts.read_artifact(other)
    assert made is not None, (runs.parent / "log").read_text()
    assert expected is not None
    assert made.digest == expected.digest
    names = {path.name for path in other.iterdir()}
    assert {path.name for path in mine.iterdir()} == names
    for name in names & {
        "model.safetensors",
        "adapter_model.safetensors",
        "samples.jsonl",
        "reward.json",
    }:
        assert (mine / name).read_bytes() == (other / name).read_bytes(), name
    if stage.startswith("ppo"):
        assert metrics(mine) == metrics(other)
        told = [line["step"] for line in metrics(mine) if "score" in line]
        assert told == list(range(1, LATEST[stage] + 1))
    else:
        assert made.metrics["held_out"] == expected.metrics["held_out"]
        assert made.metrics["centre"] == expected.metrics["centre"]


def log(runs: Path) -> str:
    return (runs.parent / "log").read_text()


def kill_at_random_moments(whole: Path, folder: Path, stage: str, kills: int) -> None:
    runs = beside(whole, folder, stage)
    made = artifacts.read_artifact(one(whole, stage))
    assert made is not None
    draw = random.Random(stage)
    for moment in range(kills):
        pid = start(runs, stage)
        time.sleep(made.seconds * (moment + draw.random()) / kills)
        os.kill(pid, signal.SIGKILL)
        finish(pid)
    assert finish(start(runs, stage)) == 0, log(runs)
    assert_same(runs, whole, stage)


def stop_after(runs: Path, stage: str, step: int, number: int) -> int:
    """Send a signal as soon as the checkpoint of a step is complete; the exit code."""
    pid = start(runs, stage)
    wait_for(pid, runs, f"{stage}-*/checkpoint-{step}/complete.json")
    os.kill(pid, number)
    return finish(pid)


# What follows would pass if nothing were learnt.
@pytest.mark.parametrize("stage", ["ppo", "ppo_whole"])
def test_the_undisturbed_run_moves_its_policy_and_says_other_things_from_step_to_step(whole, stage):
    lines = [line for line in metrics(one(whole, stage)) if "score" in line]
    assert len({line["score"] for line in lines}) > 4
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert abs(lines[-1]["kl"]) > 0.01
    said = (one(whole, stage) / "samples.jsonl").read_text().splitlines()
    assert len(said) == 8 * 4  # every step's first four
    assert len({json.loads(line)["completion"] for line in said}) > 10


@pytest.mark.parametrize("stage", ["ppo", "ppo_whole"])
def test_killed_after_a_checkpoint_and_started_again_it_is_the_same_run(whole, tmp_path, stage):
    runs = beside(whole, tmp_path, stage)
    assert stop_after(runs, stage, 2, signal.SIGKILL) == -signal.SIGKILL
    assert stop_after(runs, stage, 6, signal.SIGKILL) == -signal.SIGKILL
    assert finish(start(runs, stage)) == 0, log(runs)
    assert log(runs).count("going on from step") == 2
    assert_same(runs, whole, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "ppo_whole"])
def test_killed_at_five_random_moments_it_is_the_same_run(whole, tmp_path, stage):
    kill_at_random_moments(whole, tmp_path, stage, kills=5)


@pytest.mark.parametrize("stage", ["reward", pytest.param("reward_whole", marks=pytest.mark.slow)])
def test_a_killed_reward_stage_ends_in_the_same_weights_and_the_same_mean(whole, tmp_path, stage):
    runs = beside(whole, tmp_path, stage)
    assert stop_after(runs, stage, 4, signal.SIGKILL) == -signal.SIGKILL
    assert finish(start(runs, stage)) == 0, log(runs)
    assert "going on from step" in log(runs)
    assert_same(runs, whole, stage)


@pytest.mark.slow
def test_a_reward_stage_killed_after_its_training_is_centred_and_measured_all_the_same(
    whole, tmp_path
):
    runs = beside(whole, tmp_path, "reward")
    pid = start(runs, "reward")
    wait_for(pid, runs, "reward-*/adapter_model.safetensors")
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    (one(runs, "reward") / artifacts.FILE).unlink(missing_ok=True)
    assert finish(start(runs, "reward")) == 0, log(runs)
    assert_same(runs, whole, "reward")


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("ppo", signal.SIGTERM),
        pytest.param("ppo_whole", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("ppo", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on_there(
    whole, tmp_path, stage, number
):
    runs = beside(whole, tmp_path, stage)
    assert stop_after(runs, stage, 2, number) == 130, log(runs)
    folder = one(runs, stage)
    assert artifacts.read_artifact(folder) is None
    step = int(checkpoints.list_checkpoints(folder)[-1].name.rpartition("-")[2])
    # It ends with the step that runs when the signal comes: no step that was told is lost.
    assert [line["step"] for line in metrics(folder)][-1] == step
    assert finish(start(runs, stage)) == 0, log(runs)
    assert f"going on from step {step}" in log(runs)
    assert_same(runs, whole, stage)


def unmarked(checkpoint: Path) -> None:
    (checkpoint / checkpoints.COMPLETE_MARK).unlink()
    (checkpoint / "optimizer.pt").unlink()


def shortened(checkpoint: Path) -> None:
    file = checkpoint / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lost(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


def garbled(checkpoint: Path) -> None:
    (checkpoint / checkpoints.COMPLETE_MARK).write_text('{"world_size": 1, "fil')


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(unmarked, id="cut off while it was written", marks=pytest.mark.slow),
        pytest.param(shortened, id="weights cut short"),
        pytest.param(lost, id="a file lost", marks=pytest.mark.slow),
        pytest.param(garbled, id="its mark cut short", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole, tmp_path, damage):
    runs = beside(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4, signal.SIGKILL)
    *_, before, last = checkpoints.list_checkpoints(one(runs, "ppo"))
    damage(last)
    assert finish(start(runs, "ppo")) == 0, log(runs)
    step = before.name.rpartition("-")[2]
    assert f"going on from step {step}" in log(runs)
    assert_same(runs, whole, "ppo")


@pytest.mark.slow
def test_with_all_checkpoints_damaged_it_starts_at_the_beginning(whole, tmp_path):
    runs = beside(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4, signal.SIGKILL)
    for checkpoint in checkpoints.list_checkpoints(one(runs, "ppo")):
        shortened(checkpoint)
    assert finish(start(runs, "ppo")) == 0, log(runs)
    assert "going on" not in log(runs)
    assert_same(runs, whole, "ppo")


def test_the_adaptive_kl_coefficient_lies_in_the_checkpoint_and_goes_on_from_there(whole, tmp_path):
    # beta * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon), with target 0.05, n = 8 and horizon 20
    lines = metrics(one(whole, "ppo"))
    expected = [0.05]
    for line in lines[:-1]:
        error = min(max(line["kl"] / 0.05 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * 8 / 20))
    assert [line["kl_coef"] for line in lines] == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 8

    runs = beside(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4, signal.SIGKILL)
    last = checkpoints.list_checkpoints(one(runs, "ppo"))[-1]
    state = json.loads((last / "state.json").read_text())
    assert state["kl_coef"] == lines[state["step"]]["kl_coef"]  # of the next step
    (last / "state.json").write_text(json.dumps(state | {"kl_coef": 9.0}))
    checkpoints.mark_complete(last, world_size=1)
    assert finish(start(runs, "ppo")) == 0, log(runs)
    found = [line["kl_coef"] for line in metrics(one(runs, "ppo"))]
    assert found[: state["step"]] == [line["kl_coef"] for line in lines[: state["step"]]]
    assert found[state["step"]] == 9.0


@pytest.mark.slow
def test_a_complete_stage_has_no_checkpoints_left_and_lines_cut_in_the_middle_are_forgotten(
    whole, tmp_path
):
    runs = beside(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4, signal.SIGKILL)
    folder = one(runs, "ppo")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 7, "sco')
    assert finish(start(runs, "ppo")) == 0, log(runs)
    assert not list(folder.glob("checkpoint-*"))
    assert_same(runs, whole, "ppo")
