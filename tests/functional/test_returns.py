"""Returns and advantages: by hand, as an explicit double sum, and where the value is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from align.functional.returns import discounted_returns, gae
from align.functional.token_rewards import completion_gae, rewards_to_go, token_rewards


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def flags(*values: int) -> Tensor:
    return torch.tensor([values]).bool()


NEVER = flags(0, 0, 0)


def test_gae_by_hand():
    # deltas: 1 + 0.5 * 4 - 3 = 0; 2 + 0.5 * 6 - 4 = 1; 3 + 0.5 * 8 - 6 = 1
    # backward with 0.5 * 0.5 = 0.25: A_2 = 1; A_1 = 1 + 0.25; A_0 = 0 + 0.25 * 1.25
    advantages = gae(row(1, 2, 3), row(3, 4, 6), row(4, 6, 8), NEVER, NEVER, gamma=0.5, lam=0.5)
    assert_close(advantages, row(0.3125, 1.25, 1.0))


def test_gae_of_an_episode_that_terminates_after_the_second_step_by_hand():
    # as above, but delta_1 = 2 - 4 = -2, and nothing crosses the end: A_1 = -2; A_0 = 0 - 0.25 * 2
    advantages = gae(
        row(1, 2, 3), row(3, 4, 6), row(4, 6, 8), flags(0, 1, 0), NEVER, gamma=0.5, lam=0.5
    )
    assert_close(advantages, row(-0.5, -2.0, 1.0))


def test_gae_of_an_episode_cut_by_its_time_limit_by_hand():
    # the next value counts: delta_1 = 2 + 0.5 * 6 - 4 = 1; nothing crosses the cut: A_0 = 0.25 * 1
    advantages = gae(
        row(1, 2, 3), row(3, 4, 6), row(4, 6, 8), NEVER, flags(0, 1, 0), gamma=0.5, lam=0.5
    )
    assert_close(advantages, row(0.25, 1.0, 1.0))


@pytest.mark.parametrize(
    ("terminated", "cut", "expected"),
    [
        # 3 + 0.5 * 8 = 7; 2 + 0.5 * 7 = 5.5; 1 + 0.5 * 5.5 = 3.75
        pytest.param((0, 0, 0), (0, 0, 0), (3.75, 5.5, 7.0), id="continues after the last column"),
        pytest.param((0, 0, 1), (0, 0, 0), (2.75, 3.5, 3.0), id="terminates in the last column"),
        # 2; 1 + 0.5 * 2 = 2
        pytest.param((0, 1, 0), (0, 0, 0), (2.0, 2.0, 7.0), id="terminates after the second step"),
        # 2 + 0.5 * 6 = 5; 1 + 0.5 * 5 = 3.5
        pytest.param((0, 0, 0), (0, 1, 0), (3.5, 5.0, 7.0), id="cut after the second step"),
        pytest.param(
            (0, 1, 0), (0, 1, 0), (2.0, 2.0, 7.0), id="termination takes precedence over a cut"
        ),
    ],
)
def test_returns_by_hand(terminated, cut, expected):
    returns = discounted_returns(
        row(1, 2, 3), row(4, 6, 8), flags(*terminated), flags(*cut), gamma=0.5
    )
    assert_close(returns, row(*expected))


sizes = st.tuples(
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(0, 2**31),
)


class Rows:
    """Random rewards, values and flags.

    Inside an episode the next value is the value of the next step.
    """

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


def double_sum(rows: Rows, gamma: float, lam: float) -> Tensor:
    """A_t = sum over l of (gamma * lam)^l * delta_{t+l}, up to the first end or cut."""
    sums = torch.zeros_like(rows.rewards)
    for b, t in torch.cartesian_prod(*map(torch.arange, sums.shape)).reshape(-1, 2).tolist():
        for later in range(t, sums.shape[1]):
            delta = rows.rewards[b, later] - rows.values[b, later]
            if not rows.terminated[b, later]:
                delta += gamma * rows.next_values[b, later]
            sums[b, t] += (gamma * lam) ** (later - t) * delta
            if rows.terminated[b, later] or rows.cut[b, later]:
                break
    return sums


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_is_the_double_sum(drawn, gamma, lam):
    rows = Rows(*drawn)
    assert_close(rows.gae(gamma, lam), double_sum(rows, gamma, lam))


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from([0.0, 0.9, 1.0]))
def test_returns_are_the_values_plus_advantages_with_lambda_1(drawn, gamma):
    rows = Rows(*drawn)
    returns = discounted_returns(
        rows.rewards, rows.next_values, rows.terminated, rows.cut, gamma=gamma
    )
    assert_close(returns, rows.gae(gamma, 1.0) + rows.values)


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 5))
def test_padding_of_any_value_changes_nothing(drawn, more):
    rows = Rows(*drawn)
    rows.cut[:, -1] = True  # the last real token
    before = rows.gae(0.9, 0.95)
    returns = discounted_returns(
        rows.rewards, rows.next_values, rows.terminated, rows.cut, gamma=0.9
    )
    batch = len(before)
    junk = torch.full((batch, more), 1e6, dtype=torch.float64)
    for name in ("rewards", "values", "next_values"):
        setattr(rows, name, torch.cat([getattr(rows, name), junk], dim=1))
    for name in ("terminated", "cut"):
        setattr(rows, name, torch.cat([getattr(rows, name), junk.bool() & False], dim=1))
    after = discounted_returns(rows.rewards, rows.next_values, rows.terminated, rows.cut, gamma=0.9)
    assert torch.equal(rows.gae(0.9, 0.95)[:, :-more], before)
    assert torch.equal(after[:, :-more], returns)


def test_two_episodes_in_one_row_equal_the_two_episodes_in_two_rows():
    together = Rows(1, 8, 0.0, 0.0, seed=3)
    together.terminated[0, 3] = True
    apart = Rows(2, 4, 0.0, 0.0, seed=3)
    for name in ("rewards", "values", "next_values", "terminated", "cut"):
        setattr(apart, name, getattr(together, name).reshape(2, 4))
    assert torch.equal(together.gae(0.9, 0.8).reshape(2, 4), apart.gae(0.9, 0.8))


def test_reward_1_forever_has_value_1_over_1_minus_gamma():
    gamma, ones = 0.99, torch.ones(2, 50, dtype=torch.float64)
    never = torch.zeros(2, 50).bool()
    values = ones / (1 - gamma)
    returns = discounted_returns(ones, values, never, never, gamma=gamma)
    assert_close(returns, values)
    # The critic is exact, so all advantages are 0.
    advantages = gae(ones, values, values, never, never, gamma=gamma, lam=0.95)
    assert_close(advantages, torch.zeros_like(ones), rtol=0, atol=1e-11)


def test_reward_1_until_the_end_is_a_geometric_series():
    # (1 - gamma^n) / (1 - gamma) with n steps left
    ones, terminated = torch.ones(1, 5, dtype=torch.float64), flags(0, 0, 0, 0, 1)
    left = torch.tensor([[5, 4, 3, 2, 1]])
    returns = discounted_returns(ones, 100 * ones, terminated, flags(0, 0, 0, 0, 0), gamma=0.9)
    assert_close(returns, (1 - 0.9 ** left.double()) / (1 - 0.9))


def test_the_value_after_a_terminal_step_is_never_read():
    nothing = row(0.0, torch.nan, 0.0)
    nothing[0, 1] = torch.nan
    end = flags(0, 1, 0)
    assert gae(row(1, 1, 1), row(0, 0, 0), nothing, end, NEVER, gamma=1.0, lam=1.0).isfinite().all()
    assert discounted_returns(row(1, 1, 1), nothing, end, NEVER, gamma=1.0).isfinite().all()


def test_the_arguments_are_not_changed():
    rows = Rows(2, 5, 0.3, 0.3, seed=0)
    names = ("rewards", "values", "next_values", "terminated", "cut")
    before = {name: getattr(rows, name).clone() for name in names}
    rows.gae(0.9, 0.9)
    discounted_returns(rows.rewards, rows.next_values, rows.terminated, rows.cut, gamma=0.9)
    assert all(torch.equal(getattr(rows, name), before[name]) for name in names)


def test_nan_after_a_cut_and_in_padding_changes_nothing_before_it():
    rewards = torch.tensor([[1.0, 2.0, math.nan, math.nan]])
    values = torch.tensor([[0.5, 0.5, math.nan, math.nan]])
    next_values = torch.tensor([[0.5, 0.5, math.nan, math.nan]])
    never = torch.zeros(1, 4).bool()
    cut = torch.tensor([[False, True, True, True]])
    for terminated, stop in ((never, cut), (cut, never)):
        advantages = gae(rewards, values, next_values, terminated, stop, gamma=0.9, lam=0.8)
        returns = discounted_returns(rewards, next_values, terminated, stop, gamma=0.9)
        short = [tensor[:, :2] for tensor in (rewards, values, next_values, terminated, stop)]
        assert torch.equal(advantages[:, :2], gae(*short, gamma=0.9, lam=0.8))
        del short[1]
        assert torch.equal(returns[:, :2], discounted_returns(*short, gamma=0.9))


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_of_a_completion_may_be_nan_or_infinite(junk):
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    numbers = torch.arange(8.0).view(2, 4)
    wild = numbers.masked_fill(~mask, junk)
    for result, expected in (
        (
            completion_gae(wild, wild, mask, gamma=0.9, lam=0.8),
            completion_gae(numbers, numbers, mask, gamma=0.9, lam=0.8),
        ),
        (rewards_to_go(wild, mask, gamma=0.9), rewards_to_go(numbers, mask, gamma=0.9)),
        (
            token_rewards(torch.ones(2), wild, mask, kl_coef=0.5),
            token_rewards(torch.ones(2), numbers, mask, kl_coef=0.5),
        ),
    ):
        assert torch.equal(result, expected)
    # A score that is not finite stays on the last token of its completion.
    rewards = token_rewards(torch.tensor([junk, 1.0]), numbers, mask, kl_coef=0.5)
    assert rewards.isfinite().sum() == 7


@pytest.mark.parametrize("seed", range(4))
def test_tokens_of_an_environment_between_those_of_a_policy_are_part_of_a_transition(seed: int):
    # Each token's sum runs over the policy's later tokens, whose discount does not count others.
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 6, 12, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 12, generator=generator) < 0.5
    mask[0] = False
    advantages = completion_gae(rewards, values, mask, gamma=0.9, lam=0.8)
    returns = rewards_to_go(rewards, mask, gamma=0.9)
    score = token_rewards(torch.ones(6), torch.zeros(6, 12), mask, kl_coef=0.0)
    for r in range(6):
        places = mask[r].nonzero()[:, 0].tolist()
        assert score[r].nonzero()[:, 0].tolist() == places[-1:]
        for start, place in enumerate(places):
            later = places[start:]
            expected = sum(0.9**k * rewards[r, j].item() for k, j in enumerate(later))
            assert returns[r, place].item() == pytest.approx(expected)
            following = [*(values[r, j].item() for j in later[1:]), 0.0]
            expected = sum(
                0.72**k * (rewards[r, j].item() + 0.9 * after - values[r, j].item())
                for k, (j, after) in enumerate(zip(later, following, strict=True))
            )
            assert advantages[r, place].item() == pytest.approx(expected)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
