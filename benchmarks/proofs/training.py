"""Runs of the product's stages and trainers in a world; each returns the policy it reaches."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from align.config.online_rl import OnlineRL
from align.config.stages import STAGES
from align.runtime import distributed
from align.runtime.progress import Logger, NullDisplay
from benchmarks.proofs.world import LIMIT, PROMPTS, TEXTS, World, assistant, distribution, user

ONLINE: dict[str, Any] = {
    "prompts": "data",
    "rewards": ["score"],
    "batch_size": 256,
    "max_new_tokens": LIMIT,
    "kl_coef": 1.0,
    "learning_rate": 1.5e-3,
    "steps": 80,
    "epochs": 2,
    "max_grad_norm": 10.0,
    "prefix_sharing": False,
    "micro_batch_size": 256,
    "sample_batch_size": 256,
}
OFFLINE: dict[str, Any] = {
    "per_device_train_batch_size": 200,
    "learning_rate": 1.5e-3,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 8,
    "save_strategy": "no",
    "logging_steps": 10,
    "bf16": False,
    "gradient_checkpointing": False,
}
ROWS = {"sft": "demonstrations", "dpo": "pairs", "reward": "pairs", "kto": "preferences"}
"""The input with the rows, of each stage with a trainer of TRL."""


def train_online(kind: str, world: World, seed: int, settings: Mapping[str, Any]) -> Tensor:
    """Train on the exact reward with an online-RL stage; returns the policy's distribution.

    ``rewards`` in ``settings`` are functions of :func:`reward_functions`.
    """
    from align.online_rl.trainer import OnlineRLTrainer

    output = new_folder(world, kind)
    settings = {**ONLINE, **settings}
    with reward_functions(world) as module:
        settings["rewards"] = [f"{module}:{name}" for name in settings["rewards"]]
        config = STAGES[kind].model_validate({"model": "model", "seed": seed, **settings})
        assert isinstance(config, OnlineRL)
        distributed.reset_process_state(seed)
        inputs = {"model": world.model, "prompts": world.data}
        trainer = OnlineRLTrainer(config, inputs, output, logger(kind, output))
        trainer.train()
    return distribution(trainer.models.policy.model)


def train_offline(
    kind: str,
    world: World,
    seed: int,
    settings: Mapping[str, Any],
    trainer: Mapping[str, Any],
) -> tuple[Path, dict[str, Any]]:
    """Run a stage with a trainer of TRL; returns its folder and its metrics."""
    output = new_folder(world, kind)
    config = STAGES[kind].model_validate(
        {
            "model": "model",
            "seed": seed,
            "prefix_sharing": False,
            **settings,
            "trainer": {**OFFLINE, **trainer},
        }
    )
    distributed.reset_process_state(seed)
    inputs = {"model": world.model, ROWS[kind]: world.data}
    result = importlib.import_module(f"align.stages.{kind}").run(
        config, inputs, output, logger(kind, output)
    )
    return output, result.metrics


def reward_scores(folder: Path) -> Tensor:
    """Scores of a reward model for all completions, ``[prompt, completion]``."""
    import torch

    from align.rewards.reward_model import RewardModel

    model = RewardModel.load(folder, dtype="float32", device="cpu", prefix_sharing=False)
    turns = [assistant(text) for text in TEXTS]
    rows = [
        model.score([user(prompt)] * len(TEXTS), turns, batch_size=len(TEXTS)).double()
        for prompt in PROMPTS
    ]
    return torch.stack(rows)


def new_folder(world: World, kind: str) -> Path:
    """A new folder for the output of a stage."""
    number = sum(1 for _ in world.folder.glob("run-*"))
    output = world.folder / f"run-{number}-{kind}"
    output.mkdir()
    return output


def logger(name: str, folder: Path) -> Logger:
    """A logger that displays nothing."""
    display = NullDisplay()
    display.start(name, folder, "running")
    return Logger(name, folder, display, main=True)


@contextmanager
def reward_functions(world: World) -> Iterator[str]:
    """A Python module with the exact reward, in the working directory as a user has it.

    ``score`` is the reward; ``first`` and ``rest`` are its parts.
    """
    module = "world_" + "".join(c if c.isalnum() else "_" for c in world.folder.name)
    (world.folder / f"{module}.py").write_text(
        f"TABLE = {world.table!r}\n\n\n"
        "def score(prompts, completions):\n"
        "    pairs = zip(prompts, completions)\n"
        "    return [TABLE[prompt[-1]['content']][text] for prompt, text in pairs]\n\n\n"
        "def first(prompts, completions):\n"
        "    return score(prompts, [text[:1] for text in completions])\n\n\n"
        "def rest(prompts, completions):\n"
        "    pairs = zip(score(prompts, completions), first(prompts, completions))\n"
        "    return [whole - part for whole, part in pairs]\n",
        encoding="utf-8",
    )
    before = Path.cwd()
    os.chdir(world.folder)
    try:
        yield module
    finally:
        os.chdir(before)
        sys.modules.pop(module, None)
