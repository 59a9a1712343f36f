"""Dynamic programming: by hand, against simulated chains, iteration against the linear solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.functional.dynamic_programming import (
    action_values,
    improved_policy,
    iterated_policy_values,
    policy_values,
)


def process(n_states: int, n_actions: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random transitions, from which an episode ends with probability 0.1, rewards, a policy."""
    generator = torch.Generator().manual_seed(seed)
    shape = n_states, n_actions
    weights = torch.rand(*shape, n_states, generator=generator, dtype=torch.float64)
    transitions = 0.9 * weights / weights.sum(-1, keepdim=True)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    policy = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1)
    return transitions, rewards, policy


# Two states. In state 0, action 0 leads to state 1 with reward 1, action 1 ends with reward 3. In
# state 1, both lead to state 0 or to the end, with probability 1/2 each, with the reward 4.
TRANSITIONS = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.5, 0.0], [0.5, 0.0]]]).double()
REWARDS = torch.tensor([[1.0, 3.0], [4.0, 4.0]]).double()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # v0 = 3; v1 = 4 + 1/2 * 1/2 * 3 = 4.75
        pytest.param([[0.0, 1.0], [1.0, 0.0]], [3.0, 4.75], id="end at once"),
        # v0 = 1 + v1 / 2; v1 = 4 + v0 / 4; v0 = 1 + 2 + v0 / 8 = 24/7; v1 = 34/7
        pytest.param([[1.0, 0.0], [0.0, 1.0]], [24 / 7, 34 / 7], id="continue"),
    ],
)
def test_policy_values_by_hand(policy: list[list[float]], expected: list[float]):
    values = policy_values(TRANSITIONS, REWARDS, torch.tensor(policy).double(), gamma=0.5)
    assert_close(values, torch.tensor(expected).double())


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_iteration_reaches_the_solution_of_the_linear_equations(gamma: float):
    transitions, rewards, policy = process(7, 3, seed=0)
    solved = policy_values(transitions, rewards, policy, gamma=gamma)
    iterated = iterated_policy_values(transitions, rewards, policy, gamma=gamma, tolerance=1e-13)
    assert_close(iterated, solved, atol=1e-10, rtol=0)


def test_the_values_are_mean_returns_of_simulated_episodes():
    transitions, rewards, policy = process(3, 2, seed=1)
    n, gamma = 20_000, 0.8
    generator = torch.Generator().manual_seed(2)
    states, returns = torch.zeros(n).long(), torch.zeros(n).double()
    continues, discount = torch.ones(n).double(), 1.0
    for _ in range(60):  # 0.8^60 is 1e-6
        actions = torch.multinomial(policy[states], 1, generator=generator).squeeze(1)
        returns += continues * discount * rewards[states, actions]
        rows = transitions[states, actions]
        rows = torch.cat([rows, 1 - rows.sum(-1, keepdim=True)], -1)
        states = torch.multinomial(rows, 1, generator=generator).squeeze(1)
        continues *= states < 3
        states, discount = states.clamp(max=2), discount * gamma
    error = float(returns.std()) / n**0.5
    expected = policy_values(transitions, rewards, policy, gamma=gamma)[0]
    assert abs(float(returns.mean() - expected)) < 4 * error


def test_value_and_policy_iteration_reach_the_best_of_all_policies():
    transitions, rewards, policy = process(4, 2, seed=3)
    tables = torch.eye(2).double()[torch.cartesian_prod(*[torch.arange(2)] * 4)]
    all_values = torch.stack(
        [policy_values(transitions, rewards, table, gamma=0.9) for table in tables]
    )
    best = all_values.amax(0)
    values = torch.zeros(4).double()
    for _ in range(400):
        values = action_values(transitions, rewards, values, gamma=0.9).amax(-1)
        solved = policy_values(transitions, rewards, policy, gamma=0.9)
        policy = improved_policy(action_values(transitions, rewards, solved, gamma=0.9), policy)
    assert_close(values, best, atol=1e-10, rtol=0)
    assert_close(solved, best, atol=1e-10, rtol=0)


def test_a_state_changes_its_action_only_for_a_better_one():
    values = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0 + 1e-13, 1.0]]).double()
    policy = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]).double()
    assert improved_policy(values, policy).argmax(-1).tolist() == [1, 1, 1]


def test_without_a_discount_a_policy_must_be_able_to_end():
    stay = torch.tensor([[[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]], [[0.5, 0.0, 0.0]]]).double()
    rewards, only = torch.ones(3, 1).double(), torch.ones(3, 1).double()
    with pytest.raises(ValueError, match="never ends an episode from state 0"):
        policy_values(stay, rewards, only, gamma=1.0)
    with pytest.raises(ValueError, match="still change by more than 1e-06 after 50 sweeps"):
        iterated_policy_values(stay, rewards, only, gamma=1.0, tolerance=1e-6, max_sweeps=50)
    # 1 + 0.5 + … = 2 in each state
    assert_close(policy_values(stay, rewards, only, gamma=0.5)[:2], torch.full((2,), 2.0).double())
