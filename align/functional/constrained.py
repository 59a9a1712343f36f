"""The Lagrangian of a constrained Markov decision process: costs must not exceed a limit.

The problem is to maximize the expected return J subject to an expected cost C of at most d. Its
Lagrangian is J - multiplier * (C - d): the policy ascends it, and the multiplier descends it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def penalized_advantages(
    advantages: Float[Tensor, "*shape"],
    cost_advantages: Float[Tensor, "*shape"],
    *,
    multiplier: float,
) -> Float[Tensor, "*shape"]:
    """Advantages under the Lagrangian, divided by ``1 + multiplier``.

    The division keeps the size of a policy step where the multiplier is large, and changes no
    optimum.

    >>> import torch
    >>> penalized_advantages(torch.tensor([4.0]), torch.tensor([2.0]), multiplier=3.0)
    tensor([-0.5000])

    Source: Ray, Achiam and Amodei 2019, Benchmarking Safe Exploration in Deep Reinforcement
    Learning, section 5.1.
    """
    return (advantages - multiplier * cost_advantages) / (1 + multiplier)


def ascended_multiplier(
    multiplier: float, *, cost: float, limit: float, learning_rate: float
) -> float:
    """The multiplier after a step of dual ascent: it rises where the cost exceeds the limit.

    It is never negative: a cost below the limit is no gain.

    >>> ascended_multiplier(0.5, cost=7.0, limit=5.0, learning_rate=0.25)  # 0.5 + 0.25 * 2
    1.0
    >>> ascended_multiplier(0.5, cost=1.0, limit=5.0, learning_rate=0.25)  # 0.5 - 0.25 * 4 < 0
    0.0

    Source: Boyd and Vandenberghe 2004, Convex Optimization, section 5.4; Ray, Achiam and Amodei
    2019, section 5.1.
    """
    return max(0.0, multiplier + learning_rate * (cost - limit))
