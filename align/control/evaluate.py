"""Evaluation of a trained policy: returns of greedy episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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


@torch.no_grad()
def evaluate(
    policy: Policy,
    environment: str,
    options: Mapping[str, Any],
    *,
    statistics: RunningMeanStd | None,
    episodes: int,
    seed: int,
) -> Float[Tensor, " episodes"]:
    """Undiscounted, unscaled returns of the greedy policy; the statistics are not updated.

    The first episode of each environment counts. Taking those that end first would favor short
    episodes.
    """
    returns: list[float] = []
    while len(returns) < episodes:
        n_envs = min(EVALUATED_AT_ONCE, episodes - len(returns))
        environments = Environments(environment, options, n_envs, statistics=statistics)
        environments.update_statistics = False
        observations = environments.reset(derive_seed(seed, 3, len(returns)))
        first_returns = np.full(n_envs, math.nan)
        while np.isnan(first_returns).any():
            outputs = policy.body(torch.from_numpy(np.asarray(observations, np.float32)))
            step = environments.step(policy.head.env_actions(policy.head.act(outputs, 0.0)))
            is_first = np.isnan(first_returns) & step.ended
            first_returns[is_first] = step.returns[np.isnan(first_returns)[step.ended]]
            observations = step.observations
        environments.close()
        returns += first_returns.tolist()
    return torch.tensor(returns, dtype=torch.float64)
