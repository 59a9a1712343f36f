"""Every example runs, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_models

ROOT = Path(__file__).parents[1]
SMALL = [
    "prepare.max_rows=60",
    "prepare.test_fraction=0.25",
    "sft.model.hidden_size=32",
    "sft.model.intermediate_size=64",
    "sft.trainer.max_steps=2",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def example(name: str, folder: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_four_examples():
    assert {file.name for file in (ROOT / "examples").glob("*.py")} == {
        "quickstart.py",
        "custom_reward.py",
        "win_rate_of_two_files.py",
        "evaluate_hub_model.py",
    }


def test_quickstart(tmp_path):
    small = [*SMALL, "dpo.trainer.max_steps=2", "evaluate.n_prompts=4", "evaluate.max_new_tokens=8"]
    out = example("quickstart.py", tmp_path, *small)
    assert "dpo against sft on 4 held-out prompts: win rate" in out


def test_custom_reward(tmp_path):
    small = [*SMALL, "ppo.steps=1", "ppo.batch_size=8", "ppo.max_new_tokens=4"]
    assert "score -0." in example("custom_reward.py", tmp_path, *small)


def test_win_rate_of_two_files(tmp_path):
    for name, scores in (("a", [1.0, 2.0, 3.0, 0.0]), ("b", [0.0, 3.0, 1.0, 0.0])):
        rows = [
            {"prompt": f"p{k}", "completion": "x" * (k + len(name)), "score": score}
            for k, score in enumerate(scores)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = example("win_rate_of_two_files.py", tmp_path, "a.jsonl", "b.jsonl")
    assert out.startswith("win rate 62.5%")  # two wins, one loss, one tie


def test_evaluate_hub_model(world, tmp_path):
    from align.config.training import Reward
    from align.stages import reward

    config = Reward(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 2})
    tiny_models.stage(reward, config, {"model": world.sft, "pairs": world.data}, tmp_path / "rm")
    out = example(
        "evaluate_hub_model.py", tmp_path, world.lora, world.sft, tmp_path / "rm", "embedded", 3
    )
    assert "win rate" in out and "on 3 prompts" in out
