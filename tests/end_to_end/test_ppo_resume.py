"""PPO and reward stages that were killed and started again give the same results, bit for bit.

Metrics are compared except for durations.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import recipe_runs

from align.runtime import artifacts, checkpoints

pytestmark = pytest.mark.slow

# One backbone has an adaptive coefficient and a warm-up of the critic; the separate models have a
# held-out evaluation.
RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 60, test_fraction: 0.2}
  sft:
    model:
      vocab_size: 300
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
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
    """The runs of an uninterrupted recipe."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert recipe_runs.run_in_new_interpreter(folder / "runs") == 0, recipe_runs.log(
        folder / "runs"
    )
    yield folder / "runs"
    shutil.rmtree(folder)


def runs_before(whole: Path, folder: Path, stage: str) -> Path:
    """A new runs folder in which everything before ``stage`` is finished.

    The folders are links, because adapters name the path of their base model.
    """
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
    """All logged metrics except durations."""
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
    """Assert that the stage is complete and equals that of the uninterrupted run."""
    resumed, other = one(runs, stage), one(whole, stage)
    artifact, expected = artifacts.read_artifact(resumed), artifacts.read_artifact(other)
    assert artifact is not None, recipe_runs.log(runs)
    assert expected is not None
    assert artifact.digest == expected.digest
    names = {path.name for path in other.iterdir()}
    kept = {path.name for path in resumed.glob(f"{checkpoints.DAMAGED}*")}
    assert {path.name for path in resumed.iterdir()} - kept == names
    for name in names & {
        "model.safetensors",
        "adapter_model.safetensors",
        "samples.jsonl",
        "reward.json",
    }:
        assert (resumed / name).read_bytes() == (other / name).read_bytes(), name
    if stage.startswith("ppo"):
        assert metrics(resumed) == metrics(other)
        steps = [line["step"] for line in metrics(resumed) if "score" in line]
        assert steps == list(range(1, LATEST[stage] + 1))
    else:
        assert artifact.metrics["held_out"] == expected.metrics["held_out"]
        assert artifact.metrics["center"] == expected.metrics["center"]


def finish(runs: Path, stage: str) -> None:
    assert recipe_runs.run(runs, "--until", stage) == 0, recipe_runs.log(runs)


def checkpoint_is_complete(runs: Path, stage: str, step: int) -> Callable[[], bool]:
    return recipe_runs.file_exists(runs, f"{stage}-*/checkpoint-{step}/complete.json")


def stop_after(runs: Path, stage: str, step: int, number: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal as soon as the checkpoint of a step is complete. Returns the exit code."""
    marked = checkpoint_is_complete(runs, stage, step)
    return recipe_runs.stop(runs, "--until", stage, when=marked, number=number)


# Without learning, the tests below would pass whatever the code does.
@pytest.mark.parametrize("stage", ["ppo", "ppo_whole"])
def test_an_uninterrupted_run_changes_its_policy_and_samples_differently_in_every_step(
    whole, stage
):
    lines = [line for line in metrics(one(whole, stage)) if "score" in line]
    assert len({line["score"] for line in lines}) > 4
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert abs(lines[-1]["kl"]) > 0.01
    samples = (one(whole, stage) / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 8 * 4  # the first four of every step
    assert len({json.loads(line)["completion"] for line in samples}) > 10


def test_a_recipe_that_is_killed_in_every_stage_gives_the_same_run(whole, tmp_path):
    runs = runs_before(whole, tmp_path, "reward")
    for stage, step in (("reward", 4), ("ppo", 2), ("ppo", 6), ("ppo_whole", 6)):
        assert stop_after(runs, stage, step) == -signal.SIGKILL
    assert recipe_runs.run(runs) == 0, recipe_runs.log(runs)
    assert recipe_runs.log(runs).count("from step ") == 4
    for stage in ("reward", "ppo", "ppo_whole"):
        assert_same(runs, whole, stage)


def test_ppo_on_one_backbone_that_is_killed_at_random_moments_gives_the_same_run(whole, tmp_path):
    runs = runs_before(whole, tmp_path, "ppo")
    artifact = artifacts.read_artifact(one(whole, "ppo"))
    assert artifact is not None
    recipe_runs.kill_at_random_moments(runs, "ppo", seconds=artifact.seconds, kills=2)
    finish(runs, "ppo")
    assert_same(runs, whole, "ppo")


def test_a_killed_reward_stage_ends_with_the_same_weights_and_mean(whole, tmp_path):
    runs = runs_before(whole, tmp_path, "reward_whole")
    assert stop_after(runs, "reward_whole", 4) == -signal.SIGKILL
    finish(runs, "reward_whole")
    assert "from step" in recipe_runs.log(runs)
    assert_same(runs, whole, "reward_whole")


def test_a_reward_stage_that_is_killed_after_training_is_centered_and_evaluated(whole, tmp_path):
    runs = runs_before(whole, tmp_path, "reward")
    written = recipe_runs.file_exists(runs, "reward-*/adapter_model.safetensors")
    recipe_runs.stop(runs, "--until", "reward", when=written)
    (one(runs, "reward") / artifacts.FILE).unlink(missing_ok=True)
    finish(runs, "reward")
    assert_same(runs, whole, "reward")


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("ppo", signal.SIGTERM),
        ("ppo_whole", signal.SIGTERM),
        ("ppo", signal.SIGINT),
    ],
)
def test_a_signal_saves_a_checkpoint_from_which_the_same_command_resumes(
    whole, tmp_path, stage, number
):
    runs = runs_before(whole, tmp_path, stage)
    assert stop_after(runs, stage, 2, number) == 130, recipe_runs.log(runs)
    folder = one(runs, stage)
    assert artifacts.read_artifact(folder) is None
    step = int(checkpoints.list_checkpoints(folder)[-1].name.rpartition("-")[2])
    # The run ends after the step during which the signal arrives: no logged step is lost.
    assert [line["step"] for line in metrics(folder)][-1] == step
    finish(runs, stage)
    assert f"from step {step}" in recipe_runs.log(runs)
    assert_same(runs, whole, stage)


def remove_mark(checkpoint: Path) -> None:
    (checkpoint / checkpoints.COMPLETE_MARK).unlink()
    (checkpoint / "optimizer.pt").unlink()


def truncate_weights(checkpoint: Path) -> None:
    file = checkpoint / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(remove_mark, id="no mark: killed while writing"),
        pytest.param(truncate_weights, id="truncated weights"),
    ],
)
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, damage):
    runs = runs_before(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4)
    *_, before, last = checkpoints.list_checkpoints(one(runs, "ppo"))
    damage(last)
    finish(runs, "ppo")
    step = before.name.rpartition("-")[2]
    assert f"from step {step}" in recipe_runs.log(runs)
    assert_same(runs, whole, "ppo")


def test_a_run_without_a_complete_checkpoint_starts_at_the_beginning(whole, tmp_path):
    runs = runs_before(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4)
    for checkpoint in checkpoints.list_checkpoints(one(runs, "ppo")):
        truncate_weights(checkpoint)
    finish(runs, "ppo")
    assert "from step" not in recipe_runs.log(runs)
    assert_same(runs, whole, "ppo")


def test_the_adaptive_kl_coefficient_is_restored_from_the_checkpoint(whole, tmp_path):
    # beta * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon), with target 0.05, n = 8 and
    # horizon 20
    lines = metrics(one(whole, "ppo"))
    expected = [0.05]
    for line in lines[:-1]:
        error = min(max(line["kl"] / 0.05 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * 8 / 20))
    assert [line["kl_coef"] for line in lines] == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 8

    runs = runs_before(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4)
    last = checkpoints.list_checkpoints(one(runs, "ppo"))[-1]
    state = json.loads((last / "state.json").read_text())
    assert state["kl_coef"] == lines[state["step"]]["kl_coef"]  # of the next step
    (last / "state.json").write_text(json.dumps(state | {"kl_coef": 9.0}))
    checkpoints.mark_complete(last, world_size=1)
    finish(runs, "ppo")
    resumed = [line["kl_coef"] for line in metrics(one(runs, "ppo"))]
    assert resumed[: state["step"]] == [line["kl_coef"] for line in lines[: state["step"]]]
    assert resumed[state["step"]] == 9.0


def test_a_complete_stage_has_no_checkpoints_and_no_incomplete_lines(whole, tmp_path):
    runs = runs_before(whole, tmp_path, "ppo")
    stop_after(runs, "ppo", 4)
    folder = one(runs, "ppo")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 7, "sco')
    finish(runs, "ppo")
    assert not list(folder.glob("checkpoint-*"))
    assert_same(runs, whole, "ppo")
