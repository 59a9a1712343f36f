"""Policy-gradient losses, KL estimators and diagnostics of an update.

Log-probabilities are those of the actions (or tokens) that were taken, in nats. Losses are
unreduced: the caller weights tokens, micro-batches and ranks. Use float32 or better: near -10,
neighboring bfloat16 numbers are 1/16 apart, so a ratio can be 6 % off before any learning. Left
out: preference losses (:mod:`align.functional.preference`).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align.functional.masked import masked_var

MAX_LOGRATIO = 20.0
"""Upper bound of the log-ratios that are exponentiated: e^20 is 5e8, and float32 overflows at e^88.

A log-ratio this large means that training has already diverged.
"""


def reinforce_loss(
    logps: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Score-function policy gradient: the negative log-probability times the advantage.

    >>> reinforce_loss(torch.tensor([-2.0]), torch.tensor([3.0]))
    tensor([6.])

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
    """Pessimistic surrogate of PPO: ``max(-A * r, -A * clip(r, 1 - clip_low, 1 + clip_high))``.

    ``r`` is the probability ratio new / old. Where old and new log-probabilities are equal, the
    gradient is that of :func:`reinforce_loss`. A clip of ``math.inf`` disables that side; with both
    disabled this is the importance-weighted loss. ``clip_high > clip_low`` lets unlikely actions
    rise further (clip-higher). ``dual_clip`` (above 1) bounds the loss of an action with negative
    advantage by ``-A * dual_clip``, however large its ratio. Beyond :data:`MAX_LOGRATIO` the ratio
    is constant and its gradient 0.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; clip-higher: Yu et al. 2025 (DAPO),
    arXiv:2503.14476, eq. 10; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    """
    # A ratio is clipped on the side to which its advantage pushes it.
    ratio = importance_ratio(logps, old_logps)
    rises, unbounded = advantages > 0, ratio.new_tensor(math.inf)
    low = torch.where(rises, -unbounded, 1 - clip_low)
    high = torch.where(rises, 1 + clip_high, unbounded)
    loss = -advantages * ratio.clamp(low, high)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def sequence_logps(
    logps: Float[Tensor, "batch time"],
    old_logps: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Log-probabilities whose ratio to the old ones is that of the row, for every action.

    The ratio of a row is the geometric mean of the ratios of its actions, so it does not grow with
    their number. Entries where ``mask`` is False count for nothing.

    >>> new, old = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.1, 0.1]]).log()
    >>> importance_ratio(sequence_logps(new, old, torch.ones(1, 2).bool()), old)  # of 2 and 8
    tensor([[4., 4.]])

    Source: Zheng et al. 2025 (GSPO), arXiv:2507.18071, eq. 7.
    """
    differences = (logps - old_logps).masked_fill(~mask, 0)
    return old_logps + differences.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def cispo_loss(
    logps: Float[Tensor, "*shape"],
    ratio: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    *,
    clip_high: float,
) -> Float[Tensor, "*shape"]:
    """Score-function loss, weighted by the ratio clipped to ``1 + clip_high``: ``-A * w * logp``.

    The weight has no gradient. Other than with :func:`clipped_surrogate_loss`, every action has a
    gradient, however far its ratio is from 1.

    >>> logps, ratio = torch.tensor([-2.0, -1.0]), torch.tensor([0.5, 9.0])
    >>> cispo_loss(logps, ratio, torch.ones(2), clip_high=4.0)
    tensor([1., 5.])

    Source: MiniMax 2025 (CISPO), arXiv:2506.13585, eq. 4; the upper bound alone: Khatri et al. 2025
    (ScaleRL), arXiv:2510.13786.
    """
    return reinforce_loss(logps, advantages) * ratio.detach().clamp(max=1 + clip_high)


def sapo_loss(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    *,
    temperature: float = 1.0,
    negative_temperature: float = 1.05,
) -> Float[Tensor, "*shape"]:
    """Surrogate with a soft bound on the ratio ``r``: ``-A * (4 / t) * sigmoid(t * (r - 1))``.

    ``t`` is ``negative_temperature`` where the advantage is negative, else ``temperature``; both
    are above 0. The gradient is that of the importance-weighted loss times ``4 * s * (1 - s)``,
    where ``s`` is the sigmoid. This factor is 1 where the ratio is 1, so that the gradient is that
    of :func:`reinforce_loss`, and falls on both sides. The loss at a ratio of 1 is ``-2 * A / t``.

    >>> logps, old = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log()
    >>> sapo_loss(logps, old, torch.ones(2))  # -4 * sigmoid(0), -4 * sigmoid(1)
    tensor([-2.0000, -2.9242])

    Source: Gao et al. 2025 (SAPO), arXiv:2511.20347: objective, gate and temperatures.
    """
    slope = _by_sign(advantages, temperature, negative_temperature)
    gate = torch.sigmoid(slope * (importance_ratio(logps, old_logps) - 1))
    return -advantages * (4 / slope) * gate


def vespo_loss(
    logps: Float[Tensor, "batch time"],
    old_logps: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    power: float = 2.0,
    decay: float = 3.0,
    negative_power: float = 3.0,
    negative_decay: float = 2.0,
) -> Float[Tensor, "batch time"]:
    """Score-function loss, weighted by a function of the ratio ``w`` of the row: ``-A * f * logp``.

    ``w`` is the product of the ratios of the row's actions, the importance weight of the row, and
    at most ``exp(MAX_LOGRATIO)``. ``f = w^power * exp(decay * (1 - w))`` has no gradient. It is 1
    where ``w`` is 1, greatest where ``w`` is ``power / decay``, and approaches 0 for rows that have
    become much less or much more likely. Negative advantages have their own power and decay.
    Entries where ``mask`` is False do not count in ``w``.

    >>> logps, old = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, 0.25]]).log()
    >>> vespo_loss(logps, old, torch.ones(1, 2), torch.ones(1, 2).bool())  # 4 / e^3 * log 2
    tensor([[0.1380, 0.1380]])

    Source: Shen et al. 2026 (VESPO), arXiv:2602.10693: the kernel; the parameters are those of its
    published code.
    """
    differences = (logps.detach() - old_logps).masked_fill(~mask, 0)
    log_ratio = differences.sum(1, keepdim=True).clamp(max=MAX_LOGRATIO)
    powers = _by_sign(advantages, power, negative_power)
    decays = _by_sign(advantages, decay, negative_decay)
    # One exponential of the sum: at the bound, e^20, the power is 5e17 and the decay underflows.
    weight = (powers * log_ratio - decays * log_ratio.expm1()).exp()
    return reinforce_loss(logps, advantages) * weight


def _by_sign(
    advantages: Float[Tensor, "*shape"], value: float, negative_value: float
) -> Float[Tensor, "*shape"]:
    """``negative_value`` where the advantage is negative, else ``value``."""
    return torch.where(
        advantages < 0, advantages.new_tensor(negative_value), advantages.new_tensor(value)
    )


def clipped_value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    clip: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Half the squared error, or that of the value clipped to the old one, whichever is greater.

    The clipped value stays within ``clip`` of the old one, in units of the returns; None disables
    clipping. Inside that range the two errors are equal.

    >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([4.0]))
    tensor([4.5000])

    Source: Schulman et al. 2017, published code (openai/baselines, ppo2); the half as in Ouyang et
    al. 2022, arXiv:2203.02155 and its predecessors.
    """
    loss = 0.5 * (values - returns).square()
    if clip is None:
        return loss
    clipped = values.clamp(old_values - clip, old_values + clip)
    return torch.maximum(loss, 0.5 * (clipped - returns).square())


def entropy(logits: Float[Tensor, "*shape classes"]) -> Float[Tensor, "*shape"]:
    """Entropy of a categorical distribution, in nats; a logit of minus infinity contributes 0.

    >>> entropy(torch.tensor([0.0, 0.0, -torch.inf]))  # log 2
    tensor(0.6931)
    """
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def kl_k1(
    logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy, reference) on the policy's samples by the log-ratio.

    Unbiased, but often negative. Subtracted from the reward, it gives the gradient of the KL
    divergence.

    >>> kl_k1(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # log 2
    tensor([0.6931])

    Source: Schulman 2020, Approximating KL divergence, http://joschu.net/blog/kl-approx.html.
    """
    return logps - ref_logps


def kl_k3(
    logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy, reference) on the policy's samples by ``(x - 1) - log x``.

    ``x`` is the probability ratio reference / policy. Unbiased and never negative. The exponent is
    bounded by :data:`MAX_LOGRATIO`.

    It estimates the value, not the gradient. As a reward its gradient is that of KL(policy,
    reference) - KL(reference, policy), whose minimum is a policy that excludes completions of the
    reference. As a loss, its gradient is that of KL(reference, policy). Use :func:`kl_loss`.

    >>> kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # (1/2 - 1) + log 2
    tensor([0.1931])

    Source: as :func:`kl_k1`.
    """
    difference = ref_logps - logps
    # expm1: in float32, exp(1e-4) - 1 - 1e-4 has no correct digit and may be negative.
    return difference.clamp(max=MAX_LOGRATIO).expm1() - difference


def kl_loss(
    logps: Float[Tensor, "batch time"],
    old_logps: Float[Tensor, "batch time"],
    ref_logps: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Loss with the gradient of KL(policy, reference), one value per token.

    The value of a token is ``ratio * (k3 + later)``: the probability ratio new / old, :func:`kl_k3`
    of the token, and the sum of k3 of the later tokens of its row, without gradient. Without the
    ratio, k3 has the gradient of another divergence; without ``later``, a token would not pay for
    the tokens that it leads to. Entries where ``mask`` is False are 0.

    >>> half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.25]]).log()
    >>> kl_loss(half, half, quarter, torch.tensor([[True, True]]))  # twice 0.1931, then once
    tensor([[0.3863, 0.1931]])

    Source: DeepSeek-AI 2025, arXiv:2512.02556, eq. 7 (the ratio); Tang and Munos 2025,
    arXiv:2506.09477 (which gradients are those of the divergence, and the later tokens).
    """
    k3 = kl_k3(logps, ref_logps).masked_fill(~mask, 0)
    from_here = k3.detach().flip(1).cumsum(1).flip(1)
    later = torch.nn.functional.pad(from_here[:, 1:], (0, 1))
    return (importance_ratio(logps, old_logps) * (k3 + later)).masked_fill(~mask, 0)


def adaptive_kl_coef(coef: float, kl: float, *, target: float, horizon: int, n: int) -> float:
    """Move the coefficient of a KL penalty toward the one that keeps ``kl`` at ``target``.

    ``coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)`` after ``n`` samples: within
    ``horizon`` samples the coefficient changes by 20 % at most.

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
    """Share of the variance of the returns that the values predict, over all ranks.

    1 is a perfect prediction, 0 that of a constant; below 0, a constant would be better. Only valid
    entries of the mask count. NaN where all returns are equal.

    >>> values, mask = torch.tensor([0.5, 1.0, 3.0]), torch.ones(3).bool()
    >>> explained_variance(values, 2 * values, mask)  # half way to the returns: 1 - 1/4
    tensor(0.7500)
    """
    variance = masked_var(returns, mask)
    unexplained = masked_var(returns - values, mask)
    return torch.where(variance > 0, 1 - unexplained / variance, math.nan)


def importance_ratio(
    logps: Float[Tensor, "*shape"], old_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Probability ratio new / old, with its logarithm bounded by :data:`MAX_LOGRATIO`.

    >>> importance_ratio(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    tensor([2.])
    """
    return (logps - old_logps).clamp(max=MAX_LOGRATIO).exp()


def importance_weights(
    logps: Float[Tensor, "*shape"], sampler_logps: Float[Tensor, "*shape"], *, cap: float
) -> Float[Tensor, "*shape"]:
    """Weights of samples that another engine drew: ``min(policy / sampler, cap)``, no gradient.

    Exactly 1 where sampler and policy have equal log-probabilities. The cap bounds the variance and
    adds a bias.

    >>> policy, sampler = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.1]).log()
    >>> importance_weights(policy, sampler, cap=2.0)
    tensor([1., 2.])

    Source: Ionides 2008, J. Comput. Graph. Stat. 17 (2), Truncated importance sampling.
    """
    return importance_ratio(logps, sampler_logps).clamp(max=cap).detach()
