"""Batched environments against Gymnasium's, step by step."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from align.config.control import policy_gradient
from align.control import spaces
from align.control.policy_gradient import PolicyGradientTrainer
from align.control.vector.batched import BATCHED, BatchedCartPole, BatchedPendulum


@pytest.mark.parametrize("name", BATCHED)
def test_each_step_equals_that_of_gymnasium(name):
    batched = BATCHED[name](8)
    singles = [gymnasium.make(name).unwrapped for _ in range(8)]
    batched.reset(seed=3)
    for single in singles:
        single.reset(seed=0)
    largest, random = 0.0, np.random.default_rng(0)
    for _ in range(60):
        for place, single in enumerate(singles):
            single.state = batched.state[:, place].numpy().copy()
            single.steps_beyond_terminated = None
        shape = batched.action_space.shape
        actions = (
            random.integers(0, 2, shape)
            if name.startswith("CartPole")
            else random.uniform(-3, 3, shape).astype(np.float32)  # beyond the bounds as well
        )
        moved = batched.advance(torch.from_numpy(actions))
        for place, single in enumerate(singles):
            observation, reward, terminated, _, _ = single.step(actions[place])
            difference = moved.final_observations[place].numpy() - observation
            largest = max(largest, float(np.abs(difference).max()))
            assert float(moved.rewards[place]) == pytest.approx(reward, abs=1e-6)
            assert bool(moved.terminated[place]) == terminated
    assert largest <= 1e-6


def test_an_episode_ends_at_the_time_limit_and_the_next_begins_in_the_same_step():
    pendulum = BatchedPendulum(3, max_episode_steps=2)
    pendulum.reset(seed=0)
    torques = np.zeros((3, 1), np.float32)
    *_, truncated, info = pendulum.step(torques)
    assert not truncated.any()
    assert not info
    observations, _, terminated, truncated, info = pendulum.step(torques)
    assert truncated.all()
    assert not terminated.any()
    assert pendulum.steps.tolist() == [0, 0, 0]
    assert (observations != info["final_obs"]).any(axis=1).all()
    assert np.abs(observations[:, 2]).max() <= 1  # the first velocities
    np.testing.assert_array_equal(observations, pendulum.observe(pendulum.state).numpy())


def test_only_environments_whose_pole_has_fallen_are_reset():
    cart_pole = BatchedCartPole(2)
    cart_pole.reset(seed=0)
    cart_pole.state[:, 1] = torch.tensor([0.0, 0.0, 0.2, 5.0])  # 0.2 + 0.02 * 5 = 0.3 > 0.2094
    moved = cart_pole.advance(torch.tensor([1, 1]))
    assert moved.terminated.tolist() == [False, True]
    assert cart_pole.steps.tolist() == [1, 0]
    assert moved.final_observations[1, 2] == pytest.approx(0.3)
    assert moved.observations[1].abs().max() <= 0.05
    assert torch.equal(moved.observations[0], moved.final_observations[0])


def test_the_same_seed_gives_the_same_episodes():
    def play(seed):
        batched = BatchedCartPole(16)
        first, _ = batched.reset(seed=seed)
        steps = [batched.step(np.ones(16, np.int64))[0] for _ in range(30)]
        return np.stack([first, *steps])

    np.testing.assert_array_equal(play(5), play(5))
    assert (play(5) != play(6)).any()


def test_the_recipe_key_names_the_batched_environments():
    assert (*BATCHED,) == policy_gradient.BATCHED


@pytest.mark.parametrize("name", BATCHED)
def test_a_trainer_on_batched_environments_resumes_bit_for_bit(name):
    def build():
        config = policy_gradient.PolicyGradient(
            environment=name,
            environment_options={"max_episode_steps": 9},
            steps=4 * 16 * 8,
            n_envs=16,
            n_steps=8,
            vectorization="batched",
            normalize_rewards=True,
        )
        return PolicyGradientTrainer(config, spaces.inspect_env(*config.gym_environments), 0)

    whole, resumed = build(), build()
    assert isinstance(whole.environments._unscaled.env, BATCHED[name])
    for _ in range(2):
        whole.train_step()
    resumed.restore(whole.state())
    while not whole.done:
        whole.train_step()
        resumed.train_step()
    for first, second in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(first, second)
    assert whole.curve[-1]["return"] == resumed.curve[-1]["return"]
