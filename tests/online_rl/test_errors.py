"""PPO with invalid input: settings that contradict each other, and runs that diverge."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.ppo_fixtures import Folders
from pydantic import ValidationError

from align.config.online_rl_stages import PPO
from align.config.stages import STAGES
from align.errors import UserError
from align.online_rl.optimization import clip_gradients
from align.runtime import distributed
from align.stages import ppo

BASE = {"model": "sft", "rewards": ["reward"], "steps": 8, "batch_size": 8}
COLOCATE = {"sampler": "vllm", "vllm_mode": "colocate"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "cispo", "clip": 0.1}, "`clip` has no effect with `loss: cispo`"),
        ({"overlong_penalty": 2.0}, "has no effect without `overlong_buffer`"),
        ({"overlong_buffer": 9, "max_new_tokens": 8}, "(9) must not exceed `max_new_tokens` (8)"),
        ({"vllm_url": "http://x"}, "has no effect without `sampler: vllm`"),
        ({"max_staleness": 1}, "has no effect without `sampler: vllm`"),
        ({"vllm_mode": "server"}, "has no effect without `sampler: vllm`"),
        ({"vllm_gpu_memory_utilization": 0.5}, "has no effect without `sampler: vllm`"),
        (
            {"sampler": "vllm", "vllm_gpu_memory_utilization": 0.5},
            "`vllm_gpu_memory_utilization` has no effect without `vllm_mode: colocate`; remove it",
        ),
        (COLOCATE | {"max_staleness": 1}, "`max_staleness` has no effect with `vllm_mode: coloc"),
        (COLOCATE | {"vllm_url": "http://x"}, "`vllm_url` has no effect with `vllm_mode: coloc"),
        (COLOCATE | {"vllm_timeout": 9.0}, "`vllm_timeout` has no effect with `vllm_mode: coloc"),
        (COLOCATE | {"quantization": "nf4", "lora": {}}, "needs unquantized weights"),
        (COLOCATE | {"vllm_gpu_memory_utilization": 1.0}, "Input should be less than 1"),
        (COLOCATE | {"environment": "arithmetic"}, "`sampler: vllm` works on completions"),
        ({"kl_horizon": 100}, "has no effect without `kl_target`"),
        ({"n_eval_prompts": 3}, "has no effect without `eval_steps`"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "must therefore be greater than 0"),
        ({"kl_target": 1.0, "kl_horizon": 1}, "could change the sign of `kl_coef`"),
        ({"critic_warmup_steps": 8}, "must be less than `steps` (8), got 8"),
        ({"rewards": ["reward", "reward"]}, "more than once"),
        ({"weights": [1.0, 2.0]}, "one entry for each of `rewards` (1), got 2"),
        ({"n_completions": 3}, "(8) must be a multiple of `n_completions` (3)"),
        ({"minibatches": 9}, "`minibatches` (9) must not exceed `batch_size` (8)"),
        ({"quantization": "nf4"}, "set `lora`"),
        ({"dtype": "bfloat16"}, "rounds small updates to zero"),
        ({"sampler": "vllm", "quantization": "nf4", "lora": {}}, "needs unquantized weights"),
        ({"kl_placement": "loss", "kl_coef": 0.0}, "has no effect with `kl_coef: 0`"),
        ({"loss": "cispo", "dual_clip": 2.0}, "`dual_clip` has no effect with `loss: cispo`"),
        ({"loss": "sapo", "clip": 0.1}, "`clip` has no effect with `loss: sapo`; remove it"),
        ({"loss": "sapo", "clip_high": 0.3}, "`clip_high` has no effect with `loss: sapo`"),
        ({"loss": "sapo", "dual_clip": 2.0}, "`dual_clip` has no effect with `loss: sapo`"),
        ({"loss": "vespo"}, "use a `grpo` or `rloo` stage, or set another `loss`"),
        ({"max_turns": 3}, "`max_turns` has no effect without `environment`"),
        ({"max_episode_tokens": 9}, "`max_episode_tokens` has no effect without `environment`"),
        ({"rewards": []}, "set `rewards`, or an `environment`"),
        ({"environment": "arithmetica"}, "did you mean `arithmetic`?"),
        (
            {"environment": "a:World", "rewards": ["a:World"]},
            "`rewards` contains 'a:World', the name of the rewards of the `environment`",
        ),
        ({"environment": "arithmetic", "judge": "gold"}, "`judge: gold` works on completions"),
        ({"environment": "arithmetic", "sampler": "vllm"}, "`sampler: vllm` works on completions"),
        ({"environment": "arithmetic", "overlong_buffer": 4}, "`overlong_buffer` measures"),
    ],
)
def test_settings_that_contradict_each_other_are_rejected(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError) as raised:
        PPO.model_validate(BASE | changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("grpo", {"n_completions": 1}, "set `n_completions` to at least 2"),
        ("rloo", {"n_completions": 1}, "set `n_completions` to at least 2"),
        ("grpo", {"max_draws": 3}, "`max_draws` has no effect without `filter`"),
        (
            "grpo",
            {"loss": "vespo", "ratio": "sequence"},
            "`ratio` has no effect with `loss: vespo`",
        ),
        ("rloo", {"loss": "vespo", "clip": 0.1}, "`clip` has no effect with `loss: vespo`"),
        ("reinforce", {"loss": "vespo"}, "`loss: vespo` needs one advantage for all tokens"),
    ],
)
def test_settings_of_groups_that_contradict_each_other(
    kind: str, changes: dict[str, Any], message: str
):
    with pytest.raises(ValidationError, match=re.escape(message)):
        STAGES[kind].model_validate(BASE | changes)


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"batch_size": 12, "n_completions": 2}, "batch_size", "use a multiple of 8"),
        ({"minibatches": 4}, "minibatches", "must not exceed the 2 completions of a process"),
    ],
)
def test_batches_that_four_processes_cannot_share_are_rejected(
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    key: str,
    message: str,
):
    assert not list(ppo_fixtures.ppo_config(**settings).batch_size_problems(1))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(UserError) as raised:
        ppo_fixtures.build_trainer(folders, tmp_path, **settings)
    (line,) = raised.value.lines
    assert line.startswith(f"{key}: ")
    assert message in line


def test_a_run_that_diverges_writes_no_policy(folders: Folders, tmp_path: Path):
    config = PPO(
        model="sft",
        rewards=["reward"],
        lora=tiny_models.LORA,
        steps=8,
        batch_size=4,
        max_new_tokens=6,
        learning_rate=1.0e12,
        epochs=4,
        max_grad_norm=1.0e30,
    )
    inputs = {
        "model": folders.world.sft,
        "prompts": folders.world.data,
        "rewards.0": folders.adapter,
    }
    with pytest.raises((UserError, RuntimeError)):
        ppo.run(config, inputs, tmp_path, tiny_models.logger("ppo", tmp_path))
    assert not list(tmp_path.glob("adapter_model*"))


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([math.nan], "gradient of the policy is not finite, .* lower `learning_rate`"),
        ([1.0, math.inf], "gradient of the critic is not finite, .* `critic_learning_rate`"),
    ],
)
def test_a_gradient_that_is_not_finite_names_its_model_and_its_learning_rate(
    gradients: list[float], message: str
):
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in gradients]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = torch.tensor([gradient])
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.0)
    with pytest.raises(UserError, match=message):
        clip_gradients(optimizer, list(parameters), 1.0)


def test_prompts_that_leave_no_room_for_a_completion_are_rejected(folders: Folders, tmp_path: Path):
    with pytest.raises(UserError, match=r"max_new_tokens: .* exceed the model's 192 positions"):
        ppo_fixtures.build_trainer(folders, tmp_path, max_new_tokens=190)
