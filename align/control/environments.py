"""Gymnasium environments in step with each other: no phantom steps, ends told apart, observations normalised.

Every environment resets itself in the step that ends its episode (``AutoresetMode.SAME_STEP``), so each step is a step of
the world, and what the ended episode led to comes beside it. Left out: dictionary and image observations, several
discrete actions at once, and worker processes: a step of these worlds is shorter than the way to another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import NormalizeReward
from numpy.typing import NDArray

from align.control.spaces import silence_mujoco

Array = NDArray[Any]
CLIP = 10.0  # normalised observations and rewards beyond it say nothing more, and upset a network


class Step(NamedTuple):
    """One step of all environments."""

    observations: Array
    """``[envs, features]``: what each goes on from; after an end, the first of the next episode."""
    rewards: Array
    """``[envs]``, scaled where that was asked for."""
    terminated: Array
    """``[envs]``: the episode came to its end, nothing follows."""
    ended: Array
    """``[envs]``: terminated, or cut by the time limit."""
    finals: Array
    """``[ended, features]``: what the ended episodes led to, normalised like the others."""
    returns: Array
    """``[ended]``: their undiscounted, unscaled returns."""


class CartPole(CartPoleVectorEnv):
    """All carts in one array, each reset in the step that ends its episode.

    Gymnasium 1.4's own class knows ``NEXT_STEP`` only: after each end it takes a step that ignores the action and is
    worth 0. So its step is followed by the reset that it would do one step later.
    """

    metadata = CartPoleVectorEnv.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}

    def step(self, action: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Step all carts."""
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


def make(environment: str, options: Mapping[str, Any], envs: int) -> VectorEnv[Any, Any, Any]:
    """``envs`` environments that reset themselves in the same step."""
    silence_mujoco(environment)
    spec = gymnasium.spec(environment)
    if spec.vector_entry_point == "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv":
        limit = options.get("max_episode_steps", spec.max_episode_steps)
        others = {key: value for key, value in options.items() if key != "max_episode_steps"}
        return CartPole(envs, max_episode_steps=limit, **others)
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(environment, envs, "sync", same_step, **options)


class _Raw(VectorWrapper[Any, Any, Any, Any, Any]):
    """Remembers the rewards as the world gave them, below the wrapper that scales them."""

    rewards: Array

    def step(self, actions: Array) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, and keep the rewards."""
        result = super().step(actions)
        self.rewards = result[1]
        return result


class Environments:
    """Vectorised environments with running statistics, whose state can be written down.

    Gymnasium 1.4's ``NormalizeObservation`` refuses environments that reset in the same step, and knows nothing of
    final observations; its ``RunningMeanStd`` does the counting here. Rewards are scaled by its ``NormalizeReward``.

    A world's state can often not be copied: pickling a MuJoCo world keeps its construction only, and Box2D's refuses.
    So :meth:`state` is the seed of the last :meth:`fresh` start and the actions since, and :meth:`restore` takes them
    again: exact wherever seeds and actions decide what happens.
    """

    def __init__(
        self,
        environment: str,
        options: Mapping[str, Any],
        envs: int,
        *,
        statistics: RunningMeanStd | None = None,
        reward_gamma: float | None = None,
    ) -> None:
        """With ``statistics`` observations are normalised; with ``reward_gamma`` rewards are scaled."""
        self._raw = _Raw(make(environment, options, envs))
        self._scaled = None if reward_gamma is None else NormalizeReward(self._raw, reward_gamma)
        self._env: VectorEnv[Any, Any, Any] = self._raw if self._scaled is None else self._scaled
        self.statistics = statistics
        self.learning = True
        """Whether the statistics take in what is seen."""
        self.count = envs
        self._returns = np.zeros(envs)
        self._seed = 0
        self._actions: list[Array] = []

    def fresh(self, seed: int) -> Array:
        """Begin new episodes everywhere. Returns the first observations ``[envs, features]``."""
        self._seed, self._actions = seed, []
        self._returns[:] = 0
        observations, _ = self._env.reset(seed=seed)
        return self._normalized(_flat(observations))

    def step(self, actions: Array) -> Step:
        """Step all environments by ``actions`` ``[envs, ...]``, as the action space has them."""
        self._actions.append(actions)
        seen, rewards, terminated, truncated, info = self._env.step(actions)
        self._returns += self._raw.rewards
        observations = _flat(seen)
        ended = terminated | truncated
        finals, returns = observations[:0], self._returns[:0]
        if ended.any():
            led_to = info["final_obs"][ended]
            finals = _flat(led_to if led_to.dtype != object else np.stack(list(led_to)))
            returns = self._returns[ended]
            self._returns[ended] = 0
        if self._scaled is not None:
            rewards = rewards.clip(-CLIP, CLIP)
        normalized = self._normalized(observations)
        finals = scaled(finals, self.statistics)  # with the same statistics as what comes after it
        return Step(normalized, rewards, terminated, ended, finals, returns)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, as numbers and arrays."""
        kept = {
            "observations": self.statistics,
            "rewards": self._scaled and self._scaled.return_rms,
        }
        return {
            "seed": self._seed,
            "actions": np.stack(self._actions) if self._actions else np.zeros(0),
            "statistics": {k: vars(v).copy() for k, v in kept.items() if v is not None},
        }

    def restore(self, state: Mapping[str, Any]) -> Array:
        """Come to the same point again. Returns the observations there ``[envs, features]``."""
        observations = self.fresh(state["seed"])
        for actions in state["actions"]:
            observations = self.step(actions).observations
        for name, kept in state["statistics"].items():
            scaled = self._scaled and self._scaled.return_rms
            vars(self.statistics if name == "observations" else scaled).update(kept)
        return observations

    def close(self) -> None:
        """Give back what the environments hold."""
        self._env.close()

    def _normalized(self, observations: Array) -> Array:
        if self.statistics is not None and self.learning:
            self.statistics.update(observations)
        return scaled(observations, self.statistics)


def scaled(observations: Array, statistics: RunningMeanStd | None) -> Array:
    """Observations ``[..., features]`` less their running mean, by their running deviation."""
    if statistics is None:
        return observations
    deviation = np.sqrt(statistics.var + 1e-8)
    return ((observations - statistics.mean) / deviation).clip(-CLIP, CLIP)


def _flat(observations: Array) -> Array:
    return observations.reshape(len(observations), -1)
