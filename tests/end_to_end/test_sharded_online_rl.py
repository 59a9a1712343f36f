"""Online RL under launch configurations that shard: two processes train what two under DDP do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
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
  grpo: {model: sft, rewards: [reward], steps: 2, batch_size: 8, n_completions: 4, max_new_tokens: 8,
    learning_rate: 1.0e-3, lora: {r: 2, alpha: 4}}
"""
STAGES = ("ppo", "grpo")
TOLERANCE = 1e-4
"""The same sums in another order: metrics differ by about 1e-6."""
DIVIDED = re.compile(r"(\S+): this process holds ([\d,]+) of ([\d,]+) parameters")


def folder_of(runs: Path, stage: str) -> Path:
    (folder,) = runs.glob(f"{stage}-*")
    return folder


def weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def metrics(folder: Path) -> list[dict[str, float]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if "seconds" not in k} for entry in entries]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes of which each has all weights."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    (runs.parent / "recipe.yaml").write_text(RECIPE)
    assert recipe_runs.run_on_two_processes(runs) == 0, recipe_runs.log(runs)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CONFIGURATIONS)
def test_online_rl_with_divided_weights_learns_the_same_and_resumes(name, kind, whole, tmp_path):
    configuration = forks.ROOT / "accelerate_configs" / f"{name}.yaml"
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs, ignore=shutil.ignore_patterns(*(f"{s}-*" for s in STAGES)))
    shutil.copy(whole.parent / "recipe.yaml", tmp_path)
    assert sharded_run.run(configuration, runs) == 0, recipe_runs.log(runs)
    divided = DIVIDED.findall(recipe_runs.log(runs))
    assert [found[0] for found in divided] == [kind, kind]
    for _, own, total in divided:
        assert int(own.replace(",", "")) < 0.6 * int(total.replace(",", ""))
    for stage in STAGES:
        expected, found = folder_of(whole, stage), folder_of(runs, stage)
        assert {file.name for file in expected.iterdir()} == {file.name for file in found.iterdir()}
        for one, other in zip(metrics(expected), metrics(found), strict=True):
            assert other == pytest.approx(one, rel=0, abs=TOLERANCE, nan_ok=True)
        pair = load_file(weights(found)), load_file(weights(expected))
        assert_close(*pair, rtol=0, atol=TOLERANCE)
        start = load_file(weights(folder_of(whole, "sft")))
        moved = [(pair[0][key] - start[key]).abs().max() for key in pair[0].keys() & start.keys()]
        assert stage == "grpo" or max(moved) > 10 * TOLERANCE, "weights that stay prove nothing"

    # One rank is killed after a checkpoint: the same command resumes, bit for bit.
    before = weights(folder_of(runs, "ppo")).read_bytes()
    shutil.rmtree(folder_of(runs, "ppo"))
    saved = recipe_runs.file_exists(runs, "ppo-*/checkpoint-1/complete.json")
    with sharded_run.running(configuration, runs) as ranks:
        recipe_runs.wait_until(saved, ranks[1], runs)
        os.kill(ranks[1].pid, signal.SIGKILL)
        forks.wait(ranks[1])
    assert not list(runs.glob("ppo-*/artifact.json"))
    assert sharded_run.run(configuration, runs) == 0, recipe_runs.log(runs)
    assert "resuming from step" in recipe_runs.log(runs)
    assert weights(folder_of(runs, "ppo")).read_bytes() == before
