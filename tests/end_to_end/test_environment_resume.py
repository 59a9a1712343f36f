"""GRPO with a calculator: solved, resumed bit for bit, and two processes against one."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import forks, recipe_runs
from helpers.tiny_models import logger
from torch.testing import assert_close

from align.config.stages import STAGES
from align.online_rl.completions import Completions
from align.online_rl.trainer import OnlineRLTrainer
from align.runtime import distributed

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


def test_the_recipe_with_tools_solves_held_out_questions_by_grpo(tmp_path: Path):
    runs = tmp_path / "runs"
    recipe = (forks.ROOT / "recipes" / "tools.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert recipe_runs.run(runs, "all.seed=0") == 0, recipe_runs.log(runs)
    (file,) = runs.glob("grpo-*/held_out.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    solved = {
        step: [row["score"] for row in rows if row["step"] == step]
        for step in (0, rows[-1]["step"])
    }
    (after_sft, after_grpo) = (sum(scores) / len(scores) for scores in solved.values())
    assert [len(scores) for scores in solved.values()] == [256, 256]
    assert set(solved[0]) == {0.0, 1.0}
    # 44 to 53 % and 96 to 98 % with three seeds.
    assert after_sft < 0.7
    assert after_grpo >= 0.95
    (artifact,) = runs.glob("grpo-*/artifact.json")
    metrics = json.loads(artifact.read_text())["metrics"]["grpo"]
    assert metrics["eval_score"] == pytest.approx(after_grpo)


class FixedTurns:
    """Samples a turn that depends only on the tokens before it and on the number of the copy.

    So a prompt has the same episodes on any rank: calls of the calculator, right and wrong answers,
    and turns without an end token. The completions of a prompt are all on one rank.
    """

    def __init__(self, trainer: OnlineRLTrainer) -> None:
        self.tokenizer = trainer.models.tokenizer
        (self.stop,) = trainer.sampler.stops
        questions = (row["prompt"] for row in trainer.prompts.rows)
        users = (next(t["content"] for t in turns if t["role"] == "user") for turns in questions)
        answers = (int(row["answer"]) for row in trainer.prompts.rows)
        self.answers = dict(zip(users, answers, strict=True))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> Completions:
        """One turn for each prompt; ``seeds`` have no effect."""
        copies: Counter[tuple[int, ...]] = Counter()
        turns, finished = [], []
        for prompt in map(tuple, prompts):
            draw = random.Random(f"{prompt} {copies[prompt]}")
            copies[prompt] += 1
            tokens = self.tokenizer.encode(self.text(prompt, draw), add_special_tokens=False)
            finished.append(draw.random() < 0.8)
            turns.append([*tokens, self.stop] if finished[-1] else tokens)
        return Completions([list(prompt) for prompt in prompts], turns, finished)

    def text(self, prompt: tuple[int, ...], draw: random.Random) -> str:
        """A call, the right answer, or a wrong one."""
        read = self.tokenizer.decode(prompt)
        (answer,) = {number for question, number in self.answers.items() if question in read}
        call = f"calculate: {draw.randint(1, 99)} + {draw.randint(1, 9)}"
        return draw.choice([call, call, f"result: {answer}", f"result: {answer + 1}"])


def two_steps(runs: Path, file: Path) -> None:
    """Train two steps on fixed turns, on all ranks; each writes its metrics and weights."""
    distributed.init_process_group()
    distributed.reset_process_state(0)
    (model,), (prompts,) = runs.glob("sft-*"), runs.glob("prepare-*")
    fields = {
        "model": "sft", "environment": "arithmetic", "max_turns": 3, "steps": 2, "batch_size": 24,
        "n_completions": 4, "max_new_tokens": 24, "learning_rate": 1.0, "schedule": "constant",
        "epochs": 2, "max_grad_norm": 0.1, "kl_coef": 0.1, "scale_advantages": "batch",
        "prefix_sharing": False, "micro_batch_size": 5,
    }  # fmt: skip
    folder = runs.parent / f"{file.stem}-{distributed.rank()}"
    folder.mkdir()
    trainer = OnlineRLTrainer(
        STAGES["grpo"].model_validate(fields),
        {"model": model, "prompts": prompts},
        folder,
        logger("grpo", folder),
    )
    # Adam would turn a rounding error into a large step.
    groups = [{"params": g["params"], "base": g["base"]} for g in trainer.optimizer.param_groups]
    trainer.optimizer = torch.optim.SGD(groups, lr=0.0)
    assert trainer.player is not None
    trainer.player = dataclasses.replace(trainer.player, sampler=FixedTurns(trainer))
    before, metrics = flat(trainer), []
    for step in (0, 1):
        trainer.step(step)
        metrics.append(trainer.metrics)
    results = {"before": before, "after": flat(trainer), "metrics": metrics}
    torch.save(results, file.with_name(f"{file.name}-{distributed.rank()}.pt"))
    distributed.barrier()


def flat(trainer: OnlineRLTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.models.weights().values()])


def test_two_processes_take_the_steps_in_episodes_that_one_takes(tmp_path: Path):
    # Ranks sample with their own seeds, so only fixed turns give both launches the same episodes.
    runs = place(tmp_path / "both")
    assert recipe_runs.run(runs, "--until", "sft") == 0, recipe_runs.log(runs)
    log = tmp_path / "log"
    assert forks.wait(forks.start(two_steps, runs, tmp_path / "one", log=log)) == 0, log.read_text()
    with forks.ranks(two_steps, runs, tmp_path / "two", log=log) as ranks:
        assert [forks.wait(rank) for rank in ranks] == [0, 0], log.read_text()
    one: dict[str, Any] = torch.load(tmp_path / "one-0.pt")
    two: list[dict[str, Any]] = [torch.load(tmp_path / f"two-{rank}.pt") for rank in (0, 1)]
    for step, expected in enumerate(one["metrics"]):
        assert 1 < expected["turns"] < 3
        assert 0 < expected["ended"] < 1
        assert 0 < expected["missing_eos"] < 1
        assert 0 < expected["reward"] < 1
        assert expected["grad_norm"] > 0
        keys = {key for key in expected if not re.match("seconds", key)}
        for rank in two:
            metrics = rank["metrics"][step]
            assert metrics.keys() == expected.keys()
            for key in keys:
                assert metrics[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-5), key
        assert all(two[0]["metrics"][step][k] == two[1]["metrics"][step][k] for k in keys)
    # Each of the four optimizer steps has length 0.1 (the clipped norm); float32 sums differ in
    # their order. Without the other rank's gradients the weights would be about 0.1 off.
    assert (one["after"] - one["before"]).norm() > 0.05
    assert torch.equal(two[0]["after"], two[1]["after"])
    assert torch.equal(two[0]["before"], one["before"])
    assert_close(two[0]["after"], one["after"], rtol=0, atol=5e-5)
