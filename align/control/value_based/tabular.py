"""Q-learning and SARSA: tables of action values, learned from single steps.

A training step is a number of whole episodes, so that the state of the environment is no part of
the state that is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from align.config.control.tabular import Tabular
from align.control.networks import Policy, table_policy
from align.control.seeds import derive_seed
from align.control.spaces import EnvSpec
from align.control.trainer import Trainer, recent_mean

POINTS = 500
"""Points of the learning curve, unless an episode is longer than the steps of a point."""


class TabularTrainer(Trainer[Tabular]):
    """Learns the table of one seed. There is no critic, and states have no statistics."""

    def __init__(self, config: Tabular, spec: EnvSpec, seed: int) -> None:
        super().__init__(config, seed)
        self.spec = spec
        self.env = gymnasium.make(config.environment, **config.environment_options)
        self.values: NDArray[np.float64] = np.zeros((spec.n_features, spec.n_actions))
        self.random = np.random.default_rng(derive_seed(seed, 1))
        self.episodes = 0

    def train(self) -> dict[str, Any]:
        """Learn from whole episodes."""
        episodes_before = self.episodes
        end = min(self.config.steps, self.steps + max(1, self.config.steps // POINTS))
        while self.steps < end:
            self.recent_returns.append(self.run_episode())
            self.episodes += 1
        return {
            "episodes": self.episodes - episodes_before,
            "return": recent_mean(self.recent_returns),
        }

    def run_episode(self) -> float:
        """Learn from each step of one episode. Returns its undiscounted return.

        Source: Sutton and Barto 2018, Reinforcement Learning, sections 6.4 (SARSA) and 6.5
        (Q-learning).
        """
        config, values = self.config, self.values
        is_sarsa = config.algorithm == "sarsa"
        learning_rate = config.learning_rate
        if config.schedule == "linear":
            learning_rate *= 1 - self.steps / config.steps
        state, _ = self.env.reset(seed=derive_seed(self.seed, 2, self.episodes))
        action, total, ended = self.choose(state), 0.0, False
        while not ended:
            next_state, reward, terminated, truncated, _ = self.env.step(action)
            if is_sarsa:
                next_action = self.choose(next_state)
                next_value = values[next_state, next_action]
            else:
                next_value = values[next_state].max()
            target = float(reward) + config.gamma * next_value * (not terminated)
            values[state, action] += learning_rate * (target - values[state, action])
            if not is_sarsa:
                next_action = self.choose(next_state)
            state, action = next_state, next_action
            total += float(reward)
            self.steps += 1
            ended = terminated or truncated
        return total

    def choose(self, state: int) -> int:
        """An action of the epsilon-greedy policy; equal values are equally probable."""
        if self.random.random() < self.config.epsilon:
            return int(self.random.integers(self.spec.n_actions))
        row = self.values[state]
        best = np.flatnonzero(row == row.max())
        return int(best[0] if len(best) == 1 else self.random.choice(best))

    @property
    def policy(self) -> Policy:
        """The greedy policy: the table as a linear layer."""
        return table_policy(self.spec, torch.from_numpy(self.values))

    def state(self) -> dict[str, Any]:
        """The table, the random numbers and the curve so far."""
        return super().state() | {
            "values": torch.from_numpy(self.values.copy()),
            "random": self.random.bit_generator.state,
            "episodes": self.episodes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        super().restore(state)
        self.values[:] = state["values"].numpy()
        self.random.bit_generator.state = state["random"]
        self.episodes = state["episodes"]
