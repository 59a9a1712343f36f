"""Evaluation of a trained policy: returns and costs of greedy episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from jaxtyping import Float
from torch import Tensor

from align.control.environments import Environments
from align.control.networks import Policy
from align.control.seeds import derive_seed

EVALUATED_AT_ONCE = 100
"""Episodes that are evaluated in parallel, each in its own environment."""


class Evaluation(NamedTuple):
    """Results of greedy episodes."""

    returns: Float[Tensor, " episodes"]
    """Undiscounted, unscaled returns."""
    costs: Float[Tensor, " episodes"]
    """Undiscounted costs; NaN where the environment has none."""


@torch.no_grad()
def evaluate(
    policy: Policy,
    environment: str,
    options: Mapping[str, Any],
    *,
    statistics: RunningMeanStd | None,
    episodes: int,
    seed: int,
) -> Evaluation:
    """Play episodes of the greedy policy; the statistics are not updated.

    The first episode of each environment counts. Taking those that end first would favor short
    episodes.
    """
    returns: list[float] = []
    costs: list[float] = []
    while len(returns) < episodes:
        n_envs = min(EVALUATED_AT_ONCE, episodes - len(returns))
        environments = Environments(environment, options, n_envs, statistics=statistics)
        environments.update_statistics = False
        observations = environments.reset(derive_seed(seed, 3, len(returns)))
        first_returns, first_costs = np.full((2, n_envs), math.nan)
        while np.isnan(first_returns).any():
            outputs = policy.body(torch.from_numpy(np.asarray(observations, np.float32)))
            step = environments.step(policy.head.env_actions(policy.head.act(outputs, 0.0)))
            is_first = np.isnan(first_returns) & step.ended
            counted = is_first[step.ended]
            first_returns[is_first] = step.returns[counted]
            first_costs[is_first] = step.episode_costs[counted]
            observations = step.observations
        environments.close()
        returns += first_returns.tolist()
        costs += first_costs.tolist()
    return Evaluation(*torch.tensor([returns, costs], dtype=torch.float64))
