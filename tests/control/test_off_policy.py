"""DQN, SAC and TD3: networks and targets by hand, resuming bit for bit, and the saved policies."""

from __future__ import annotations

import io
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from align.config.base import GymEnvironment
from align.config.control.off_policy import OffPolicy
from align.control import policy_files, spaces
from align.control.build import build_trainer
from align.control.environments import Environments
from align.errors import UserError

POINT_REACH = "align.control.point_reach:PointReach-v0"
SMALL: dict[str, Any] = {
    "steps": 260,
    "learning_starts": 60,
    "buffer_size": 200,
    "batch_size": 16,
    "hidden_sizes": [16, 16],
    "episodes": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "dqn": {"environment": "CartPole-v1", "algorithm": "dqn", "target_update_interval": 7},
    "dueling": {
        "environment": "CartPole-v1",
        "algorithm": "dqn",
        "target": "double",
        "network": "dueling",
    },
    "sac": {"environment": POINT_REACH, "algorithm": "sac", "replay": "hindsight"},
    "td3": {
        "environment": "Pendulum-v1",
        "algorithm": "td3",
        "train_every": 3,
        "schedule": "linear",
    },
}


def build(seed: int = 0, **settings: Any) -> Any:
    config = OffPolicy(**SMALL | settings)
    return build_trainer(config, spaces.inspect_env(*config.gym_environments), seed)


def finish(trainer: Any) -> Any:
    while not trainer.done:
        trainer.train_step()
    return trainer


# The first import of Stable-Baselines3 takes 3 s.
trains = pytest.mark.slow


@trains
@pytest.mark.parametrize("case", CASES)
def test_a_restored_trainer_reaches_the_same_weights(case: str) -> None:
    whole = build(**CASES[case])
    while whole.steps < 170:  # after an update, and within an episode
        whole.train_step()
    assert whole.env.actions
    file = io.BytesIO()
    torch.save(whole.state(), file)
    finish(whole)
    resumed = build(**CASES[case])
    torch.rand(3), np.random.rand(3)  # the global generators are no part of the result
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    finish(resumed)
    for (name, first), second in zip(
        whole.model.policy.state_dict().items(),
        resumed.model.policy.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(first, second), name
    for key in ("steps", "return", "value", "episodes", "value_loss"):
        assert [p.get(key) for p in whole.curve] == [p.get(key) for p in resumed.curve], key
    assert whole.curve[-1]["value_loss"] > 0


@trains
@pytest.mark.parametrize("case", CASES)
def test_the_saved_policy_acts_as_that_of_the_library(case: str, tmp_path: Any) -> None:
    trainer = finish(build(**CASES[case]))
    policy_files.describe(tmp_path, trainer.config, trainer.spec)
    policy_files.save(policy_files.policy_file(tmp_path, 0), trainer.policy, None, None)
    policy = policy_files.load(tmp_path, 0).policy
    env = gymnasium.make(trainer.config.environment)
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        expected, _ = trainer.model.predict(observation, deterministic=True)
        vector = gymnasium.spaces.flatten(env.observation_space, observation)
        outputs = policy.body(torch.from_numpy(vector).float()[None])
        actions = policy.head.env_actions(policy.head.act(outputs, 0.0).detach())
        np.testing.assert_allclose(actions[0], expected, atol=1e-5)


@trains
def test_the_target_of_double_dqn_by_hand() -> None:
    # Best action of the trained network: 1; the target network values it with 5, and action 0 with
    # 9. The target is 2 + 0.5 * 5 = 4.5 and not 2 + 0.5 * 9 = 6.5; the value of the action is 1.
    # Huber loss: |4.5 - 1| - 0.5 = 3 and |6.5 - 1| - 0.5 = 5.
    losses = []
    for target in ("double", "max"):
        trainer = build(**CASES["dqn"] | {"target": target, "gamma": 0.5, "batch_size": 4})
        model = trainer.model
        for network, values in ((model.q_net, [1.0, 3.0]), (model.q_net_target, [9.0, 5.0])):
            for parameter in network.parameters():
                torch.nn.init.zeros_(parameter)
            network.q_net[-1].bias.data = torch.tensor(values)
        zeros = np.zeros((1, 4), np.float32)
        model.replay_buffer.add(zeros, zeros, np.array([0]), np.array([2.0]), np.array([0.0]), [{}])
        model.train(gradient_steps=1, batch_size=4)
        losses.append(model.logger.name_to_value["train/loss"])
    assert losses == pytest.approx([3.0, 5.0])


@trains
def test_dueling_action_values_by_hand() -> None:
    network = build(**CASES["dueling"]).model.q_net
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    network.value[-1].bias.data = torch.tensor([10.0])
    network.q_net[-1].bias.data = torch.tensor([1.0, 4.0])
    # 10 + 1 - 2.5 and 10 + 4 - 2.5
    assert_close(network(torch.zeros(1, 4)).detach(), torch.tensor([[8.5, 11.5]]))
    # One hidden layer is shared; each stream has its own.
    assert network.value[0].in_features == network.q_net[2].in_features == 16


@trains
def test_random_actions_become_rarer() -> None:
    changes = {"exploration_fraction": 0.5, "exploration_final": 0.2, "train_every": 1}
    trainer = finish(build(**CASES["dqn"] | changes, seed=1))
    # From 1 at step 0 to 0.2 at step 130 of 260.
    rate = trainer.model.exploration_schedule
    trainer.model.num_timesteps = 65
    assert rate(0.0) == pytest.approx(0.6)
    trainer.model.num_timesteps = 200
    assert rate(0.0) == 0.2


@trains
@pytest.mark.parametrize("case", ["dqn", "sac"])
def test_the_learning_rate_decays_over_the_whole_run(case: str) -> None:
    for schedule, part in (("linear", 1 - 130 / 260), ("constant", 1.0)):
        trainer = build(**CASES[case] | {"schedule": schedule, "learning_rate": 0.01})
        while trainer.steps < 130:  # in several calls of the library, of which each trains
            trainer.train_step()
        assert trainer.steps == 130
        policy = trainer.model.policy
        networks = (policy,) if case == "dqn" else (policy.actor, policy.critic)
        for network in networks:
            (group,) = network.optimizer.param_groups
            assert group["lr"] == pytest.approx(0.01 * part)


@trains
def test_hindsight_needs_a_whole_episode_first() -> None:
    with pytest.raises(UserError, match=r"`learning_starts` \(50\) must exceed .* \(50 steps\)"):
        build(**CASES["sac"] | {"learning_starts": 50})


@trains
def test_most_hindsight_rewards_of_a_random_policy_are_reached_goals() -> None:
    for replay, low, high in (("hindsight", 0.05, 1.0), ("uniform", 0.0, 0.02)):
        trainer = build(**CASES["sac"] | {"replay": replay, "learning_starts": 255})
        trainer.model.learn(250)
        rewards = trainer.model.replay_buffer.sample(500).rewards
        assert low <= float((rewards == 0).float().mean()) <= high


def test_the_point_moves_to_its_goal() -> None:
    env: Any = gymnasium.make(POINT_REACH, render_mode="rgb_array")
    observation, _ = env.reset(seed=3)
    assert observation["achieved_goal"].tolist() == [0.0, 0.0]
    rewards = []
    for _ in range(50):
        action = np.clip((observation["desired_goal"] - observation["observation"]) / 0.1, -1, 1)
        observation, reward, terminated, truncated, info = env.step(action.astype(np.float32))
        rewards.append(reward)
    assert truncated
    assert not terminated
    assert info["is_success"]
    # The larger coordinate of the goal in steps of 0.1, less the radius and the last step.
    n_steps = float(np.abs(observation["desired_goal"]).max()) / 0.1
    assert n_steps - 2 <= -sum(rewards) <= n_steps
    assert env.render().shape == (200, 200, 3)


def test_the_parts_of_an_observation_are_one_vector_in_the_order_of_their_names() -> None:
    environments = Environments(POINT_REACH, {}, 2)
    observations = environments.reset(0)
    assert observations.shape == (2, 6)
    env: Any = gymnasium.make(POINT_REACH)
    first, _ = env.reset(seed=0)
    expected = [first[name] for name in ("achieved_goal", "desired_goal", "observation")]
    np.testing.assert_array_equal(observations[0], np.concatenate(expected))
    for _ in range(50):
        step = environments.step(np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(step.final_observations[:, 0], [1.0, 1.0])  # at the border
    assert spaces.inspect_env(GymEnvironment(POINT_REACH, {})).n_features == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": "Pendulum-v1", "algorithm": "dqn"}, "has Box.* needs discrete actions"),
        ({"environment": "CartPole-v1", "algorithm": "sac"}, "Discrete.* bounded continuous act"),
        ({"algorithm": "td3", "replay": "hindsight"}, "has Box.* but the algorithm needs goals"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(changes: Any, message: str) -> None:
    config = OffPolicy(**{"environment": "Pendulum-v1", "steps": 2000} | changes)
    with pytest.raises(spaces.UnfitError, match=message):
        spaces.inspect_env(*config.gym_environments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "sac", "target": "double"}, "`target` has no effect with `algorithm: sac`"),
        ({"algorithm": "dqn", "action_noise": 0.1}, "remove it, or set `algorithm: td3`"),
        ({"algorithm": "dqn", "hindsight_goals": 2}, "set `replay: hindsight`"),
        ({"algorithm": "dqn", "steps": 1000}, r"`learning_starts` \(1000\) must be less than `st"),
    ],
)
def test_keys_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OffPolicy(**{"environment": "CartPole-v1", "steps": 2000} | changes)


def test_a_missing_extra_is_one_line(launch: Any, tmp_path: Any, monkeypatch: Any) -> None:
    text = "stages: {control: {environment: CartPole-v1, algorithm: dqn, steps: 2000}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    ended = launch("recipe.yaml")
    assert ended.code == 2
    message = "stable_baselines3 is not installed: pip install -e '.[off-policy]'"
    assert f"recipe.yaml:1: control.algorithm: {message}" in ended.err
