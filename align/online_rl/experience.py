"""Experience of a language model: log-probabilities and values of completions, and the rollout.

A row is a prompt and its completion without a gap, padded on the right, so a token's position does
not depend on the other rows of its batch. Column ``t`` of an experience is the choice of token
``t + 1``; its mask is True where that token belongs to the completion, eos included.

Left out: sampling (:mod:`align.online_rl.sampling`), scores (:mod:`align.online_rl.scoring`), and
the update (:mod:`align.rl.update`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.config.online_rl import OnlineRL
from align.config.online_rl_stages import GRPO, PPO, RLOO, Reinforce
from align.functional import policy_gradient
from align.functional.masked import masked_scale
from align.functional.token_rewards import (
    completion_gae,
    group_relative,
    leave_one_out,
    rewards_to_go,
    token_rewards,
)
from align.online_rl.completions import IGNORED, Completions
from align.online_rl.models import OnlineRLModels
from align.rl.rollout import Rollout
from align.rl.update import Evaluated


@dataclass(frozen=True, slots=True)
class Experience:
    """Log-probabilities, entropies and values of the completions, without gradients."""

    inputs: dict[str, Int[Tensor, "batch positions"]]
    """``ids``, ``mask`` and ``labels`` of :meth:`Completions.tensors`."""
    logps: Float[Tensor, "batch time"]
    """Log-probabilities of the tokens under the policy before the update, in nats."""
    ref_logps: Float[Tensor, "batch time"]
    """The same under the reference."""
    entropy: Float[Tensor, "batch time"]
    """Entropy of the policy's distribution, in nats."""
    values: Float[Tensor, "batch time"] | None
    """The critic's values of the states before each token; None without a critic."""
    sampler_logps: Float[Tensor, "batch time"] | None = None
    """Log-probabilities of the tokens according to the sampler; None if they are unknown."""

    @property
    def mask(self) -> Bool[Tensor, "batch time"]:
        """True where a column is the choice of a completion's token."""
        return self.inputs["labels"][:, 1:] != IGNORED


def compute_experience(
    models: OnlineRLModels,
    completions: Completions,
    *,
    batch_size: int,
    divide: Callable[[list[list[int]]], list[list[int]]] | None = None,
) -> Experience:
    """Evaluate completions under policy, reference and critic, ``batch_size`` rows at a time.

    If ``divide`` is given, it divides the rows instead, as lists of their indices in order.
    """
    inputs = completions.tensors(models.tokenizer.pad_token_id, models.device)
    indices = list(range(len(completions.rows)))
    batches = (
        [indices[k : k + batch_size] for k in range(0, len(indices), batch_size)]
        if divide is None
        else divide(completions.rows)
    )
    logps, entropies, ref_logps, values = [], [], [], []
    width = inputs["ids"].shape[1] - 1
    with torch.inference_mode(), models.mixed_precision():
        for batch in batches:
            part = trim_columns({k: v[batch] for k, v in inputs.items()})
            logp, entropy = models.policy.logps(part["ids"], part["mask"], part["labels"])
            ref_logp, _ = models.reference.logps(part["ids"], part["mask"], part["labels"])
            logps.append(pad_columns(logp, width))
            entropies.append(pad_columns(entropy, width))
            ref_logps.append(pad_columns(ref_logp, width))
            if models.critic is not None:
                value = models.critic.values(part["ids"], part["mask"])
                values.append(pad_columns(value, width))
    policy_logps = torch.cat(logps)
    return Experience(
        inputs,
        logps=policy_logps,
        ref_logps=torch.cat(ref_logps),
        entropy=torch.cat(entropies),
        values=torch.cat(values) if values else None,
        sampler_logps=align_sampler_logps(completions, policy_logps),
    )


def align_sampler_logps(
    completions: Completions, logps: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"] | None:
    """The sampler's log-probabilities in the columns of ``logps``; None if they are unknown.

    Columns outside the completions are copied from ``logps``, so their importance weight is 1.
    """
    if completions.sampler_logps is None:
        return None
    aligned = logps.clone()
    pairs = zip(completions.prompts, completions.sampler_logps, strict=True)
    for row, (prompt, token_logps) in enumerate(pairs):
        start = len(prompt) - 1
        values = torch.tensor(token_logps, device=aligned.device)
        aligned[row, start : start + len(token_logps)] = values
    return aligned


def make_rollout(
    experience: Experience, scores: Float[Tensor, " batch"], config: OnlineRL, *, kl_coef: float
) -> Rollout:
    """Token rewards from KL and scores, advantages, and the critic's targets.

    ``kl_coef`` is the current coefficient, which may have been adapted from ``config.kl_coef``. If
    the KL penalty is a term of the loss, the rewards are the scores alone, and the rollout holds
    the log-probabilities under the reference. Tokens of another engine than the policy have the
    weights of :func:`importance_weights`.
    """
    mask, logps = experience.mask, experience.logps
    kl_in_loss = config.kl_placement != "reward"
    kl = policy_gradient.kl_k1(logps, experience.ref_logps)
    kl_coef = 0.0 if kl_in_loss else kl_coef
    rewards = token_rewards(scores.to(logps.device), kl, mask, kl_coef=kl_coef)
    if config.normalize_rewards:
        rewards = masked_scale(rewards, mask)
    values = returns = None
    if config.has_critic:
        assert experience.values is not None
        values = experience.values.masked_fill(~mask, 0)
    advantages = estimate_advantages(rewards, values, mask, config)
    if values is not None:
        returns = advantages + values
    weights = None
    if config.sampler == "vllm" and experience.sampler_logps is not None:
        weights = policy_gradient.importance_weights(
            logps, experience.sampler_logps, cap=config.importance_cap
        )
    ref_logps = experience.ref_logps if kl_in_loss else None
    return Rollout(experience.inputs, logps, advantages, mask, values, returns, weights, ref_logps)


def estimate_advantages(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"],
    config: OnlineRL,
) -> Float[Tensor, "batch time"]:
    """Advantages of the tokens by the estimator of the stage."""
    match config:
        case PPO():
            assert values is not None
            return completion_gae(rewards, values, mask, gamma=config.gamma, lam=config.gae_lambda)
        case GRPO():
            returns = group_relative(
                rewards.sum(1), n=config.n_completions, scale=config.scale_advantages
            )
            return returns[:, None] * mask
        case RLOO():
            return leave_one_out(rewards.sum(1), n=config.n_completions)[:, None] * mask
        case Reinforce():
            return rewards_to_go(rewards, mask, gamma=config.gamma)
        case _:
            raise TypeError(f"no estimator of advantages for {type(config).__name__}")


def evaluators(
    models: OnlineRLModels, *, frozen_policy: bool
) -> list[Callable[[dict[str, Tensor]], Evaluated]]:
    """Functions for :func:`align.rl.update.update`: the policy, then the critic if it exists.

    Each evaluates some rows of a rollout. With ``frozen_policy`` the policy has no gradients, so
    only the critic learns.
    """

    def policy(inputs: dict[str, Tensor]) -> Evaluated:
        width, part = inputs["ids"].shape[1] - 1, trim_columns(inputs)
        with torch.set_grad_enabled(not frozen_policy), models.mixed_precision():
            logps, entropy = models.policy.logps(part["ids"], part["mask"], part["labels"])
        return Evaluated(pad_columns(logps, width), pad_columns(entropy, width))

    def critic(inputs: dict[str, Tensor]) -> Evaluated:
        assert models.critic is not None
        width, part = inputs["ids"].shape[1] - 1, trim_columns(inputs)
        with models.mixed_precision():
            values = models.critic.values(part["ids"], part["mask"])
        return Evaluated(values=pad_columns(values, width))

    return [policy] if models.critic is None else [policy, critic]


def trim_columns(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the columns that are padding in every row."""
    width = int(inputs["mask"].sum(1).max())
    return {key: value[:, :width] for key, value in inputs.items()}


def pad_columns(values: Float[Tensor, "batch time"], width: int) -> Float[Tensor, "batch width"]:
    """Append columns of 0, up to ``width`` columns."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
