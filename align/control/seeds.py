"""Seeds derived from the seed of a run, one for each purpose, and episodes that have their own."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


def derive_seed(*numbers: int) -> int:
    """A seed for one purpose, different from those of other purposes and of other seeds."""
    # Vector environments use consecutive seeds from the one that they receive.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] // 2)


class SeededEpisodes(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gives each episode a seed, and keeps its actions, so that its state can be restored."""

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        super().__init__(env)
        self.seed, self.episodes = seed, 0
        self.actions: list[Any] = []
        self._repeated: list[Any] = []

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        """Start the next episode; after :meth:`resume`, continue the interrupted one."""
        result: tuple[Any, dict[str, Any]]
        result = self.env.reset(seed=derive_seed(self.seed, 2, self.episodes))
        self.episodes += 1
        self.actions, repeated, self._repeated = [], self._repeated, []
        for action in repeated:
            observation, *_rest, info = self.step(action)
            result = observation, info
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and keep the action."""
        self.actions.append(np.array(action))
        return self.env.step(action)

    def resume(self, episodes: int, actions: list[Any]) -> None:
        """Make the next reset the start of an episode of which ``actions`` are taken already."""
        self.episodes, self._repeated = episodes - 1, actions
