"""Value iteration and policy iteration on the transitions of an environment.

Nothing is sampled, so the seed of a trainer only decides on the state whose value its curve shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import torch
from torch import Tensor

from align.config.control.dynamic_programming import DynamicProgramming
from align.control.networks import Policy, table_policy
from align.control.spaces import EnvSpec
from align.control.trainer import Trainer
from align.errors import UserError
from align.functional.dynamic_programming import action_values, improved_policy, policy_values


class Model(NamedTuple):
    """Transitions and expected rewards, as :mod:`align.functional.dynamic_programming` has them."""

    transitions: Tensor
    rewards: Tensor


def read_model(env: gymnasium.Env[Any, Any], spec: EnvSpec) -> Model:
    """The table ``P`` of an environment: for each state and action, what may happen."""
    transitions = torch.zeros(spec.n_features, spec.n_actions, spec.n_features).double()
    rewards = torch.zeros(spec.n_features, spec.n_actions).double()
    table: Any = env.unwrapped
    for state, actions in table.P.items():
        for action, outcomes in actions.items():
            for probability, next_state, reward, terminated in outcomes:
                rewards[state, action] += probability * reward
                if not terminated:
                    transitions[state, action, next_state] += probability
    return Model(transitions, rewards)


class DynamicProgrammingTrainer(Trainer[DynamicProgramming]):
    """Computes the optimal values. Policy iteration starts from the uniform policy."""

    def __init__(self, config: DynamicProgramming, spec: EnvSpec, seed: int) -> None:
        super().__init__(config, seed)
        self.spec = spec
        self.env = gymnasium.make(config.environment, **config.environment_options)
        self.model = read_model(self.env, spec)
        self.first_state, _ = self.env.reset(seed=seed)
        self.values = torch.zeros(spec.n_features).double()
        self.table = torch.full_like(self.model.rewards, 1 / spec.n_actions)
        self.change = float("inf")

    @property
    def done(self) -> bool:
        """Whether no value changes any more, or all iterations are done."""
        return super().done or self.change <= self.config.tolerance

    def train(self) -> dict[str, Any]:
        """Update the values of all states once."""
        before = self.values
        if self.config.algorithm == "value_iteration":
            self.values = self._action_values().amax(-1)
        else:
            self.values = self._evaluated()
            self.table = improved_policy(self._action_values(), self.table)
        self.change = float((self.values - before).abs().max())
        self.steps += 1
        value = float(self.values[self.first_state])
        return {"episodes": 0, "return": None, "value": value, "change": self.change}

    def _action_values(self) -> Tensor:
        return action_values(*self.model, self.values, gamma=self.config.gamma)

    def _evaluated(self) -> Tensor:
        try:
            return policy_values(*self.model, self.table, gamma=self.config.gamma)
        except ValueError as error:
            raise UserError(
                f"seed {self.seed}: {error}, so with `gamma: 1` its value has no limit; lower "
                "`gamma`, or set `algorithm: value_iteration`"
            ) from None

    @property
    def policy(self) -> Policy:
        """The greedy policy. Differences from the best action keep the order in float32."""
        if self.config.algorithm == "policy_iteration":
            return table_policy(self.spec, self.table)
        values = self._action_values()
        return table_policy(self.spec, values - values.amax(-1, keepdim=True))

    def state(self) -> dict[str, Any]:
        """Values, policy and the curve so far."""
        own = {"values": self.values.clone(), "table": self.table.clone(), "change": self.change}
        return super().state() | own

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        super().restore(state)
        self.values, self.table = state["values"], state["table"]
        self.change = state["change"]
