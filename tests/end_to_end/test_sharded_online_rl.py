"""Online RL under launch configurations that shard: two processes train what two under DDP do."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import forks, recipe_runs, sharded_run
from safetensors.torch import load_file
from torch.testing import assert_close

NO_DEEPSPEED = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")
CONFIGURATIONS = [
    pytest.param("zero2", "ZeRO-2", marks=NO_DEEPSPEED),
    pytest.param("zero3", "ZeRO-3", marks=NO_DEEPSPEED),
    pytest.param("fsdp2", "FSDP2"),
]
RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 80, test_fraction: 0.2, validation_fraction: 0.2}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
    trainer: &trainer {learning_rate: 1.0e-2, max_steps: 2, per_device_train_batch_size: 4, bf16: false, gradient_checkpointing: false, save_strategy: "no"}
  reward: {model: sft, trainer: *trainer}
  ppo: {model: sft, rewards: [reward], steps: 3, batch_size: 8, max_new_tokens: 8, micro_batch_size: 2, epochs: 1,
    learning_rate: 1.0e-3, value_coef: 0.5, save_steps: 1, eval_steps: 3, n_eval_prompts: 4, gradient_checkpointing: true}
  grpo: {model: sft, rewards: [reward], steps: 2, batch_size: 8, n_completions: 4, max_new_tokens: 8, learning_rate: 1.0e-3}
  rloo: {model: sft, rewards: [reward], steps: 2, batch_size: 8, max_new_tokens: 8, learning_rate: 1.0e-3,
    lora: &lora {r: 2, alpha: 4}}
  lora_reward: {stage: reward, model: sft, lora: *lora, trainer: *trainer}
  reinforce: {model: sft, rewards: [lora_reward], steps: 2, batch_size: 8, max_new_tokens: 8, learning_rate: 1.0e-3,
    prefix_sharing: false}
  lora_ppo: {stage: ppo, model: sft, rewards: [lora_reward], steps: 3, batch_size: 8, max_new_tokens: 8,
    learning_rate: 1.0e-3, value_coef: 0.5, save_steps: 1, lora: *lora} # all models are on one backbone
  two_backbones: {stage: ppo, model: sft, rewards: [reward], steps: 2, batch_size: 8, max_new_tokens: 8,
    learning_rate: 1.0e-3, value_coef: 0.5, lora: *lora} # the critic is on that of the reward model
"""
STAGES = ("ppo", "grpo", "rloo", "reinforce", "lora_ppo", "two_backbones")
KILLED = ("ppo", "lora_ppo")
TOLERANCE = 1e-4
"""The same sums in another order: metrics differ by about 1e-6."""
DIVIDED = re.compile(r"(\S+): this process holds ([\d,]+) of ([\d,]+) parameters")


def metrics(folder: Path) -> list[dict[str, float]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if "seconds" not in k} for entry in entries]


def largest_change(runs: Path, stage: str) -> float:
    """How far training has moved a weight of the policy; the B of an adapter starts at 0."""
    start = load_file(sharded_run.weights(runs, "sft"))
    end = load_file(sharded_run.weights(runs, stage))
    changes = [w - start.get(k, torch.zeros(())) for k, w in end.items() if "lora_A" not in k]
    return max(float(change.abs().max()) for change in changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes of which each has all weights."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    (runs.parent / "recipe.yaml").write_text(RECIPE)
    assert recipe_runs.run_on_two_processes(runs) == 0, recipe_runs.log(runs)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CONFIGURATIONS)
def test_online_rl_with_divided_weights_learns_the_same_and_resumes(
    name, kind, whole, tmp_path, kill_generator
):
    configuration = forks.ROOT / "accelerate_configs" / f"{name}.yaml"
    runs = tmp_path / "runs"
    runs.mkdir()
    for stage in ("prepare", "sft", "reward", "lora_reward"):
        folder = sharded_run.stage_folder(whole, stage)
        (runs / folder.name).symlink_to(folder)
    shutil.copy(whole.parent / "recipe.yaml", tmp_path)
    assert sharded_run.run(configuration, runs) == 0, recipe_runs.log(runs)
    divided = DIVIDED.findall(recipe_runs.log(runs))
    assert [found[0] for found in divided] == [kind] * len(STAGES)
    own, total = ([int(found[k].replace(",", "")) for found in divided] for k in (1, 2))
    assert all(a < 0.6 * b for a, b in zip(own, total, strict=True))
    sizes = dict(zip(STAGES, total, strict=True))
    assert sizes["lora_ppo"] < 0.6 * sizes["two_backbones"]
    for stage in STAGES:
        expected, found = (
            sharded_run.stage_folder(whole, stage),
            sharded_run.stage_folder(runs, stage),
        )
        assert {file.name for file in expected.iterdir()} == {file.name for file in found.iterdir()}
        for one, other in zip(metrics(expected), metrics(found), strict=True):
            assert other == pytest.approx(one, rel=0, abs=TOLERANCE, nan_ok=True)
        pair = (load_file(sharded_run.weights(each, stage)) for each in (runs, whole))
        assert_close(*pair, rtol=0, atol=TOLERANCE)
        assert largest_change(whole, stage) > 5 * TOLERANCE, "weights that stay prove nothing"

    sharded_run.kill_and_resume(
        configuration, runs, KILLED, range(2, 4), kill_generator, part="optimizer.pt"
    )
