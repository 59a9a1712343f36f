"""Environments of PettingZoo in which all agents act at once, as one Gymnasium environment.

``align.control.multi_agent.parallel:Parallel-v0`` is its id in a recipe, with the option ``module``
such as ``mpe2.simple_spread_v3``; further options are those of the module. Observations and actions
of the agents follow each other in one vector. Left out: agents with unequal spaces, and discrete
actions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Array = NDArray[Any]
LIBRARIES = ("mpe2", "pettingzoo")
"""The packages of the extra ``multi-agent``."""


def load(module: str, options: Mapping[str, Any]) -> Any:
    """The environment that ``parallel_env`` of a module makes.

    Raises:
        gymnasium.error.DependencyNotInstalled: The extra is missing.
        ValueError: No such module, or it does not accept the options.
    """
    if not isinstance(module, str):
        raise ValueError(f"`module` must be a text, such as mpe2.simple_spread_v3, got {module!r}")
    library = module.partition(".")[0]
    if library in LIBRARIES and importlib.util.find_spec(library) is None:
        raise gymnasium.error.DependencyNotInstalled(f"{library} is not installed")
    try:
        return importlib.import_module(module).parallel_env(**options)
    except Exception as error:  # of any kind: options are checked by assertions, or not at all
        raise ValueError(f"{type(error).__name__}: {error}") from None


def common_space(agents: Mapping[str, spaces.Space[Any]], what: str) -> spaces.Box:
    """The space that all agents have.

    Raises:
        ValueError: They have different ones, or it is no vector of numbers.
    """
    (first, space), *others = agents.items()
    for name, other in others:
        if other != space:
            raise ValueError(
                f"{first} has {what} {space}, but {name} has {other}; expected equal ones"
            )
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"{first} has {what} {space}; expected a Box of one dimension")
    return space


class Parallel(gymnasium.Env[Any, Any]):
    """All agents of an environment; the reward is the mean of theirs.

    ``info["agent_rewards"]`` has the reward of each. The episode ends for all when it ends for one.
    """

    metadata = {"render_modes": ["human", "rgb_array"]}  # noqa: RUF012

    def __init__(self, module: str, render_mode: str | None = None, **options: Any) -> None:
        self.parallel = load(module, {**options, "render_mode": render_mode})
        self.render_mode = render_mode
        self.metadata = self.metadata | {"render_fps": self.parallel.metadata.get("render_fps", 10)}
        agents = self.agents = list(self.parallel.possible_agents)
        self.n_agents = len(agents)
        seen = common_space({a: self.parallel.observation_space(a) for a in agents}, "observations")
        done = common_space({a: self.parallel.action_space(a) for a in agents}, "actions")
        self.observation_space = _repeated(seen, self.n_agents)
        self.action_space = _repeated(done, self.n_agents)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode of all agents."""
        super().reset(seed=seed)
        observations, _ = self.parallel.reset(seed=seed)
        return self._joint(observations), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Step all agents with ``action``, the actions of all in one vector."""
        rows = dict(zip(self.agents, np.split(action, self.n_agents), strict=True))
        observations, rewards, terminated, truncated, _ = self.parallel.step(rows)
        agent_rewards = np.array([rewards[agent] for agent in self.agents], np.float32)
        ends = any(terminated.values())
        info = {"agent_rewards": agent_rewards}
        reward = float(agent_rewards.mean())
        return self._joint(observations), reward, ends, any(truncated.values()), info

    def render(self) -> Any:
        """The picture of the environment."""
        return self.parallel.render()

    def close(self) -> None:
        """Release the window of the environment."""
        self.parallel.close()

    def _joint(self, observations: Mapping[str, Array]) -> Array:
        return np.concatenate([observations[agent] for agent in self.agents], dtype=np.float32)


def _repeated(space: spaces.Box, n: int) -> spaces.Box:
    return spaces.Box(np.tile(space.low, n), np.tile(space.high, n), dtype=np.float32)


gymnasium.register("Parallel-v0", f"{__name__}:Parallel", max_episode_steps=1000)
