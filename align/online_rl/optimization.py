"""Optimizer, learning rates, gradient clipping and objective of an online-RL run.

The update itself is :func:`align.rl.update.update`, the same for control and language models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.config.online_rl import OnlineRL
from align.config.online_rl_keys import GroupKeys
from align.config.online_rl_stages import PPO
from align.errors import UserError
from align.functional.masked import sum_over_ranks
from align.models import token_batches
from align.online_rl import sharding
from align.online_rl.models import OnlineRLModels
from align.rl.objective import Objective
from align.rl.rollout import Rollout
from align.runtime import distributed

ADAM_EPS = 1e-5
"""As in the original PPO code (Huang et al. 2024, arXiv:2403.17031, section 3.1)."""

LEARNING_RATES = {"policy": "learning_rate", "critic": "critic_learning_rate"}
"""The keys of the learning rates, by the models in the order of the optimizer's groups."""


class NotFiniteError(UserError):
    """An update that would make weights infinite or NaN."""


def build_objective(config: OnlineRL, n_rows: int, *, kl_coef: float) -> Objective:
    """The update's objective for ``n_rows`` completions on this rank.

    ``kl_coef`` is the current coefficient; it has an effect on rollouts with ``ref_logps`` only.
    """
    own: dict[str, Any] = {}
    if isinstance(config, PPO):
        own = {"value_coef": config.value_coef, "value_clip": config.value_clip}
    if isinstance(config, GroupKeys):
        own = {"ratio": config.ratio}
    clip_low, clip_high = config.clip_range
    pieces = math.ceil(math.ceil(n_rows / config.minibatches) / config.micro_batch_size)
    if config.tokens_per_batch is not None:  # :func:`divide_by_tokens` divides a minibatch
        pieces = 1
    return Objective(
        epochs=config.epochs,
        minibatches=config.minibatches,
        micro_batches=min(pieces, n_rows // config.minibatches),
        clip_low=clip_low,
        clip_high=clip_high,
        loss=config.loss,
        aggregate=config.aggregate,
        longest=config.most_sampled_tokens,
        dual_clip=config.dual_clip,
        entropy_coef=config.entropy_coef,
        kl_coef=kl_coef,
        kl_credit="token" if config.kl_placement == "token_loss" else "completion",
        target_kl=config.target_kl,
        max_grad_norm=config.max_grad_norm,
        whiten=config.normalize_advantages,
        **own,
    )


def divide_rows(rows: Sequence[Sequence[int]], *, config: OnlineRL) -> list[list[int]]:
    """Indices of rows, in order, in forward passes of at most ``tokens_per_batch`` tokens."""
    assert config.tokens_per_batch is not None
    return token_batches.divide(
        [[row] for row in rows],
        tokens=config.tokens_per_batch,
        prefix_sharing=config.prefix_sharing,
    )


def divide_by_tokens(rollout: Rollout, *, config: OnlineRL) -> list[Rollout]:
    """A minibatch in forward passes of at most ``tokens_per_batch`` tokens."""
    ids, lengths = rollout.inputs["ids"].tolist(), rollout.inputs["mask"].sum(1).tolist()
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    return [rollout.take(torch.tensor(batch)) for batch in divide_rows(rows, config=config)]


def build_optimizer(config: OnlineRL, models: OnlineRLModels) -> torch.optim.Optimizer:
    """AdamW with one parameter group for the policy and one for the critic.

    ``base`` in a group is its peak learning rate; :func:`set_learning_rates` multiplies it.
    """
    groups = [{"params": models.parameters(models.policy), "base": config.learning_rate}]
    if models.critic is not None:
        assert isinstance(config, PPO)
        rate = config.critic_learning_rate or config.learning_rate
        groups.append({"params": models.parameters(models.critic), "base": rate})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, eps=ADAM_EPS, weight_decay=0.0)
    from bitsandbytes.optim import PagedAdamW8bit

    eight_bits: torch.optim.Optimizer = PagedAdamW8bit(
        groups, lr=0.0, eps=ADAM_EPS, weight_decay=0.0
    )
    return eight_bits


def set_learning_rates(optimizer: torch.optim.Optimizer, config: OnlineRL, step: int) -> None:
    """Set the learning rates of a step; they depend on nothing but its number."""
    factor = schedule(step, config.steps, config.warmup_steps, config.schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def schedule(step: int, steps: int, warmup: int, kind: str) -> float:
    """Factor of the learning rate: it rises over ``warmup`` steps, then follows ``kind``.

    >>> [schedule(step, 4, 0, "linear") for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0


def clip_gradients(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], max_norm: float
) -> Tensor:
    """Average gradients over ranks, then clip policy and critic separately.

    Clipping them together would let a large gradient of the critic scale down the policy's.
    Returns the norm of the policy's gradient before clipping.

    Raises:
        NotFiniteError: A gradient is not finite. All ranks raise: gradients are equal by then.
    """
    for p in parameters:
        if p.grad is not None and not sharding.is_divided(p.grad):  # those are averaged already
            p.grad.copy_(sum_over_ranks(p.grad) / distributed.world_size())
    norms = [
        sharding.whole(torch.nn.utils.clip_grad_norm_(group["params"], max_norm))
        for group in optimizer.param_groups
    ]
    for (model, key), norm in zip(LEARNING_RATES.items(), norms, strict=False):  # maybe no critic
        if not bool(norm.isfinite()):
            raise NotFiniteError(
                f"a gradient of the {model} is not finite, so this step was not applied: lower "
                f"`{key}`, or scale the rewards down with `weights`"
            )
    return norms[0]
