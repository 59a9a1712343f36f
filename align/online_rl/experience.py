"""Episodes of a language model: completions sampled, scored by all roles, and made a rollout to learn from.

A row is prompt and completion without a gap, padded on the right: positions are those of the text alone, whatever stands
beside it in the batch. Column t of a rollout is the choice of token t + 1; its mask is True where that token is of the
completion, eos included. Lengths decide what is real, so pad may equal eos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.functional import policy_gradient
from align.functional.masked import masked_scale
from align.functional.token_rewards import (
    completion_gae,
    leave_one_out,
    rewards_to_go,
    token_rewards,
)
from align.models import generation, tokenization
from align.models.adapters import active_adapter
from align.online_rl.models import ModelView, PPOModels
from align.rl.rollout import Rollout
from align.rl.update import Evaluated

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Completions:
    """Prompts and what was said to them. ``completions`` end in the stop token where ``finished``."""

    prompts: list[list[int]]
    completions: list[list[int]]
    finished: list[bool]
    sampler_logps: list[list[float]] | None = None
    """By another engine than the policy; None where the policy itself sampled."""

    @property
    def rows(self) -> list[list[int]]:
        """Tokens of prompt and completion."""
        return [p + c for p, c in zip(self.prompts, self.completions, strict=True)]

    def tensors(self, pad: int, device: Any) -> dict[str, Tensor]:
        """``ids``, ``mask`` and ``labels`` (the completion's tokens, -100 elsewhere), ``[batch, time]``."""
        ids, mask = tokenization.pad_rows(self.rows, pad=pad, side="right", device=device)
        starts = torch.tensor([len(p) for p in self.prompts], device=device)
        places = torch.arange(ids.shape[1], device=device)
        said = mask.bool() & (places >= starts[:, None])
        return {"ids": ids, "mask": mask, "labels": ids.masked_fill(~said, IGNORED)}


@dataclass(frozen=True, slots=True)
class Experience:
    """What the roles say about episodes, without gradients: ``[batch, time - 1]``, on the policy's device."""

    inputs: dict[str, Tensor]
    logps: Tensor
    ref_logps: Tensor
    entropy: Tensor
    values: Tensor | None

    @property
    def mask(self) -> Tensor:
        """True where a column is the choice of a completion's token."""
        return self.inputs["labels"][:, 1:] != IGNORED


def derive_seed(seed: int, *what: object) -> int:
    """A seed that depends on all it is given: of a step, a rank, a batch. Nothing random is kept between steps."""
    text = ":".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def sample_completions(
    policy: ModelView,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    *,
    batch_size: int,
    seed: int,
) -> Completions:
    """Sample one completion of each prompt from the policy, those of like length together."""
    with active_adapter(policy.model, policy.adapter):
        sampled = generation.generate(
            policy.model,
            prompts,
            stops,
            batch_size=batch_size,
            batch_seed=lambda number: derive_seed(seed, number * batch_size),
        )
    completions = [rows[0] for rows in sampled]
    return Completions(
        [list(p) for p in prompts], completions, [row[-1] in stops for row in completions]
    )


def compute_experience(
    roles: PPOModels, inputs: dict[str, Tensor], *, batch_size: int
) -> Experience:
    """Ask policy, reference and critic about episodes, ``batch_size`` at a time."""
    logps, entropies, ref_logps, values = [], [], [], []
    width = inputs["ids"].shape[1] - 1
    with torch.inference_mode():
        for first in range(0, len(inputs["ids"]), batch_size):
            part = trim_columns({k: v[first : first + batch_size] for k, v in inputs.items()})
            logp, entropy = roles.policy.logps(part["ids"], part["mask"], part["labels"])
            ref_logp, _ = roles.reference.logps(part["ids"], part["mask"], part["labels"])
            logps.append(pad_columns(logp, width))
            entropies.append(pad_columns(entropy, width))
            ref_logps.append(pad_columns(ref_logp, width))
            if roles.critic is not None:
                value = roles.critic.values(part["ids"], part["mask"])
                values.append(pad_columns(value, width))
    return Experience(
        inputs,
        logps=torch.cat(logps),
        ref_logps=torch.cat(ref_logps),
        entropy=torch.cat(entropies),
        values=torch.cat(values) if values else None,
    )


def evaluators(
    roles: PPOModels, *, frozen_policy: bool
) -> list[Callable[[dict[str, Tensor]], Evaluated]]:
    """What :func:`align.rl.update.update` asks about a piece of a batch: the policy, then the critic.

    A frozen policy is asked without gradients.
    """

    def policy(inputs: dict[str, Tensor]) -> Evaluated:
        width, part = inputs["ids"].shape[1] - 1, trim_columns(inputs)
        with torch.set_grad_enabled(not frozen_policy):
            logps, entropy = roles.policy.logps(part["ids"], part["mask"], part["labels"])
        return Evaluated(pad_columns(logps, width), pad_columns(entropy, width))

    def critic(inputs: dict[str, Tensor]) -> Evaluated:
        assert roles.critic is not None
        width, part = inputs["ids"].shape[1] - 1, trim_columns(inputs)
        return Evaluated(values=pad_columns(roles.critic.values(part["ids"], part["mask"]), width))

    return [policy] if roles.critic is None else [policy, critic]


def trim_columns(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that are padding in every row."""
    width = int(inputs["mask"].sum(1).max())
    return {key: value[:, :width] for key, value in inputs.items()}


def pad_columns(values: Tensor, width: int) -> Tensor:
    """With columns of 0 on the right, up to ``width``."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


# Learning from them --------------------------------------------------------------------------------------------------


def make_rollout(
    spoken: Experience,
    scores: Tensor,
    *,
    advantages: str,
    n_completions: int,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
    sampler_logps: Tensor | None,
    importance_cap: float,
) -> Rollout:
    """Rewards of tokens from the KL and the scores, their advantages, and a critic's targets."""
    mask, logps = spoken.mask, spoken.logps
    estimate = policy_gradient.kl_k1 if kl_estimator == "k1" else policy_gradient.kl_k3
    rewards = token_rewards(scores, estimate(logps, spoken.ref_logps), mask, kl_coef=kl_coef)
    if whiten_rewards:
        rewards = masked_scale(rewards, mask)
    values = returns = None
    if advantages == "gae":
        assert spoken.values is not None
        values = spoken.values.masked_fill(~mask, 0)
        found = completion_gae(rewards, values, mask, gamma=gamma, lam=lam)
        returns = found + values
    elif advantages == "rloo":
        found = leave_one_out(rewards.sum(1), n=n_completions)[:, None] * mask
    else:
        found = rewards_to_go(rewards, mask, gamma=gamma)
    weights = None
    if sampler_logps is not None:
        weights = policy_gradient.importance_weights(logps, sampler_logps, cap=importance_cap)
    return Rollout(spoken.inputs, logps, found, mask, values, returns, weights)


def align_sampler_logps(said: Completions, spoken: Experience) -> torch.Tensor | None:
    """Another engine's log-probabilities, in the columns of ours."""
    if said.sampler_logps is None:
        return None
    found = spoken.logps.clone()
    for row, (prompt, logps) in enumerate(zip(said.prompts, said.sampler_logps, strict=True)):
        start = len(prompt) - 1
        found[row, start : start + len(logps)] = torch.tensor(logps, device=found.device)
    return found
