"""IQL and behavior cloning: losses by hand, recorded steps, errors, and the recipe."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import align
from align.config.base import GymEnvironment
from align.config.control.offline import Offline
from align.control import policy_files, recorded_steps, spaces
from align.control.networks import Policy
from align.control.recorded_steps import RecordedSteps
from align.control.spaces import EnvSpec
from align.control.value_based.offline import OfflineTrainer
from align.errors import ArtifactError, UserError
from align.functional import advantage_weights, expectile_loss

RECIPE = Path(__file__).parents[2] / "recipes" / "control" / "iql.yaml"
BANDIT = EnvSpec(n_features=1, n_actions=2, low=None, high=None)
CARTPOLE = {"environment": "CartPole-v1", "steps": 64, "n_envs": 4, "n_steps": 16, "episodes": 2}


def build(data: RecordedSteps, spec: EnvSpec = BANDIT, **changes: Any) -> OfflineTrainer:
    settings: dict[str, Any] = {
        "environment": "CartPole-v1",
        "algorithm": "iql",
        "data": ["earlier"],
        "steps": 100,
        "batch_size": 32,
        "hidden_sizes": [16],
    }
    return OfflineTrainer(Offline(**settings | changes), spec, 0, data)


def bandit(n: int = 1000) -> RecordedSteps:
    """One step per episode. Of ten actions nine are 0, with the reward 0; action 1 has 1."""
    actions = (torch.arange(n) % 10 == 0).long()
    ones = torch.ones(n, 1)
    return RecordedSteps(ones, actions, actions.float(), ones, torch.ones(n, dtype=torch.bool))


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
def test_the_best_estimate_of_an_expectile_regression_is_the_expectile(expectile: float) -> None:
    # Of 0 and 1 with equal probability: t * (1 - m) = (1 - t) * m, so m = t.
    targets = torch.tensor([0.0, 1.0]).double()
    grid = torch.linspace(0, 1, 1001).double()
    losses = expectile_loss(targets - grid[:, None], expectile=expectile).mean(-1)
    assert float(grid[losses.argmin()]) == pytest.approx(expectile, abs=1e-3)
    # Its gradient in the estimate, by autograd: -2 * weight * error.
    estimate = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    expectile_loss(targets - estimate, expectile=expectile).sum().backward()
    expected = -2 * ((1 - expectile) * (0 - 0.25) + expectile * (1 - 0.25))
    assert float(estimate.grad) == pytest.approx(expected)


def test_an_expectile_of_a_half_is_half_the_squared_error() -> None:
    errors = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert_close(expectile_loss(errors, expectile=0.5), errors**2 / 2)


def test_weights_of_recorded_actions_by_hand() -> None:
    weights = advantage_weights(torch.tensor([-1.0, 0.0, 0.5, 9.0]), temperature=2.0)
    assert_close(weights, torch.tensor([math.exp(-2), 1.0, math.e, 100.0]))
    assert_close(advantage_weights(weights, temperature=0.0), torch.ones(4))


def constant(network: Any, value: Any) -> None:
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    network[-1].bias.data.copy_(torch.tensor(value))


def two_steps(trainer: OfflineTrainer) -> dict[str, float]:
    """Losses of two steps with the rewards 2 and 7, of which the second terminates.

    The policy gives action 1 the probability 3/4; V = 1, Q = 5 and 3, their targets 1.5 and 1.2.
    """
    learner: Any = trainer.learner
    constant(learner.policy.body, [0.0, math.log(3)])
    constant(learner.value, [1.0])
    for networks, values in ((learner.action_values, (5.0, 3.0)), (learner.targets, (1.5, 1.2))):
        for network, value in zip(networks, values, strict=True):
            constant(network, [value])
    rewards, ends = torch.tensor([2.0, 7.0]), torch.tensor([False, True])
    states = torch.ones(2, 1)
    losses = learner.losses(RecordedSteps(states, torch.tensor([0, 1]), rewards, states, ends))
    return {name: float(loss.detach()) for name, loss in losses.items()}


def test_the_losses_of_iql_by_hand() -> None:
    losses = two_steps(build(bandit(), gamma=0.5, expectile=0.75, temperature=2.0))
    # The advantage is 1.2 - 1 = 0.2, and the weight exp(2 * 0.2); targets of Q: 2 + 0.5 * 1, and 7.
    likelihood = (math.log(1 / 4) + math.log(3 / 4)) / 2
    assert losses == pytest.approx(
        {
            "policy_loss": -math.exp(0.4) * likelihood,
            "value_loss": 0.75 * 0.2**2,
            "action_value_loss": ((5 - 2.5) ** 2 + (3 - 2.5) ** 2 + (5 - 7) ** 2 + (3 - 7) ** 2)
            / 2,
        }
    )


def test_behavior_cloning_is_the_imitation_with_equal_weights() -> None:
    losses = two_steps(build(bandit(), algorithm="behavior_cloning"))
    assert losses == pytest.approx({"policy_loss": -(math.log(1 / 4) + math.log(3 / 4)) / 2})


def test_an_update_trains_each_network_by_its_own_loss_and_moves_the_targets() -> None:
    trainer = build(bandit(), tau=0.25)
    learner: Any = trainer.learner
    two_steps(trainer)
    before = {name: weight.clone() for name, weight in learner.state_dict().items()}
    loss = learner.losses(trainer.data)
    for name, networks in {
        "policy_loss": {"policy"},
        "value_loss": {"value"},
        "action_value_loss": {"action_values"},
    }.items():
        learner.zero_grad()
        loss[name].backward(retain_graph=True)
        trained = {key.split(".")[0] for key, w in learner.named_parameters() if w.grad is not None and w.grad.any()}  # fmt: skip
        assert trained == networks
    learner.update(trainer.data)
    after = learner.state_dict()
    for name in before:
        if name.startswith("targets"):
            source = after[name.replace("targets", "action_values")]
            assert_close(after[name], before[name] + 0.25 * (source - before[name]))


def test_iql_takes_the_better_action_and_behavior_cloning_the_frequent_one() -> None:
    # Of the rewards 0 with probability 0.9 and 1 with 0.1, the 0.9-expectile is 0.5.
    settings: dict[str, Any] = {"steps": 600, "learning_rate": 1e-2}
    iql = build(bandit(), **settings, tau=0.05, expectile=0.9, temperature=10.0)
    cloning = build(bandit(), **settings, algorithm="behavior_cloning")
    for trainer in (iql, cloning):
        while not trainer.done:
            trainer.train_step()
    state = torch.ones(1, 1)
    with torch.no_grad():
        assert cloning.policy.body(state).softmax(-1)[0, 1] == pytest.approx(0.1, abs=0.05)
        assert iql.policy.body(state).argmax() == 1
        assert float(iql.learner.value(state)) == pytest.approx(0.5, abs=0.1)


def test_equal_continuous_actions_keep_a_density() -> None:
    n = 50
    ones = torch.ones(n, 1)
    data = RecordedSteps(ones, ones, torch.zeros(n), ones, torch.zeros(n, dtype=torch.bool))
    spec = EnvSpec(1, 1, [-1.0], [1.0])
    learner = build(data, spec, algorithm="behavior_cloning").learner
    head: Any = learner.policy.head
    head.log_std.data.fill_(-9.0)
    learner.update(data)
    assert head.log_std.tolist() == [-5.0]


# Recorded steps -----------------------------------------------------------------------------------


def recorded(environment: str, steps: int, seed: int = 0) -> RecordedSteps:
    spec = spaces.inspect_env(GymEnvironment(environment, {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Policy(spec, hidden_sizes=[8], activation="tanh", distribution=None)
    return recorded_steps.record(policy, environment, {}, statistics=None, steps=steps, seed=seed)


def test_recorded_steps_are_those_of_the_environment() -> None:
    steps = recorded("CartPole-v1", 600)
    assert len(steps.rewards) == 600
    env: Any = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    for row in range(600):
        env.state, env.steps_beyond_terminated = steps.observations[row].double().numpy(), None
        following, reward, terminated, _, _ = env.step(int(steps.actions[row]))
        np.testing.assert_allclose(following, steps.next_observations[row], atol=1e-5)
        assert (reward, terminated) == (steps.rewards[row], steps.terminated[row])
    assert steps.terminated.sum() > 5
    assert {*steps.actions.tolist()} == {0, 1}


def test_recorded_steps_depend_on_the_seed_alone() -> None:
    first, again, other = (recorded("Pendulum-v1", 40, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.actions, other.actions)
    assert first.actions.abs().max() <= 2.0  # as the environment receives them
    assert not first.terminated.any()


def test_recorded_steps_are_saved_and_loaded_with_those_of_other_seeds(tmp_path: Path) -> None:
    spec = spaces.inspect_env(GymEnvironment("Pendulum-v1", {}))
    parts = [recorded("Pendulum-v1", 20, seed) for seed in (0, 1)]
    for seed, part in enumerate(parts):
        recorded_steps.save(recorded_steps.steps_file(tmp_path, seed), part)
    loaded = recorded_steps.load([tmp_path, tmp_path], spec)
    for column, first, second in zip(loaded, *parts, strict=True):
        assert torch.equal(column, torch.cat([first, second] * 2))


def test_files_that_are_not_recorded_steps_of_the_environment_are_refused(tmp_path: Path) -> None:
    spec = spaces.inspect_env(GymEnvironment("Pendulum-v1", {}))
    file = recorded_steps.steps_file(tmp_path, 0)
    with pytest.raises(ArtifactError, match="no recorded steps; set `record_steps`"):
        recorded_steps.load([tmp_path], spec)
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(ArtifactError, match="no recorded steps"):
        recorded_steps.load([tmp_path], spec)
    recorded_steps.save(file, recorded("CartPole-v1", 20))
    with pytest.raises(ArtifactError, match="observations have the shape"):
        recorded_steps.load([tmp_path], spec)
    few = BANDIT._replace(n_features=4, n_actions=1)
    with pytest.raises(ArtifactError, match="an action is 1; the environment has 1"):
        recorded_steps.load([tmp_path], few)


@pytest.mark.parametrize("algorithm", ["iql", "behavior_cloning"])
def test_a_restored_trainer_reaches_the_same_weights(algorithm: str) -> None:
    whole, resumed = (build(bandit(), algorithm=algorithm) for _ in range(2))
    for _ in range(50):
        whole.train_step()
    file = io.BytesIO()
    torch.save(whole.state(), file)
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    for trainer in (whole, resumed):
        while not trainer.done:
            trainer.train_step()
    weights = (trainer.learner.state_dict() for trainer in (whole, resumed))
    for (name, first), second in zip(next(weights).items(), next(weights).values(), strict=True):
        assert torch.equal(first, second), name
    assert whole.steps == resumed.steps == 100


# The stage ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recorded_policy_is_cloned_and_played(tmp_path: Path) -> None:
    recipe = {
        "stages": {
            "control": CARTPOLE | {"record_steps": 200, "seeds": [0, 3]},
            "iql": {
                "stage": "control",
                "environment": "CartPole-v1",
                "algorithm": "iql",
                "data": ["control"],
                "steps": 20,
                "episodes": 2,
            },
        }
    }
    results = align.run(recipe, tmp_path)
    folder = results["control"].folder
    assert {"steps-0.safetensors", "steps-3.safetensors"} <= {
        file.name for file in folder.iterdir()
    }
    loaded = policy_files.load(results["iql"].folder, 0)
    frames = [*policy_files.play_episodes(loaded, render_mode="rgb_array", episodes=1, seed=0)]
    assert frames[-1].episode_return == len(frames) - 1


@pytest.mark.parametrize(
    ("source", "changes", "text"),
    [
        ({}, {}, "control.iql.data.0: the stage `control` records no steps; set `record_steps` there"),
        ({"record_steps": 9}, {"environment": "Acrobot-v1"}, "the stage `control` records CartPole-v1, but this stage has Acrobot-v1"),
        ({"record_steps": 9}, {"data": ["control", "control"]}, "`control` is listed more than once"),
        ({"record_steps": 9}, {"algorithm": "behavior_cloning", "expectile": 0.9}, "`expectile` has no effect with `algorithm: behavior_cloning`"),
        ({"record_steps": 9}, {"data": []}, "data"),
    ],
)  # fmt: skip
def test_an_invalid_recipe_gives_one_line_with_the_repair(
    source: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    offline = {"stage": "control", "environment": "CartPole-v1", "algorithm": "iql", "steps": 9}
    stages = {"control": CARTPOLE | source, "iql": offline | {"data": ["control"]} | changes}
    with pytest.raises(UserError) as error:
        align.load_recipe({"stages": stages})
    lines = [
        line for line in str(error.value).splitlines() if text.removeprefix("control.") in line
    ]
    assert len(lines) == 1, str(error.value)


@pytest.mark.slow
def test_iql_is_better_than_behavior_cloning_on_mixed_data(tmp_path: Path) -> None:
    loaded = align.load_recipe(RECIPE, overrides=["iql.seeds=[0]", "cloning.seeds=[0]"])
    results = align.run(loaded, tmp_path)
    returns = {
        name: results[name].metrics["mean_return"] for name in ("weak", "strong", "cloning", "iql")
    }
    assert returns["weak"] < returns["strong"]
    assert returns["iql"] > returns["cloning"] + 3
