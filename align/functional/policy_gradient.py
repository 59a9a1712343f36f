"""Losses of policy gradients, KL estimators, and what tells how an update goes.

A log-probability is of the action (or token) that was taken. Losses are unreduced: who calls them knows how to weigh
tokens, micro-batches and ranks. Use float32 or better: near -10 neighbouring bfloat16 numbers are 1/16 apart, so a
ratio would be 6 % off before any learning.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.functional.masked import masked_var

MAX_LOGRATIO = 20.0
"""Exponents stop here: e^20 is 5e8, and float32 ends at e^88. A single token so far off says only that all is lost."""


def reinforce_loss(
    logps: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Score-function policy gradient: minus log-probability times advantage.

    Source: Williams 1992, Machine Learning 8, 229 to 256, eq. 11.
    """
    return -advantages * logps


def clipped_surrogate_loss(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Tensor, "*shape"]:
    """PPO's pessimistic surrogate: ``max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))``.

    With the old log-probabilities equal to the new its gradient is that of :func:`reinforce_loss`. ``math.inf`` for a
    clip means none: with both, it is the plain importance-weighted loss. ``clip_high > clip_low`` lets unlikely
    actions rise further (clip-higher). ``dual_clip`` (above 1) bounds the loss of a bad action by ``-A * dual_clip``,
    which a ratio far above 1 leaves behind. Beyond :data:`MAX_LOGRATIO` ratio and gradient are those of a constant.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; clip-higher: Yu et al. 2025 (DAPO), arXiv:2503.14476,
    eq. 10; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    """
    ratio = importance_ratio(logps, old_logps)
    loss = torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    )
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def clipped_value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    clip: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Half the squared error, or that of the value kept within ``clip`` of the old one, whichever is greater.

    ``clip`` is in units of the returns; None means none. Inside the range it is the plain loss.

    Source: Schulman et al. 2017, published code (openai/baselines, ppo2); the half as in Ouyang et al. 2022,
    arXiv:2203.02155 and its predecessors.
    """
    loss = 0.5 * (values - returns).square()
    if clip is None:
        return loss
    clipped = values.clamp(old_values - clip, old_values + clip)
    return torch.maximum(loss, 0.5 * (clipped - returns).square())


def entropy(logits: Float[Tensor, "*shape classes"]) -> Float[Tensor, "*shape"]:
    """Entropy of a categorical distribution in nats; a logit of minus infinity contributes 0.

    >>> entropy(torch.tensor([0.0, 0.0, -torch.inf]))  # log 2
    tensor(0.6931)
    """
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def kl_k1(
    logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy, reference) from the policy's samples by the log-ratio: unbiased, often negative.

    Source: Schulman 2020, Approximating KL divergence, http://joschu.net/blog/kl-approx.html.
    """
    return logps - ref_logps


def kl_k2(
    logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy, reference) by half the squared log-ratio: never negative, biased, but little where it is small.

    Source: as :func:`kl_k1`.
    """
    return 0.5 * (logps - ref_logps).square()


def kl_k3(
    logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy, reference) by ``(x - 1) - log x`` with ``x = reference / policy``: unbiased, never negative.

    Source: as :func:`kl_k1`. The exponent stops at :data:`MAX_LOGRATIO`.
    """
    difference = ref_logps - logps
    # expm1: exp(1e-4) - 1 - 1e-4 has no right digit in float32, and may be negative.
    return difference.clamp(max=MAX_LOGRATIO).expm1() - difference


def adaptive_kl_coef(coef: float, kl: float, *, target: float, horizon: int, n: int) -> float:
    """Move the coefficient of a KL penalty towards the one that holds ``kl`` at ``target``.

    ``coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)`` after ``n`` samples; ``horizon`` is how many it
    takes to change the coefficient by 20 % at most.

    >>> adaptive_kl_coef(0.1, 12.0, target=6.0, horizon=256, n=256)
    0.12

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * n / horizon)


def explained_variance(
    values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
) -> Float[Tensor, ""]:
    """Give the share of the returns' variance that the values foretell, over the valid entries of all ranks.

    1 is perfect, 0 is as good as a constant, and below 0 a constant would do better. NaN where all returns are alike.
    """
    variance = masked_var(returns, mask)
    unexplained = masked_var(returns - values, mask)
    return torch.where(variance > 0, 1 - unexplained / variance, math.nan)


def importance_ratio(
    logps: Float[Tensor, "*shape"], old_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Probability ratio new / old, whose logarithm stops at :data:`MAX_LOGRATIO`."""
    return (logps - old_logps).clamp(max=MAX_LOGRATIO).exp()


def importance_weights(
    logps: Float[Tensor, "*shape"], sampler_logps: Float[Tensor, "*shape"], *, cap: float
) -> Float[Tensor, "*shape"]:
    """Weigh samples that another engine drew: ``min(policy / sampler, cap)``. A constant: no gradient passes.

    Exactly 1 where the sampler's log-probabilities are the policy's. Truncation bounds the variance and leaves a bias.

    Source: Ionides 2008, J. Comput. Graph. Stat. 17 (2), Truncated importance sampling.
    """
    return importance_ratio(logps, sampler_logps).clamp(max=cap).detach()
