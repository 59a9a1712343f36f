"""Two agents with a known optimum, as an environment of PettingZoo."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces


class Pair:
    """Each agent sees a sign and should act half of it. One step is an episode.

    Both get ``stakes`` times the product of the signs, which no action changes, less the squared
    errors of both actions. Who sees one sign only takes the product for noise.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    possible_agents = ("left", "right")

    def __init__(
        self, stakes: float, sizes: tuple[int, int], actions: str, render_mode: str | None
    ) -> None:
        self.stakes, self.sizes, self.actions = stakes, sizes, actions

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        size = self.sizes[self.possible_agents.index(agent)]
        return spaces.Box(-1.0, 1.0, (size,), np.float32)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Discrete(2) if self.actions == "discrete" else spaces.Box(-2.0, 1.0, (1,))

    def reset(self, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.signs = self.random.choice([-1.0, 1.0], 2)
        return self._observations(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        errors = [float(actions[a][0]) - s / 2 for a, s in zip(actions, self.signs, strict=True)]
        reward = self.stakes * float(self.signs.prod()) - sum(e**2 for e in errors)
        rewards, yes, no = (dict.fromkeys(self.possible_agents, v) for v in (reward, True, False))
        return self._observations(), rewards, yes, no, {}

    def render(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)

    def close(self) -> None: ...

    def _observations(self) -> dict[str, Any]:
        signs = zip(self.possible_agents, self.signs, strict=True)
        return {agent: np.array([sign], np.float32) for agent, sign in signs}


def parallel_env(
    stakes: float = 3.0,
    sizes: tuple[int, int] = (1, 1),
    actions: str = "continuous",
    render_mode: str | None = None,
) -> Pair:
    assert stakes >= 0, "stakes must not be negative"
    return Pair(stakes, sizes, actions, render_mode)
