"""Vector environments with normalized observations, whose state can be saved.

Environments reset in the step that ends an episode (``AutoresetMode.SAME_STEP``), so that no step
is a phantom step with reward 0; the final observation is returned beside the first one of the next
episode.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import NormalizeReward
from numpy.typing import NDArray

from align.control.spaces import silence_mujoco
from align.control.vector.batched import BATCHED
from align.control.vector.workers import Workers, flattened

Array = NDArray[Any]
CARTPOLE_OPTIONS = {"max_episode_steps", "sutton_barto_reward"}
"""Options that :class:`CartPole` accepts; with others, its environments are stepped one by one."""
CLIP = 10.0
"""Bound of the absolute values of normalized observations and rewards."""


class Step(NamedTuple):
    """One step of all environments."""

    observations: Array
    """``[envs, features]``: the next observations; after an episode, the first of the next one."""
    rewards: Array
    """``[envs]``: rewards, scaled if the environments were built with ``reward_gamma``."""
    terminated: Array
    """``[envs]``: the episode reached a terminal state."""
    ended: Array
    """``[envs]``: the episode terminated or was truncated by the time limit."""
    final_observations: Array
    """``[ended, features]``: last observations of the ended episodes, normalized as well."""
    returns: Array
    """``[ended]``: undiscounted, unscaled returns of the ended episodes."""
    costs: Array
    """``[envs]``: ``info["cost"]`` of the step; NaN where there is none."""
    episode_costs: Array
    """``[ended]``: sums of the costs of the ended episodes."""


class CartPole(CartPoleVectorEnv):
    """CartPole environments in one array, reset in the step that ends an episode.

    The class of Gymnasium 1.4 supports ``NEXT_STEP`` only: after each episode it takes a step that
    ignores the action and has reward 0. Here each step is followed by the reset that it would do
    one step later.
    """

    metadata = CartPoleVectorEnv.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}

    def step(self, action: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Step all environments."""
        observations, rewards, terminated, truncated, info = super().step(action)
        ended = self.prev_done
        if ended.any():
            assert self.state is not None
            info = {"final_obs": observations, "_final_obs": ended}
            self.state[:, ended] = self.np_random.uniform(
                self.low, self.high, size=(4, int(ended.sum()))
            )
            self.steps[ended] = 0
            self.prev_done = np.zeros_like(ended)
            observations = self.state.T.astype(np.float32)
        return observations, rewards, terminated, truncated, info


def make_vector_env(
    environment: str, options: Mapping[str, Any], n_envs: int, vectorization: str = "gymnasium"
) -> VectorEnv[Any, Any, Any]:
    """``n_envs`` environments that reset in the step that ends an episode."""
    if vectorization == "batched":
        return BATCHED[environment](n_envs, **options)
    silence_mujoco(environment)
    module, _, name = environment.rpartition(":")
    if module:
        importlib.import_module(module)
    spec = gymnasium.spec(name)
    if vectorization == "async":
        return Workers(spec, options, n_envs)
    in_one_array = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
    if spec.vector_entry_point == in_one_array and options.keys() <= CARTPOLE_OPTIONS:
        return CartPole(n_envs, **{"max_episode_steps": spec.max_episode_steps, **options})
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(environment, n_envs, "sync", same_step, [flattened], **options)


class _UnscaledRewards(VectorWrapper[Any, Any, Any, Any, Any]):
    """Keeps the rewards of the last step, before another wrapper scales them."""

    rewards: Array

    def step(self, actions: Array) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, and keep the rewards."""
        result = super().step(actions)
        self.rewards = result[1]
        return result


class Environments:
    """Vector environments with running statistics, whose state can be saved and restored.

    ``NormalizeObservation`` of Gymnasium 1.4 supports neither same-step resets nor final
    observations, so observations are normalized here with its ``RunningMeanStd``. Rewards are
    scaled by its ``NormalizeReward``.

    The state of many environments cannot be copied: a pickled MuJoCo environment loses it, and
    Box2D environments cannot be pickled. :meth:`state` therefore contains the seed of the last
    :meth:`reset` and the actions since, and :meth:`restore` repeats them. This is exact for
    environments that are deterministic given seed and actions.
    """

    def __init__(
        self,
        environment: str,
        options: Mapping[str, Any],
        n_envs: int,
        *,
        statistics: RunningMeanStd | None = None,
        reward_gamma: float | None = None,
        vectorization: str = "gymnasium",
    ) -> None:
        """Normalize observations with ``statistics``, and scale rewards with ``reward_gamma``.

        Without them, observations and rewards are returned as they are.
        """
        self._unscaled = _UnscaledRewards(
            make_vector_env(environment, options, n_envs, vectorization)
        )
        self._scaled = (
            None if reward_gamma is None else NormalizeReward(self._unscaled, reward_gamma)
        )
        self._env: VectorEnv[Any, Any, Any] = (
            self._unscaled if self._scaled is None else self._scaled
        )
        self.statistics = statistics
        self.update_statistics = True
        """Whether new observations update the statistics."""
        self.n_envs = n_envs
        self._returns, self._costs = np.zeros(n_envs), np.zeros(n_envs)
        self._no_costs = np.full(n_envs, np.nan)
        self._seed = 0
        self._actions: list[Array] = []

    def reset(self, seed: int) -> Array:
        """Start new episodes in all environments. Returns observations ``[envs, features]``."""
        self._seed, self._actions = seed, []
        self._returns[:] = self._costs[:] = 0
        observations, _ = self._env.reset(seed=seed)
        return self._normalized(self._features(observations))

    def step(self, actions: Array) -> Step:
        """Step all environments with ``actions`` ``[envs, ...]`` of the action space."""
        self._actions.append(actions)
        raw, rewards, terminated, truncated, info = self._env.step(actions)
        self._returns += self._unscaled.rewards
        observations = self._features(raw)
        ended = terminated | truncated
        costs = self._step_costs(info, ended)
        self._costs += costs
        finals, returns, episode_costs = observations[:0], self._returns[:0], self._costs[:0]
        if ended.any():
            last = info["final_obs"][ended]
            finals = self._features(last if last.dtype != object else np.stack(list(last)))
            returns, episode_costs = self._returns[ended], self._costs[ended]
            self._returns[ended] = self._costs[ended] = 0
        if self._scaled is not None:
            rewards = rewards.clip(-CLIP, CLIP)
        normalized = self._normalized(observations)
        finals = normalize(finals, self.statistics)  # by the statistics that the next step uses
        return Step(normalized, rewards, terminated, ended, finals, returns, costs, episode_costs)

    def _step_costs(self, info: dict[str, Any], ended: Array) -> Array:
        """Costs of a step. Of an environment that ended an episode, ``info`` is of the reset."""
        final = info.get("final_info", {})
        if "cost" not in info and "cost" not in final:
            return self._no_costs
        costs = self._no_costs.copy()
        for part, of_step in ((info, ~ended), (final, ended)):
            if "cost" in part:
                has_cost = part["_cost"] & of_step
                costs[has_cost] = part["cost"][has_cost]
        return costs

    def state(self) -> dict[str, Any]:
        """Seed, actions and statistics as tensors and numbers, for :meth:`restore`."""
        statistics = {
            "observations": self.statistics,
            "rewards": self._scaled and self._scaled.return_rms,
        }
        return {
            "seed": self._seed,
            "actions": torch.from_numpy(np.stack(self._actions) if self._actions else np.zeros(0)),
            "statistics": {
                name: {
                    key: torch.from_numpy(np.array(value)) for key, value in vars(values).items()
                }
                for name, values in statistics.items()
                if values is not None
            },
        }

    def restore(self, state: Mapping[str, Any]) -> Array:
        """Repeat the actions of a saved state. Returns observations ``[envs, features]``."""
        observations = self.reset(state["seed"])
        for actions in state["actions"].numpy():
            observations = self.step(actions).observations
        for name, values in state["statistics"].items():
            returns = self._scaled and self._scaled.return_rms
            arrays = {key: value.numpy()[()] for key, value in values.items()}
            vars(self.statistics if name == "observations" else returns).update(arrays)
        return observations

    def close(self) -> None:
        """Release the resources of the environments."""
        self._env.close()

    def _features(self, observations: Array) -> Array:
        return features(observations, self._env.single_observation_space)

    def _normalized(self, observations: Array) -> Array:
        if self.statistics is not None and self.update_statistics:
            self.statistics.update(observations)
        return normalize(observations, self.statistics)


def normalize(observations: Array, statistics: RunningMeanStd | None) -> Array:
    """Observations ``[..., features]`` minus their running mean, divided by their deviation."""
    if statistics is None:
        return observations
    deviation = np.sqrt(statistics.var + 1e-8)
    return ((observations - statistics.mean) / deviation).clip(-CLIP, CLIP)


def features(observations: Array, space: gymnasium.Space[Any]) -> Array:
    """Observations as vectors ``[envs, features]``: of a numbered state, a single 1 at its number.

    >>> features(np.array([2, 0]), gymnasium.spaces.Discrete(3)).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if isinstance(space, gymnasium.spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[observations.astype(np.int64)]
    return observations.reshape(len(observations), -1)
