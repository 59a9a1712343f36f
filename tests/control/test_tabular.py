"""Q-learning and SARSA against updates by hand, and on the cliff of Sutton and Barto."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align.config.control.tabular import Tabular
from align.control import policy_files, spaces
from align.control.evaluate import evaluate
from align.control.value_based.tabular import TabularTrainer


def trainer(seed: int = 0, **changes: Any) -> TabularTrainer:
    settings: dict[str, Any] = {
        "environment": "CliffWalking-v1",
        "environment_options": {"max_episode_steps": 200},
        "algorithm": "q_learning",
        "steps": 12_000,
        "gamma": 1.0,
    }
    config = Tabular(**settings | changes)
    return TabularTrainer(config, spaces.inspect_env(*config.gym_environments), seed)


def trained(seed: int = 0, **changes: Any) -> TabularTrainer:
    tabular = trainer(seed, **changes)
    while not tabular.done:
        tabular.train_step()
    return tabular


def greedy_return(tabular: TabularTrainer) -> list[float]:
    config = tabular.config
    place = config.environment, config.environment_options
    returns: list[float] = evaluate(
        tabular.policy, *place, statistics=None, episodes=1, seed=tabular.seed
    ).returns.tolist()
    return returns


class TwoSteps:
    """State 0, then state 1, then the end, with the rewards 2 and 3."""

    def __init__(self, *, truncated: bool = False) -> None:
        self.truncated = truncated

    def reset(self, seed: int) -> tuple[int, dict[str, Any]]:
        self.n_steps = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        ended = self.n_steps == 2
        state, reward = (2, 3.0) if ended else (1, 2.0)
        return state, reward, ended and not self.truncated, ended and self.truncated, {}


# Values before: 1 in state 1 for action 0, 5 for action 1; 10 in state 2 for both. Actions are
# those of `actions`. alpha = gamma = 1/2.
# Q-learning: Q(0, 1) = 0 + 1/2 (2 + 1/2 * max(1, 5) - 0) = 2.25; Q(1, 0) = 1 + 1/2 (3 - 1) = 2.
# SARSA, whose second action is 0: Q(0, 1) = 1/2 (2 + 1/2 * 1) = 1.25.
# Truncated: the last state counts, Q(1, 0) = 1 + 1/2 (3 + 1/2 * 10 - 1) = 4.5.
@pytest.mark.parametrize(
    ("algorithm", "truncated", "first", "second"),
    [
        ("q_learning", False, 2.25, 2.0),
        ("sarsa", False, 1.25, 2.0),
        ("q_learning", True, 2.25, 4.5),
        ("sarsa", True, 1.25, 4.5),
    ],
)
def test_updates_by_hand(
    algorithm: str, truncated: bool, first: float, second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tabular = trainer(algorithm=algorithm, gamma=0.5, learning_rate=0.5)
    monkeypatch.setattr(tabular, "env", TwoSteps(truncated=truncated))
    actions = iter([1, 0, 0])
    monkeypatch.setattr(tabular, "choose", lambda state: next(actions))
    tabular.values[1, :2] = 1.0, 5.0
    tabular.values[2] = 10.0
    assert tabular.run_episode() == 5.0
    assert tabular.steps == 2
    np.testing.assert_allclose([tabular.values[0, 1], tabular.values[1, 0]], [first, second])


def test_exploring_actions_are_uniform_and_greedy_ones_break_ties() -> None:
    tabular = trainer(epsilon=0.4)
    tabular.values[0] = [1.0, 3.0, 3.0, 0.0]
    counts = np.bincount([tabular.choose(0) for _ in range(20_000)], minlength=4) / 20_000
    # 0.4 / 4 for each action, and 0.6 / 2 more for the two best ones; five standard errors.
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.4, 0.1], atol=0.017)


@pytest.mark.parametrize("algorithm", ["q_learning", "sarsa"])
def test_a_restored_trainer_ends_with_the_same_table(algorithm: str) -> None:
    whole = trained(algorithm=algorithm, steps=3000)
    first = trainer(algorithm=algorithm, steps=3000)
    for _ in range(3):
        first.train_step()
    second = trainer(algorithm=algorithm, steps=3000)
    second.restore(first.state())
    while not second.done:
        second.train_step()
    np.testing.assert_array_equal(second.values, whole.values)
    assert [p["return"] for p in second.curve] == [p["return"] for p in whole.curve]


def test_the_saved_policy_is_the_greedy_one(tmp_path) -> None:
    tabular = trained(steps=3000)
    policy_files.describe(tmp_path, tabular.config, tabular.spec)
    policy_files.save(policy_files.policy_file(tmp_path, 0), tabular.policy, None, None)
    policy = policy_files.load(tmp_path, 0).policy
    greedy = policy.head.act(policy.body(torch.eye(48)), 0.0).numpy()
    visited = tabular.values.any(1)
    assert visited.sum() > 10
    np.testing.assert_array_equal(greedy[visited], tabular.values[visited].argmax(1))


def test_q_learning_walks_along_the_cliff_and_sarsa_away_from_it() -> None:
    # Sutton and Barto 2018, example 6.6: 13 steps along the edge; the safe path takes 17. While
    # they explore, Q-learning falls more often.
    edge, safe = trained(), trained(algorithm="sarsa", steps=20_000)
    assert greedy_return(edge) == [-13.0]
    assert -20.0 <= greedy_return(safe)[0] <= -15.0
    assert edge.curve[-1]["return"] < safe.curve[-1]["return"] - 10
