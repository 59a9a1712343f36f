"""Returns and advantages: hand values, the double sum that they stand for, and worlds whose value is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from align.functional.returns import discounted_returns, gae


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def flags(*values: int) -> Tensor:
    return torch.tensor([values]).bool()


NEVER = flags(0, 0, 0)


def test_gae_by_hand():
    # deltas: 1 + 0.5 * 4 - 3 = 0; 2 + 0.5 * 6 - 4 = 1; 3 + 0.5 * 8 - 6 = 1
    # backwards with 0.5 * 0.5 = 0.25: A_2 = 1; A_1 = 1 + 0.25; A_0 = 0 + 0.25 * 1.25
    found = gae(row(1, 2, 3), row(3, 4, 6), row(4, 6, 8), NEVER, NEVER, gamma=0.5, lam=0.5)
    assert_close(found, row(0.3125, 1.25, 1.0))


def test_gae_of_an_episode_that_ends_after_the_second_step_by_hand():
    # as above, but delta_1 = 2 - 4 = -2, and nothing comes back over the end: A_1 = -2; A_0 = 0 - 0.25 * 2
    found = gae(row(1, 2, 3), row(3, 4, 6), row(4, 6, 8), flags(0, 1, 0), NEVER, gamma=0.5, lam=0.5)
    assert_close(found, row(-0.5, -2.0, 1.0))


def test_gae_of_an_episode_cut_by_its_time_limit_by_hand():
    # the next value counts, delta_1 = 2 + 0.5 * 6 - 4 = 1, and nothing comes back over the cut: A_0 = 0 + 0.25 * 1
    found = gae(row(1, 2, 3), row(3, 4, 6), row(4, 6, 8), NEVER, flags(0, 1, 0), gamma=0.5, lam=0.5)
    assert_close(found, row(0.25, 1.0, 1.0))


@pytest.mark.parametrize(
    ("terminated", "cut", "expected"),
    [
        # 3 + 0.5 * 8 = 7; 2 + 0.5 * 7 = 5.5; 1 + 0.5 * 5.5 = 3.75
        pytest.param((0, 0, 0), (0, 0, 0), (3.75, 5.5, 7.0), id="goes on behind the last column"),
        pytest.param((0, 0, 1), (0, 0, 0), (2.75, 3.5, 3.0), id="ends with the last column"),
        # 2; 1 + 0.5 * 2 = 2
        pytest.param((0, 1, 0), (0, 0, 0), (2.0, 2.0, 7.0), id="ends after the second step"),
        # 2 + 0.5 * 6 = 5; 1 + 0.5 * 5 = 3.5
        pytest.param((0, 0, 0), (0, 1, 0), (3.5, 5.0, 7.0), id="cut after the second step"),
        pytest.param((0, 1, 0), (0, 1, 0), (2.0, 2.0, 7.0), id="an end is an end, cut or not"),
    ],
)
def test_returns_by_hand(terminated, cut, expected):
    found = discounted_returns(
        row(1, 2, 3), row(4, 6, 8), flags(*terminated), flags(*cut), gamma=0.5
    )
    assert_close(found, row(*expected))


worlds = st.tuples(
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(0, 2**31),
)


class World:
    """Random rewards and flags; inside an episode the next value is the value of the next step."""

    def __init__(self, batch: int, time: int, ends: float, cuts: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(batch, time, generator=draw, dtype=torch.float64)

        self.rewards, self.values, self.next_values = normal(), normal(), normal()
        self.terminated = torch.rand(batch, time, generator=draw) < ends
        self.cut = torch.rand(batch, time, generator=draw) < cuts
        inside = ~(self.terminated | self.cut)[:, :-1]
        self.next_values[:, :-1] = torch.where(inside, self.values[:, 1:], self.next_values[:, :-1])

    def gae(self, gamma: float, lam: float) -> Tensor:
        return gae(
            self.rewards,
            self.values,
            self.next_values,
            self.terminated,
            self.cut,
            gamma=gamma,
            lam=lam,
        )


def double_sum(world: World, gamma: float, lam: float) -> Tensor:
    """A_t = sum over l of (gamma * lam)^l * delta_{t+l}, up to the first end or cut: O(time^2) and no recursion."""
    found = torch.zeros_like(world.rewards)
    for b, t in torch.cartesian_prod(*map(torch.arange, found.shape)).reshape(-1, 2).tolist():
        for later in range(t, found.shape[1]):
            delta = world.rewards[b, later] - world.values[b, later]
            if not world.terminated[b, later]:
                delta += gamma * world.next_values[b, later]
            found[b, t] += (gamma * lam) ** (later - t) * delta
            if world.terminated[b, later] or world.cut[b, later]:
                break
    return found


@settings(max_examples=60, deadline=None)
@given(worlds, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_is_the_double_sum(drawn, gamma, lam):
    world = World(*drawn)
    assert_close(world.gae(gamma, lam), double_sum(world, gamma, lam))


@settings(max_examples=60, deadline=None)
@given(worlds, st.sampled_from([0.0, 0.9, 1.0]))
def test_returns_are_the_values_plus_advantages_with_lambda_1(drawn, gamma):
    world = World(*drawn)
    found = discounted_returns(
        world.rewards, world.next_values, world.terminated, world.cut, gamma=gamma
    )
    assert_close(found, world.gae(gamma, 1.0) + world.values)


@settings(max_examples=30, deadline=None)
@given(worlds, st.integers(1, 5))
def test_more_padding_changes_nothing_whatever_lies_in_it(drawn, more):
    world = World(*drawn)
    world.cut[:, -1] = True  # the last real token
    before = world.gae(0.9, 0.95)
    returns = discounted_returns(
        world.rewards, world.next_values, world.terminated, world.cut, gamma=0.9
    )
    batch = len(before)
    junk = torch.full((batch, more), 1e6, dtype=torch.float64)
    for name in ("rewards", "values", "next_values"):
        setattr(world, name, torch.cat([getattr(world, name), junk], dim=1))
    for name in ("terminated", "cut"):
        setattr(world, name, torch.cat([getattr(world, name), junk.bool() & False], dim=1))
    after = discounted_returns(
        world.rewards, world.next_values, world.terminated, world.cut, gamma=0.9
    )
    assert torch.equal(world.gae(0.9, 0.95)[:, :-more], before)
    assert torch.equal(after[:, :-more], returns)


def test_a_step_is_an_episodes_end_though_the_same_row_goes_on():
    # Two episodes in a row, one after the other, are the two episodes alone.
    together = World(1, 8, 0.0, 0.0, seed=3)
    together.terminated[0, 3] = True
    apart = World(2, 4, 0.0, 0.0, seed=3)
    for name in ("rewards", "values", "next_values", "terminated", "cut"):
        setattr(apart, name, getattr(together, name).reshape(2, 4))
    assert torch.equal(together.gae(0.9, 0.8).reshape(2, 4), apart.gae(0.9, 0.8))


def test_reward_1_forever_is_worth_1_over_1_minus_gamma():
    gamma, ones = 0.99, torch.ones(2, 50, dtype=torch.float64)
    never = torch.zeros(2, 50).bool()
    values = ones / (1 - gamma)
    found = discounted_returns(ones, values, never, never, gamma=gamma)
    assert_close(found, values)
    # The critic is right, so nothing is better or worse than it says.
    advantages = gae(ones, values, values, never, never, gamma=gamma, lam=0.95)
    assert_close(advantages, torch.zeros_like(ones), rtol=0, atol=1e-11)


def test_reward_1_until_the_end_is_a_geometric_series():
    # (1 - gamma^n) / (1 - gamma) with n steps left
    ones, terminated = torch.ones(1, 5, dtype=torch.float64), flags(0, 0, 0, 0, 1)
    left = torch.tensor([[5, 4, 3, 2, 1]])
    found = discounted_returns(ones, 100 * ones, terminated, flags(0, 0, 0, 0, 0), gamma=0.9)
    assert_close(found, (1 - 0.9 ** left.double()) / (1 - 0.9))


def test_the_value_behind_an_end_is_never_read():
    nothing = row(0.0, torch.nan, 0.0)
    nothing[0, 1] = torch.nan
    end = flags(0, 1, 0)
    assert gae(row(1, 1, 1), row(0, 0, 0), nothing, end, NEVER, gamma=1.0, lam=1.0).isfinite().all()
    assert discounted_returns(row(1, 1, 1), nothing, end, NEVER, gamma=1.0).isfinite().all()


def test_the_arguments_are_left_alone():
    world = World(2, 5, 0.3, 0.3, seed=0)
    names = ("rewards", "values", "next_values", "terminated", "cut")
    before = {name: getattr(world, name).clone() for name in names}
    world.gae(0.9, 0.9)
    discounted_returns(world.rewards, world.next_values, world.terminated, world.cut, gamma=0.9)
    assert all(torch.equal(getattr(world, name), before[name]) for name in names)
