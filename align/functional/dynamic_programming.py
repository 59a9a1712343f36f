"""Values of Markov decision processes whose transitions are known, in float64.

``transitions[s, a, t]`` is the probability that action a in state s leads to state t and the
episode continues; what is missing to 1 is the probability that the episode ends there.
``rewards[s, a]`` is the expected reward. A policy is a table of probabilities ``[s, a]``.

Policy iteration alternates :func:`policy_values` and :func:`improved_policy`; value iteration
repeats ``action_values(...).amax(-1)``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ENDS = 1e-12
"""Smallest probability of the end of an episode that is no rounding error."""
IMPROVES = 1e-10
"""Smallest difference of action values for which a policy changes its action."""


def action_values(
    transitions: Float[Tensor, "states actions states"],
    rewards: Float[Tensor, "states actions"],
    values: Float[Tensor, " states"],
    *,
    gamma: float,
) -> Float[Tensor, "states actions"]:
    """Expected reward of each action plus the discounted value of the next state.

    The maximum over actions is one sweep of value iteration, and a contraction by ``gamma``.

    >>> stay_or_end = torch.tensor([[[1.0], [0.0]]]).double()
    >>> action_values(stay_or_end, torch.tensor([[1.0, 3.0]]).double(),
    ...     torch.tensor([8.0]).double(), gamma=0.5)  # 1 + 8 / 2, and 3
    tensor([[5., 3.]], dtype=torch.float64)

    Source: Sutton and Barto 2018, Reinforcement Learning, eq. 4.10.
    """
    return rewards + gamma * transitions @ values


def policy_values(
    transitions: Float[Tensor, "states actions states"],
    rewards: Float[Tensor, "states actions"],
    policy: Float[Tensor, "states actions"],
    *,
    gamma: float,
) -> Float[Tensor, " states"]:
    """Values of a policy: the solution of the linear Bellman equations.

    Raises:
        ValueError: ``gamma`` is 1 and some state never reaches the end of the episode, so that its
            value has no limit.

    Source: Sutton and Barto 2018, Reinforcement Learning, eq. 4.4.
    """
    chain, expected = _under(transitions, rewards, policy)
    if gamma == 1 and (endless := _endless_states(chain)):
        raise ValueError(f"the policy never ends an episode from state {endless[0]}")
    identity = torch.eye(len(chain), dtype=chain.dtype)
    return torch.linalg.solve(identity - gamma * chain, expected)


def iterated_policy_values(
    transitions: Float[Tensor, "states actions states"],
    rewards: Float[Tensor, "states actions"],
    policy: Float[Tensor, "states actions"],
    *,
    gamma: float,
    tolerance: float,
    max_sweeps: int = 1_000_000,
) -> Float[Tensor, " states"]:
    """Values of a policy by iteration from 0, until no value changes by more than ``tolerance``.

    The limit is that of :func:`policy_values`.

    Raises:
        ValueError: ``max_sweeps`` do not suffice.

    Source: Sutton and Barto 2018, Reinforcement Learning, eq. 4.5.
    """
    chain, expected = _under(transitions, rewards, policy)
    values = torch.zeros_like(expected)
    for _ in range(max_sweeps):
        before, values = values, expected + gamma * chain @ values
        if float((values - before).abs().max()) <= tolerance:
            return values
    raise ValueError(f"the values still change by more than {tolerance} after {max_sweeps} sweeps")


def improved_policy(
    values: Float[Tensor, "states actions"], policy: Float[Tensor, "states actions"]
) -> Float[Tensor, "states actions"]:
    """The greedy policy for action values; a state changes its action only for a better one.

    Without this rule, policy iteration may alternate between equally good policies.
    """
    actions = policy.argmax(-1, keepdim=True)
    is_better = values.amax(-1, keepdim=True) > values.gather(-1, actions) + IMPROVES
    chosen = torch.where(is_better, values.argmax(-1, keepdim=True), actions)
    return torch.zeros_like(policy).scatter(-1, chosen, 1.0)


def _under(transitions: Tensor, rewards: Tensor, policy: Tensor) -> tuple[Tensor, Tensor]:
    """Transitions between states and expected rewards under a policy."""
    return torch.einsum("sa,sat->st", policy, transitions), (policy * rewards).sum(-1)


def _endless_states(chain: Tensor) -> list[int]:
    """The states from which no path leads to the end of the episode."""
    ends = chain.sum(-1) < 1 - ENDS
    for _ in range(len(chain)):
        ends = ends | ((chain > 0) & ends).any(-1)
    return [int(state) for state in (~ends).nonzero()]
