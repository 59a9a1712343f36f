"""MADDPG: losses by numpy, gradients by differences, what critics see, resuming, errors."""

from __future__ import annotations

import copy
import io
import sys
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from mpe2 import simple_spread_v3
from PIL import Image
from pydantic import ValidationError
from torch.testing import assert_close

from align.cli.play import play
from align.config.base import GymEnvironment
from align.config.control.maddpg import MultiAgent
from align.config.control.policy_gradient import PolicyGradient
from align.control import policy_files, spaces
from align.control.build import build_trainer
from align.control.environments import Environments
from align.control.evaluate import evaluate
from align.control.multi_agent.maddpg import Learner, Steps
from align.control.spaces import EnvSpec

ID = "align.control.multi_agent.parallel:Parallel-v0"
SPREAD = {"module": "mpe2.simple_spread_v3", "continuous_actions": True}
SMALL: dict[str, Any] = {
    "environment": ID,
    "environment_options": SPREAD,
    "algorithm": "maddpg",
    "steps": 120,
    "learning_starts": 30,
    "buffer_size": 50,
    "batch_size": 8,
    "train_every": 3,
    "learning_rate": 1e-2,
    "hidden_sizes": [8],
}
THREE = EnvSpec(n_features=6, n_actions=3, low=[-1.0] * 3, high=[1.0] * 3, n_agents=3)
"""Three agents with two numbers as their observation and one as their action."""
CRITICS = ("centralized", "independent")


def build(**changes: Any) -> Any:
    config = MultiAgent(**SMALL | changes)
    return build_trainer(config, spaces.inspect_env(*config.gym_environments), 0)


def learner(critic: str, **changes: Any) -> Learner:
    config = MultiAgent(**SMALL | {"critic": critic, "hidden_sizes": [5]} | changes)
    torch.manual_seed(0)
    built = Learner(config, THREE).double()
    with torch.no_grad():  # targets, policies and critics that all differ
        for weight in built.parameters():
            weight.normal_(std=0.7)
    return built


def batch(n: int = 4) -> Steps:
    random = torch.Generator().manual_seed(1)
    sizes = ((n, 3, 2), (n, 3, 1), (n, 3), (n, 3, 2))
    columns = [torch.randn(size, generator=random, dtype=torch.float64) for size in sizes]
    return Steps(*columns, torch.arange(n) == 1)


# Losses and gradients -----------------------------------------------------------------------------


def forward(networks: Any, agent: int, vector: np.ndarray) -> np.ndarray:
    """One agent's network on one vector, from its weights."""
    state = networks.state_dict()
    for layer in (0, 2):
        weight, bias = (state[f"{layer}.{name}"][agent].numpy() for name in ("weight", "bias"))
        vector = vector @ weight + bias[0]
        vector = np.maximum(vector, 0) if layer == 0 else vector
    return vector


def value(critics: Any, kind: str, agent: int, seen: np.ndarray, acted: np.ndarray) -> float:
    """Q of an agent; ``seen`` ``[3, 2]`` and ``acted`` ``[3, 1]`` are those of all agents."""
    if kind == "centralized":
        return forward(critics, agent, np.concatenate([seen.ravel(), acted.ravel()])).item()
    return forward(critics, agent, np.concatenate([seen[agent], acted[agent]])).item()


def expected_losses(built: Learner, steps: Steps, kind: str, gamma: float) -> dict[str, float]:
    policies, critics = built.trained["policy_loss"], built.trained["value_loss"]
    policy_loss = value_loss = 0.0
    for row in range(len(steps.rewards)):
        seen, acted, rewards, following, ended = (column[row].numpy() for column in steps)
        targets = built.targets["policy_loss"]
        next_acted = np.stack([np.tanh(forward(targets, i, following[i])) for i in range(3)])
        for agent in range(3):
            target = rewards[agent]
            if not ended:
                next_critics = built.targets["value_loss"]
                target = target + gamma * value(next_critics, kind, agent, following, next_acted)
            value_loss += (value(critics, kind, agent, seen, acted) - target) ** 2
            before_tanh = forward(policies, agent, seen[agent])
            changed = acted.copy()
            changed[agent] = np.tanh(before_tanh)
            policy_loss -= value(critics, kind, agent, seen, changed)
            policy_loss += 1e-3 * float(before_tanh[0]) ** 2
    n = len(steps.rewards)
    return {"policy_loss": policy_loss / n, "value_loss": value_loss / n}


@pytest.mark.parametrize("kind", CRITICS)
def test_the_losses_are_those_of_a_loop_over_agents_and_steps(kind: str) -> None:
    built, steps = learner(kind, gamma=0.8), batch()
    losses = {name: float(loss.detach()) for name, loss in built.losses(steps).items()}
    assert losses == pytest.approx(expected_losses(built, steps, kind, 0.8), rel=1e-9)


@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_an_update_follows_the_gradient_of_the_loss_of_each_network(kind: str, name: str) -> None:
    built, steps = learner(kind, gamma=0.8, tau=0.25), batch()
    before = copy.deepcopy(built)
    built.update(steps)
    for key, weight in before.trained[name].named_parameters():
        gradient = dict(built.trained[name].named_parameters())[key].grad
        assert gradient is not None
        flat = weight.data.view(-1)
        for place in {0, len(flat) // 2, len(flat) - 1}:
            sides = []
            for change in (1e-5, -2e-5):
                flat[place] += change
                sides.append(expected_losses(before, steps, kind, 0.8)[name])
            flat[place] += 1e-5
            difference = (sides[0] - sides[1]) / 2e-5
            assert float(gradient.view(-1)[place]) == pytest.approx(difference, abs=1e-6), key
    # The first step of Adam is the learning rate against the sign of the gradient.
    for key, weight in before.trained[name].named_parameters():
        after = dict(built.trained[name].named_parameters())[key]
        assert after.grad is not None
        assert_close(after.detach(), weight.detach() - 0.01 * after.grad.sign(), atol=1e-4, rtol=0)
        target = before.targets[name].state_dict()[key]
        moved = built.targets[name].state_dict()[key]
        assert_close(moved, target + 0.25 * (after.detach() - target))


def test_only_a_centralized_critic_reads_the_actions_and_observations_of_others() -> None:
    for kind in CRITICS:
        built, steps = learner(kind), batch()
        inputs = [column.clone().requires_grad_() for column in (steps.observations, steps.actions)]
        values = built.critics(built.seen_by_critics(inputs[0], inputs[1], inputs[1]))
        for gradient in torch.autograd.grad(values[:, 0].sum(), inputs):
            read = gradient.abs().sum((0, 2)) > 0
            assert read.tolist() == [True, kind == "centralized", kind == "centralized"]


def test_an_agent_acts_on_its_own_observation_only() -> None:
    body = learner("centralized").policy.body
    jacobian = torch.autograd.functional.jacobian(body, torch.randn(1, 6).double())[0, :, 0]
    assert ((jacobian != 0).view(3, 3, 2).all(-1) == torch.eye(3, dtype=torch.bool)).all()


# The environment ----------------------------------------------------------------------------------


def test_an_environment_of_all_agents_is_that_of_pettingzoo() -> None:
    env: Any = gymnasium.make(ID, **SPREAD)
    reference = simple_spread_v3.parallel_env(continuous_actions=True)
    observation, _ = env.reset(seed=3)
    expected, _ = reference.reset(seed=3)
    random = np.random.default_rng(0)
    for step in range(25):
        np.testing.assert_array_equal(observation, np.concatenate([*expected.values()]))
        actions = random.random((3, 5), dtype=np.float32)
        observation, reward, terminated, truncated, info = env.step(actions.ravel())
        expected, rewards, *_ = reference.step(dict(zip(reference.agents, actions, strict=True)))
        assert info["agent_rewards"].tolist() == pytest.approx([*rewards.values()])
        assert reward == pytest.approx(sum(rewards.values()) / 3)
        assert (terminated, truncated) == (False, step == 24)


def test_the_replay_buffer_has_the_steps_of_all_agents() -> None:
    options = {"module": "helpers.agents", "stakes": 2.0}
    trainer = build(environment_options=options, buffer_size=20, learning_starts=30, steps=60)
    for _ in range(29):
        trainer.train_step()
    assert trainer.steps == 29
    signs, actions = trainer.buffer.observations[..., 0], trainer.buffer.actions[..., 0]
    # Actions from -2 to 1, of which the signs ask for a half.
    errors = (-2 + 3 * (actions + 1) / 2 - signs / 2).square().sum(1)
    rewards = (2 * signs.prod(1) - errors)[:, None].expand(-1, 2)
    assert_close(trainer.buffer.rewards, rewards)
    assert trainer.buffer.terminated.all()
    assert len(trainer.recent_returns) == 29
    assert trainer.recent_returns[-1] == pytest.approx(float(trainer.buffer.rewards[28 % 20, 0]))


def test_time_limits_are_not_terminal() -> None:
    trainer = build(steps=60)
    while trainer.steps < 26:
        trainer.train_step()
    assert not trainer.buffer.terminated.any()
    first, last = trainer.buffer.observations[25], trainer.buffer.next_observations[24]
    assert not torch.equal(first, last)  # that of the next episode
    assert torch.equal(trainer.buffer.next_observations[23], trainer.buffer.observations[24])


# The trainer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_a_restored_trainer_reaches_the_same_weights(critic: str) -> None:
    whole = build(critic=critic)
    while whole.steps < 63:  # after updates, within an episode, with a full buffer
        whole.train_step()
    file = io.BytesIO()
    torch.save(whole.state(), file)
    resumed = build(critic=critic)
    file.seek(0)
    resumed.restore(torch.load(file, weights_only=True))
    assert len(whole.env.actions) == 13
    while not whole.done:
        whole.train_step()
        resumed.train_step()
    weights = resumed.learner.state_dict()
    for name, weight in whole.learner.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    for key in ("steps", "return", "value_loss", "episodes"):
        assert [p.get(key) for p in whole.curve] == [p.get(key) for p in resumed.curve], key
    assert whole.curve[-1]["value_loss"] > 0
    assert all(a["steps"] < b["steps"] for a, b in pairwise(whole.curve))


def test_the_saved_policy_plays(tmp_path: Any, capsys: Any) -> None:
    trainer = build(environment_options=SPREAD | {"max_cycles": 4})
    spec = spaces.inspect_env(*trainer.config.gym_environments)
    policy_files.describe(tmp_path, trainer.config, spec)
    policy_files.save(policy_files.policy_file(tmp_path, 0), trainer.policy, trainer.critic, None)
    loaded = policy_files.load(tmp_path, 0)
    observations = torch.from_numpy(Environments(ID, SPREAD, 2).reset(0))
    assert torch.equal(loaded.policy.body(observations), trainer.policy.body(observations))
    place = loaded.environment, loaded.options
    returns, _ = evaluate(loaded.policy, *place, statistics=None, episodes=3, seed=0)
    assert (returns < 0).all()
    play(tmp_path, gif=tmp_path / "agents.gif", episodes=1, seed=0)
    with Image.open(tmp_path / "agents.gif") as gif:
        assert (gif.size, gif.n_frames > 1) == ((700, 700), True)
    assert "5 frames" in capsys.readouterr().out  # before each of four actions, and at the end


@pytest.mark.slow
def test_a_centralized_critic_explains_what_an_independent_one_takes_for_noise() -> None:
    errors = {}
    signs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    for critic in CRITICS:
        trainer = build(
            critic=critic,
            environment_options={"module": "helpers.agents", "stakes": 4.0},
            steps=2500,
            learning_starts=500,
            train_every=2,
            buffer_size=2500,
            batch_size=64,
            hidden_sizes=[32],
        )
        while not trainer.done:
            trainer.train_step()
        actions = -2 + 3 * (trainer.policy.body(signs).tanh() + 1) / 2
        errors[critic] = float((actions - signs / 2).square().mean().detach())
    # At first, actions are about -1/2: the errors are 0 and 1, their mean is 0.5.
    assert errors["centralized"] < 0.02
    assert errors["independent"] > 0.05


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "mpe2.simple_spread_v3"}, r"actions Discrete\(5\); expected a Box"),
        ({"module": "mpe2.simple_sprad_v3"}, "No module named 'mpe2.simple_sprad_v3'"),
        ({"module": -1}, "`module` must be a text, such as mpe2.simple_spread_v3, got -1"),
        ({"module": "helpers"}, "AttributeError: module 'helpers' has no att"),
        ({"module": "helpers.agents", "sizes": (1, 2)}, "left has observations .*, but right has"),
        ({"module": "helpers.agents", "stakes": -1}, "AssertionError: stakes must not be neg"),
        ({"module": "helpers.agents", "stake": 1}, "TypeError: .*stake"),
        ({}, "missing 1 required .* 'module'"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(options: Any, message: str) -> None:
    with pytest.raises(spaces.UnfitError, match=rf"does not accept .*{message}") as error:
        spaces.inspect_env(GymEnvironment(ID, options, needs=("several agents",)))
    assert error.value.key == "environment_options"
    assert "\n" not in str(error.value)


def test_the_number_of_agents_is_that_of_the_algorithm() -> None:
    needs = MultiAgent(**SMALL).gym_environments[0].needs
    message = "Pendulum-v1 has one agent, but the algorithm needs several agents"
    with pytest.raises(spaces.UnfitError, match=message):
        spaces.inspect_env(GymEnvironment("Pendulum-v1", {}, needs=needs))
    several = PolicyGradient(environment=ID, environment_options=SPREAD, steps=9)
    message = r"has 3 agents, but the algorithm trains one; .* set `algorithm: maddpg`"
    with pytest.raises(spaces.UnfitError, match=message):
        spaces.inspect_env(*several.gym_environments)


def test_the_recipe_names_a_module_and_learns() -> None:
    with pytest.raises(ValidationError, match=r"`environment_options.module` must be .* got 3"):
        MultiAgent(**SMALL | {"environment_options": {"module": 3}})
    with pytest.raises(ValidationError, match=r"`learning_starts` \(120\) must be less than"):
        MultiAgent(**SMALL | {"learning_starts": 120})


def test_a_missing_extra_is_one_line(launch: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "mpe2", None)
    text = (
        f"stages: {{control: {{environment: '{ID}', algorithm: maddpg, steps: 2000, "
        "environment_options: {module: mpe2.simple_spread_v3, continuous_actions: true}}}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    ended = launch("recipe.yaml")
    assert ended.code == 2
    lines = [line for line in ended.err.splitlines() if "multi-agent" in line]
    assert len(lines) == 1, ended.err
    assert "needs more packages: pip install -e '.[multi-agent]'" in lines[0]
