"""The fixed points of policy gradients that normalize or select, as tables of log-probabilities.

At a fixed point the expected gradient of every logit is 0. Nothing here reads the code under test.
Symbols are those of :mod:`benchmarks.proofs.optima`; ``pi`` is the policy, ``ref`` the reference.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benchmarks.proofs.optima import bisect
from benchmarks.proofs.world import LENGTHS, TEXTS, WORDS, World

TOLERANCE = 1e-10
"""Change of all log-probabilities at which an iteration ends."""
Scale = Literal["group", "batch", "none"]
"""Standard deviation that rewards are divided by: of a prompt, of all prompts, or none."""
FIRST = torch.tensor([WORDS.index(text[0]) if text else len(WORDS) for text in TEXTS])
"""The first token of each completion; the last number is eos."""


def deviations(policy: Tensor, rewards: Tensor, scale: Scale) -> Tensor:
    """Standard deviation of the rewards under a policy, ``[prompt, 1]``.

    That of the batch includes the differences between the means of the prompts.
    """
    if scale == "none":
        return torch.ones(len(policy), 1, dtype=torch.float64)
    chances = policy.exp()
    mean = (chances * rewards).sum(1, keepdim=True)
    if scale == "batch":
        mean = mean.mean()
    variances = (chances * (rewards - mean).square()).sum(1, keepdim=True)
    if scale == "batch":
        variances = variances.mean().expand(len(policy), 1)
    return variances.sqrt()


def group_relative(
    world: World, beta: float, *, scale: Scale, per_sequence: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The fixed point of group-relative advantages with a KL term in the loss.

    With advantages ``(r - b) / s``, ``b`` and ``s`` the mean and standard deviation under the
    policy itself, and each completion's terms divided by its length if ``per_sequence``, every
    gradient is 0 where ``h = ((r - b) / s - c length) / beta``. The constant ``c`` normalizes the
    policy (without division by the length, ``c`` multiplies 1 instead). Returns the policy, ``s``
    and ``c``, each for every prompt: the difficulty bias is the factor ``1 / s``, the length bias
    is the cost ``c`` of a token.

    Source: Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783, section 3, which names both biases; the
    fixed point is solved here.
    """
    reference, rewards = world.reference, world.rewards
    lengths = LENGTHS if per_sequence else torch.ones_like(LENGTHS)
    policy = None
    deviation = torch.ones(len(reference), 1, dtype=torch.float64)
    mean = (reference.exp() * rewards).sum(1, keepdim=True)
    low = torch.full((len(reference), 1), -100.0, dtype=torch.float64)
    for _ in range(150):
        before = policy
        gains = (rewards - mean) / deviation / beta
        cost = -bisect(
            lambda c, gains=gains: (reference + gains + lengths * c).logsumexp(1, keepdim=True),
            low,
            -low,
        )
        policy = (reference + gains - lengths * cost).log_softmax(1)
        mean = (mean + (policy.exp() * rewards).sum(1, keepdim=True)) / 2
        deviation = (deviation + deviations(policy, rewards, scale)) / 2
        if before is not None and torch.allclose(policy, before, rtol=0, atol=TOLERANCE):
            break
    assert policy is not None
    return policy, deviation[:, 0], cost[:, 0] * beta


def normalized_rewards(world: World, beta: float, *, scale: Scale) -> Tensor:
    """The optimum of KL and two rewards, each divided by its standard deviation.

    ``h = (u / s_u + v / s_v) / beta``, where ``u`` and ``v`` are the two parts of the reward, and
    the deviations are those under the policy itself. The means that normalization subtracts are
    constants of a prompt, so they leave the optimum unchanged.
    """
    parts, reference = world.parts, world.reference
    policy = reference
    spreads = [deviations(policy, part, scale) for part in parts]
    for _ in range(150):
        before = policy
        gains = sum(part / spread for part, spread in zip(parts, spreads, strict=True))
        policy = (reference + gains / beta).log_softmax(1)
        if torch.allclose(policy, before, rtol=0, atol=TOLERANCE):
            break
        spreads = [
            (spread + deviations(policy, part, scale)) / 2
            for part, spread in zip(parts, spreads, strict=True)
        ]
    return policy


def mixed_groups(world: World, beta: float, *, n: int) -> Tensor:
    """The fixed point if only groups with unequal rewards are trained on, and rewards are 0 or 1.

    The KL term of the loss is measured on completions of mixed groups, which are not those of the
    policy: with ``p`` the probability of reward 1, the policy's completions are weighted by
    ``a = 1 - p^(n-1)`` if their reward is 1, and ``a = 1 - (1-p)^(n-1)`` if it is 0. Advantages
    ``r - b``, with the group's own mean ``b``, have the expectation ``(r - p) (n-1)/n``; equal
    groups contribute nothing to it.

    For the second token the gradient is 0 where ``(n-1)/n (r - p) - beta a x`` is constant, ``x``
    being the log-ratio of the token. The first token pays for its own log-ratio and for k3 of the
    second, both weighted by ``a``. Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.2,
    selects so, without a KL term; the fixed point is solved here.
    """
    reference, rewards = world.reference, world.rewards
    policy = reference
    for _ in range(300):
        before = policy
        p = (policy.exp() * rewards).sum(1, keepdim=True)
        weights = torch.where(rewards > 0, 1 - p ** (n - 1), 1 - (1 - p) ** (n - 1))
        gains = (rewards - p) * (n - 1) / n / beta
        policy = (policy + _weighted_tree(reference, gains, weights)) / 2
        policy = policy.log_softmax(1)
        if torch.allclose(policy, before, rtol=0, atol=TOLERANCE):
            break
    return policy


def _weighted_tree(reference: Tensor, gains: Tensor, weights: Tensor) -> Tensor:
    """The policy whose log-ratios, times ``weights``, are ``gains`` up to a constant."""
    second = torch.zeros_like(reference)
    firsts, values, loads = [], [], []
    for token in range(len(WORDS) + 1):
        rows = token == FIRST
        start = reference[:, rows].logsumexp(1, keepdim=True)
        old = reference[:, rows] - start
        new = _weighted_softmax(old, gains[:, rows], weights[:, rows])
        second[:, rows] = new
        k3 = (old - new).expm1() - (old - new)
        firsts.append(start)
        own_gains, own_weights = gains[:, rows], weights[:, rows]
        values.append((new.exp() * (own_gains - own_weights * k3)).sum(1, keepdim=True))
        loads.append((new.exp() * own_weights).sum(1, keepdim=True))
    first = _weighted_softmax(*(torch.cat(each, 1) for each in (firsts, values, loads)))
    return second + first[:, FIRST]


def _weighted_softmax(reference: Tensor, gains: Tensor, weights: Tensor) -> Tensor:
    """``reference + (gains + c) / weights``, where ``c`` normalizes each row."""
    low = torch.full((len(reference), 1), -1000.0, dtype=torch.float64)
    c = bisect(lambda c: (reference + (gains + c) / weights).logsumexp(1, keepdim=True), low, -low)
    return (reference + (gains + c) / weights).log_softmax(1)


def token_credit(world: World, beta: float) -> Tensor:
    """The fixed point if a token pays for its own KL and not for that of later tokens.

    The last token is optimal: ``reference * exp(r / beta)``. The first one is chosen by the mean
    reward that follows it, where the optimum takes the soft maximum, reward minus KL.
    """
    reference, rewards = world.reference, world.rewards
    policy = torch.zeros_like(reference)
    scores = torch.zeros(len(reference), len(WORDS) + 1, dtype=torch.float64)
    for token in range(len(WORDS) + 1):
        rows = token == FIRST
        start = reference[:, rows].logsumexp(1, keepdim=True)
        second = (reference[:, rows] + rewards[:, rows] / beta).log_softmax(1)
        policy[:, rows] = second
        mean = (second.exp() * rewards[:, rows]).sum(1)
        scores[:, token] = start[:, 0] + mean / beta
    return policy + scores.log_softmax(1)[:, FIRST]
