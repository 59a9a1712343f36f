"""Collected steps of vector environments, and the values of their states by a critic."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Shaped
from torch import Tensor, cat, nn

from align.config.control.policy_gradient import PolicyGradient
from align.functional.returns import gae


class Experience(NamedTuple):
    """Collected steps of all environments, time first."""

    observations: Float[Tensor, "time+1 envs features"]
    actions: Shaped[Tensor, "time envs ..."]
    rewards: Float[Tensor, "time envs"]
    terminated: Bool[Tensor, "time envs"]
    ended: Bool[Tensor, "time envs"]
    """Terminated or truncated by the time limit."""
    final_observations: Float[Tensor, "ends features"]
    """Last observations of the ended episodes, by time, then by environment."""
    returns: list[float]
    """Returns of the ended episodes."""
    valid: Bool[Tensor, "time envs"]
    """Steps to learn from. Of whole episodes, the first of each environment: afterwards it only
    waits for the others."""
    costs: Float[Tensor, "time envs"]
    """Costs of the steps; NaN where the environment has none."""
    episode_costs: list[float]
    """Sums of the costs of the ended episodes."""


class StateValues(NamedTuple):
    """Values of the states before and after each step."""

    values: Float[Tensor, "time envs"]
    next_values: Float[Tensor, "time envs"]


def state_values(critic: nn.Module, experience: Experience) -> StateValues:
    """Values of the states before and after each step, in one forward pass of a critic."""
    time_steps, n_envs = experience.rewards.shape
    states = [experience.observations.flatten(0, 1), experience.final_observations]
    values = critic(cat(states)).squeeze(-1)
    next_values = values[n_envs : (time_steps + 1) * n_envs].view(time_steps, n_envs).clone()
    next_values[experience.ended] = values[(time_steps + 1) * n_envs :]
    return StateValues(values[: time_steps * n_envs].view(time_steps, n_envs), next_values)


def estimate_advantages(
    rewards: Float[Tensor, "time envs"],
    states: StateValues,
    experience: Experience,
    config: PolicyGradient,
) -> Float[Tensor, "time envs"]:
    """Generalized advantages of rewards, or of costs, by the values of their critic."""
    return gae(
        rewards.T,
        states.values.T,
        states.next_values.T,
        experience.terminated.T,
        experience.ended.T,
        gamma=config.gamma,
        lam=config.advantage_lambda,
    ).T
