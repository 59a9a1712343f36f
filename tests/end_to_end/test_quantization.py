"""Every stage in 4 bits: a chain, resuming with an 8-bit optimizer, and two processes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_models, wide_model
from helpers.tiny_models import LOG_2, TRAINER
from safetensors.torch import load_file
from test_launch import LAUNCH, SCRIPT, TWO

import align
from align.config.online_rl_stages import PPO
from align.config.training import DPO
from align.runtime import artifacts
from align.stages import dpo, ppo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]
pytest.importorskip("bitsandbytes")
LORA = {"r": 4, "alpha": 8}
FOUR_BITS: dict[str, Any] = {"quantization": "nf4", "lora": LORA}
LENGTH = "helpers.key_changes:length"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def wide(world: tiny_models.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model.save(world, tmp_path_factory.mktemp("wide"))


def first_loss(stage: Path) -> float:
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    return next(entry["loss"] for entry in map(json.loads, lines) if "loss" in entry)


def test_every_stage_runs_in_four_bits(world: tiny_models.World, wide: Path, tmp_path: Path):
    trained = FOUR_BITS | {"trainer": TRAINER | {"max_steps": 3, "optim": "paged_adamw_8bit"}}
    # Enough steps to see every pair, so that log-probabilities of the reference are cached.
    every_pair = trained["trainer"] | {"max_steps": 6}
    data = str(world.data)
    sampled = {"n_prompts": 4, "max_new_tokens": 8, "quantization": "nf4"}
    recipe = {"stages": {
        "sft": {"model": str(wide), "demonstrations": data, **trained},
        "dpo": {"model": "sft", "pairs": data, **FOUR_BITS, "trainer": every_pair},
        "plain": {"stage": "dpo", "model": "sft", "pairs": data, "lora": LORA,
                  "trainer": every_pair},
        "merged": {"stage": "dpo", "model": "sft", "pairs": data, "trainer": every_pair},
        "kto": {"model": "sft", "preferences": data, **trained},
        "reward": {"model": "sft", "pairs": data, **trained},
        "ppo": {"model": "sft", "prompts": data, "rewards": ["reward"], **FOUR_BITS, "steps": 2,
                "batch_size": 8, "max_new_tokens": 8, "optimizer": "paged_adamw_8bit"},
        "sample": {"model": "dpo", "prompts": data, **sampled},
        "evaluate": {"policies": ["dpo", "kto", "ppo"], "baseline": "sft", "prompts": data,
                     "judge": "reward", "implicit_rewards": True, **sampled},
    }}  # fmt: skip
    run = align.run(recipe, tmp_path / "runs")
    folders = {name: run[name].folder for name in recipe["stages"]}
    full = sum(weight.numel() for weight in load_file(wide / "model.safetensors").values())
    adapter = load_file(folders["sft"] / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    metrics = artifacts.read_json(folders["sft"] / "artifact.json")["metrics"]
    assert metrics["parameters"] == full + sum(weight.numel() for weight in adapter.values())
    # Cached log-probabilities of the reference are those of the policy before its first step.
    for name in ("dpo", "plain", "merged"):
        assert first_loss(folders[name]) == pytest.approx(LOG_2, abs=1e-4), name
    caches = {
        name: tuple(artifacts.read_json(folders[name] / "artifact.json")["metrics"]["reference"]["folders"])
        for name in ("dpo", "plain", "merged")
    }  # fmt: skip
    assert len({*caches.values()}) == 3
    # The same adapter on another base is another policy.
    losses = {name: [json.loads(line).get("loss") for line in (folders[name] / "metrics.jsonl").read_text().splitlines()] for name in ("dpo", "plain")}  # fmt: skip
    assert losses["dpo"] != losses["plain"]


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_a_run_that_is_resumed_ends_in_the_same_weights(
    world: tiny_models.World, wide: Path, tmp_path: Path, kind: str
):
    module: Any = {"dpo": dpo, "ppo": ppo}[kind]
    common = FOUR_BITS | {"model": "m", "keep_checkpoints": True}
    settings: Any = {
        "dpo": lambda: DPO(**common, trainer=TRAINER | {
            "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "paged_adamw_8bit",
            "learning_rate": 5e-2,
        }),
        "ppo": lambda: PPO(**common, rewards=[LENGTH], steps=4, batch_size=8, max_new_tokens=8,
                           save_steps=2, optimizer="paged_adamw_8bit", learning_rate=5e-2),
    }[kind]()  # fmt: skip
    inputs = {"model": wide, {"dpo": "pairs", "ppo": "prompts"}[kind]: world.data}
    whole, resumed = tmp_path / "whole" / kind, tmp_path / "resumed" / kind
    tiny_models.stage(module, settings, inputs, whole)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    weights = load_file(whole / "adapter_model.safetensors")
    if kind == "dpo":
        early = load_file(whole / "checkpoint-2" / "adapter_model.safetensors")
        assert not torch.equal(*(w[min(weights)] for w in (early, weights)))
    tiny_models.stage(module, settings, inputs, resumed)
    again = load_file(resumed / "adapter_model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    steps = [json.loads(x)["step"] for x in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) > 2


def test_two_processes_train_what_one_trains(world: tiny_models.World, wide: Path, tmp_path: Path):
    trainer = TRAINER | {"max_steps": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
    trainer |= {"per_device_train_batch_size": 4}
    recipe = {"stages": {
        "dpo": {"model": str(wide), "pairs": str(world.data), **FOUR_BITS, "trainer": trainer},
    }}  # fmt: skip
    two = tmp_path / "two"
    two.mkdir()
    (two / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [*LAUNCH, *TWO, SCRIPT, "recipe.yaml"], cwd=two, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    trainer["per_device_train_batch_size"] = 8
    (one,) = (stage.folder for stage in align.run(recipe, tmp_path / "one").values())
    (other,) = (two / "runs").glob("dpo-*")
    weights, same = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, rtol=1e-3, atol=1e-5)
