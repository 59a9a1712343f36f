"""GRPO with a calculator: killed and resumed bit for bit, on one process and on two."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from helpers import recipe_runs

pytestmark = pytest.mark.slow

STEPS = 6
RECIPE = f"""\
stages:
  prepare: {{source: arithmetic, max_rows: 300, test_fraction: 0.2, keep_columns: [answer]}}
  sft:
    model: {{vocab_size: 600, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2,
      num_attention_heads: 4, max_position_embeddings: 128}}
    train_on: all
    trainer: {{learning_rate: 1.0e-2, max_steps: 40, per_device_train_batch_size: 16,
      max_length: 128, bf16: false, gradient_checkpointing: false, save_strategy: "no"}}
  grpo:
    model: sft
    environment: arithmetic
    max_turns: 2
    steps: {STEPS}
    batch_size: 32
    n_completions: 4
    max_new_tokens: 24
    kl_coef: 0.01
    learning_rate: 1.0e-3
    epochs: 2
    minibatches: 2
    save_steps: 1
    keep_checkpoints: true
"""


def weights(runs: Path) -> bytes:
    (file,) = runs.glob("grpo-*/model.safetensors")
    return file.read_bytes()


def lines(runs: Path) -> list[dict]:
    (file,) = runs.glob("grpo-*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def place(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "runs"


def test_a_run_with_a_tool_that_is_killed_twice_ends_in_the_same_weights(tmp_path: Path):
    whole, killed = place(tmp_path / "whole"), place(tmp_path / "killed")
    assert recipe_runs.run(whole) == 0, recipe_runs.log(whole)
    steps = lines(whole)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert any(line["grad_norm"] > 0 for line in steps)
    (before,) = whole.glob("sft-*/model.safetensors")
    assert before.read_bytes() != weights(whole)
    for step in (1, 3):
        saved = recipe_runs.file_exists(killed, f"grpo-*/checkpoint-{step}/complete.json")
        delay = random.Random(step).random() * 0.3
        assert recipe_runs.stop(killed, when=saved, delay=delay) != 0
        assert not list(killed.glob("grpo-*/artifact.json"))
    assert recipe_runs.run(killed) == 0, recipe_runs.log(killed)
    assert recipe_runs.log(killed).count("resuming from step") == 2
    assert weights(killed) == weights(whole)
    timed = ("second", "time", "memory")

    def untimed(runs: Path) -> list[dict]:
        return [
            {key: value for key, value in line.items() if not any(part in key for part in timed)}
            for line in lines(runs)
        ]

    assert untimed(killed) == untimed(whole)


def test_two_processes_play_episodes_and_resume_to_the_same_weights(tmp_path: Path):
    runs = place(tmp_path / "two")
    assert recipe_runs.run_on_two_processes(runs) == 0, recipe_runs.log(runs)
    (artifact,) = runs.glob("grpo-*/artifact.json")
    assert json.loads(artifact.read_text())["world_size"] == 2
    assert [line["step"] for line in lines(runs)] == list(range(1, STEPS + 1))
    expected = weights(runs)
    artifact.unlink()
    next(runs.glob("grpo-*/model.safetensors")).unlink()
    assert recipe_runs.run_on_two_processes(runs) == 0, recipe_runs.log(runs)
    assert f"resuming from step {STEPS - 1}" in recipe_runs.log(runs)
    assert weights(runs) == expected
