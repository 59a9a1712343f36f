"""Value and policy iteration on the environments of Gymnasium whose transitions are known."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from align.config.base import GymEnvironment
from align.config.control.dynamic_programming import DynamicProgramming
from align.control import spaces
from align.control.evaluate import evaluate
from align.control.value_based.dynamic_programming import DynamicProgrammingTrainer
from align.errors import UserError

ENVIRONMENTS = {"CliffWalking-v1": 1.0, "FrozenLake-v1": 0.99, "Taxi-v4": 0.9}
"""Environments and discounts."""


def trainer(environment: str, algorithm: str, **changes: Any) -> DynamicProgrammingTrainer:
    settings = {"environment": environment, "algorithm": algorithm} | changes
    settings.setdefault("gamma", ENVIRONMENTS.get(environment, 0.9))
    settings.setdefault("environment_options", {"max_episode_steps": 200})
    config = DynamicProgramming(**settings)
    return DynamicProgrammingTrainer(config, spaces.inspect_env(*config.gym_environments), 0)


def trained(environment: str, algorithm: str, **changes: Any) -> DynamicProgrammingTrainer:
    result = trainer(environment, algorithm, **changes)
    while not result.done:
        result.train_step()
    return result


def values_of(environment: str, actions: np.ndarray, gamma: float) -> np.ndarray:
    """The values of a deterministic policy, from the table of the environment, with numpy."""
    table: Any = gymnasium.make(environment).unwrapped
    n = len(table.P)
    system, rewards = np.eye(n), np.zeros(n)
    for state in range(n):
        for probability, next_state, reward, terminated in table.P[state][int(actions[state])]:
            rewards[state] += probability * reward
            system[state, next_state] -= gamma * probability * (not terminated)
    return np.linalg.solve(system, rewards)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_both_algorithms_end_with_the_values_of_their_greedy_policy(environment: str) -> None:
    gamma = ENVIRONMENTS[environment]
    results = [
        trained(environment, name, tolerance=1e-13)
        for name in ("value_iteration", "policy_iteration")
    ]
    for result in results:
        states = torch.eye(result.spec.n_features)
        actions = result.policy.body(states).argmax(-1).numpy()
        np.testing.assert_allclose(
            result.values.numpy(), values_of(environment, actions, gamma), atol=1e-10, rtol=0
        )
    np.testing.assert_allclose(results[0].values, results[1].values, atol=1e-10, rtol=0)


def test_the_shortest_path_along_the_cliff_has_13_steps() -> None:
    result = trained("CliffWalking-v1", "value_iteration")
    assert result.curve[-1]["value"] == -13.0
    place = "CliffWalking-v1", {"max_episode_steps": 200}
    returns, _ = evaluate(result.policy, *place, statistics=None, episodes=2, seed=0)
    assert returns.tolist() == [-13.0] * 2


def test_a_restored_trainer_ends_with_the_same_values() -> None:
    for algorithm in ("value_iteration", "policy_iteration"):
        whole = trained("FrozenLake-v1", algorithm)
        first, second = (trainer("FrozenLake-v1", algorithm) for _ in range(2))
        for _ in range(2):
            first.train_step()
        second.restore(first.state())
        while not second.done:
            second.train_step()
        assert torch.equal(second.values, whole.values)
        assert torch.equal(second.policy.body[0].weight, whole.policy.body[0].weight)
        assert [p["value"] for p in second.curve] == [p["value"] for p in whole.curve]


def test_iterations_are_limited() -> None:
    assert trained("FrozenLake-v1", "value_iteration", steps=3).steps == 3


def test_an_environment_without_its_transitions_is_refused() -> None:
    needs = (
        DynamicProgramming(environment="x", algorithm="value_iteration").gym_environments[0].needs
    )
    gymnasium.register("Hidden-v0", lambda: Hidden(), max_episode_steps=9)
    try:
        with pytest.raises(spaces.UnfitError, match=r"no attribute `P`, but .* a table of transi"):
            spaces.inspect_env(GymEnvironment("Hidden-v0", {}, needs=needs))
    finally:
        del gymnasium.registry["Hidden-v0"]


class Hidden(gymnasium.Env[Any, Any]):
    """Numbered states and actions, and no table."""

    observation_space = action_space = gymnasium.spaces.Discrete(2)


class Endless(Hidden):
    """Each action leads to the other state, forever."""

    P = {s: {a: [(1.0, 1 - s, 0.0, False)] for a in range(2)} for s in range(2)}  # noqa: RUF012

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        return 0, {}


def test_policy_iteration_without_a_discount_names_the_state_that_never_ends() -> None:
    gymnasium.register("Endless-v0", lambda: Endless(), max_episode_steps=9)
    try:
        with pytest.raises(
            UserError, match=r"never ends an episode from state 0, so .* lower `gam"
        ):
            trained("Endless-v0", "policy_iteration", gamma=1.0)
    finally:
        del gymnasium.registry["Endless-v0"]
