"""A limit on costs: the Lagrangian by hand, the icy road, and its best policy in closed form."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from align import load_recipe, run
from align.config.control.policy_gradient import PolicyGradient
from align.control import policy_files, spaces
from align.control.environments import Environments
from align.control.evaluate import evaluate
from align.control.icy_road import DRY, ICY, SECTIONS, IcyRoad
from align.control.networks import Policy
from align.control.policy_gradient import PolicyGradientTrainer
from align.errors import UserError
from align.functional import ascended_multiplier, penalized_advantages

ROAD = "align.control.icy_road:IcyRoad-v0"
RECIPE = Path(__file__).parents[2] / "recipes" / "control" / "icy_road.yaml"


class Optimum(NamedTuple):
    """The best policy under a limit on the expected cost of an episode."""

    speed_per_grip: float
    """Its speed on a section, divided by the grip."""
    expected_return: float
    multiplier: float
    """By how much the expected return rises with the limit."""


def optimum(limit: float) -> Optimum:
    """The best policy whose expected cost is at most ``limit``.

    With a multiplier, each section has the Lagrangian ``speed - multiplier * speed**2 / grip``,
    which is greatest at ``speed = grip / (2 * multiplier)``. The expected cost is then ``grips / (4
    * multiplier**2)``, where ``grips`` is the expected sum of the grips, and equals the limit.

    Raises:
        ValueError: The limit is so high that it would ask for a speed above 1.
    """
    grips = SECTIONS * (DRY + ICY) / 2
    multiplier = math.sqrt(grips / limit) / 2
    if 1 / (2 * multiplier) > 1:
        raise ValueError(f"the limit {limit} allows a speed above 1 on a dry section")
    return Optimum(1 / (2 * multiplier), grips / (2 * multiplier), multiplier)


class Toll(gymnasium.Env[Any, Any]):
    """Five steps with the reward 1; step t costs ``factor``, and a reset reports a cost of 100.

    With ``factor`` None, the third step has no cost.
    """

    def __init__(self, factor: float | None = 2.0) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.factor = factor

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {"cost": 100.0}

    def step(self, action: Any) -> Any:
        self.time += 1
        info = {"cost": self.factor or 0.0}
        if self.factor is None and self.time == 3:
            info = {}
        return np.full(1, self.time, np.float32), 1.0, self.time == 5, False, info


@pytest.fixture(autouse=True)
def toll() -> Iterator[None]:
    gymnasium.register("Toll-v0", Toll, max_episode_steps=9)
    yield
    del gymnasium.registry["Toll-v0"]


def build(**changes: Any) -> PolicyGradientTrainer:
    settings: dict[str, Any] = {
        "environment": "Toll-v0",
        "steps": 120,
        "n_envs": 3,
        "n_steps": 8,
        "gamma": 0.9,
        "gae_lambda": 0.7,
        "schedule": "constant",
        "normalize_advantages": False,
        "hidden_sizes": [8],
        "minibatches": 2,
        "cost_limit": 4.0,
        "multiplier_learning_rate": 0.05,
    }
    config = PolicyGradient(**settings | changes)
    return PolicyGradientTrainer(config, spaces.inspect_env(*config.gym_environments), 0)


# The Lagrangian -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("multiplier", "cost", "expected"),
    [
        pytest.param(0.5, 7.0, 1.0, id="above the limit: 0.5 + 0.25 * (7 - 5)"),
        pytest.param(1.5, 3.0, 1.0, id="below the limit: 1.5 + 0.25 * (3 - 5)"),
        pytest.param(0.25, 3.0, 0.0, id="never negative: 0.25 + 0.25 * (3 - 5) < 0"),
    ],
)
def test_the_multiplier_by_hand(multiplier: float, cost: float, expected: float) -> None:
    ascended = ascended_multiplier(multiplier, cost=cost, limit=5.0, learning_rate=0.25)
    assert ascended == pytest.approx(expected)


def test_penalized_advantages_have_the_gradient_of_the_lagrangian() -> None:
    # One state, three actions: the gradient of J - m * C by autograd, against the policy gradient
    # with penalized advantages, times 1 + m.
    multiplier = 1.5
    rewards, costs = torch.tensor([1.0, 3.0, -2.0]), torch.tensor([0.5, 4.0, 1.0])
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    probabilities = logits.softmax(-1)
    lagrangian = (probabilities * rewards).sum() - multiplier * (probabilities * costs).sum()
    (expected,) = torch.autograd.grad(lagrangian, logits, retain_graph=True)
    fixed = probabilities.detach()
    advantages = penalized_advantages(
        rewards - (fixed * rewards).sum(), costs - (fixed * costs).sum(), multiplier=multiplier
    )
    surrogate = (fixed * advantages * logits.log_softmax(-1)).sum()
    (gradient,) = torch.autograd.grad(surrogate, logits)
    assert_close(gradient * (1 + multiplier), expected)


# Costs of environments ----------------------------------------------------------------------------


def test_costs_are_those_of_steps_and_not_of_resets() -> None:
    environments = Environments("Toll-v0", {}, 2)
    environments.reset(0)
    sums = []
    for _ in range(11):
        step = environments.step(np.zeros(2, np.int64))
        assert step.costs.tolist() == [2.0, 2.0]
        sums += step.episode_costs.tolist()
    assert sums == [10.0] * 4  # two episodes of five steps in each environment


def test_environments_without_costs_have_none() -> None:
    environments = Environments("Pendulum-v1", {"max_episode_steps": 2}, 2)
    environments.reset(0)
    steps = [environments.step(np.zeros((2, 1), np.float32)) for _ in range(2)]
    assert all(np.isnan(step.costs).all() for step in steps)
    assert np.isnan(steps[1].episode_costs).tolist() == [True, True]


def test_a_step_without_a_cost_ends_the_run() -> None:
    trainer = build(environment_options={"factor": None})
    with pytest.raises(UserError, match="a step of Toll-v0 has no `cost` in `info`"):
        trainer.train_step()


# The update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # An episode costs 5 * 2 = 10. The first update: 0.05 * (10 - 4) = 0.3.
        pytest.param("constant", [0.3, 0.6, 0.9], id="the same step in each update"),
        # Before the second and the third update, 24 and 48 of 120 steps are taken.
        pytest.param("linear", [0.3, 0.3 + 0.3 * 0.8, 0.3 + 0.3 * 1.4], id="smaller steps"),
    ],
)
def test_the_multiplier_follows_the_costs_of_episodes(schedule: str, expected: list[float]) -> None:
    trainer = build(schedule=schedule)
    points = [trainer.train_step() for _ in range(3)]
    assert [point["multiplier"] for point in points] == pytest.approx(expected)
    assert [point["cost"] for point in points] == [10.0] * 3


def test_the_damping_weighs_costs_in_one_update_only() -> None:
    # Above the limit by 6: 0.3 after the first update, and 0.3 + 0.5 * 6 for that update alone.
    trainer = build(multiplier_damping=0.5)
    assert trainer.constraint is not None
    trainer.train_step()
    assert trainer.constraint.multiplier == pytest.approx(0.3)
    assert trainer.constraint.weight == pytest.approx(3.3)
    # Below the limit by 10: 0.6 - 0.5 * 10 < 0.
    trainer = build(multiplier_damping=0.5, cost_limit=20.0)
    assert trainer.constraint is not None
    trainer.constraint.multiplier = 1.1
    trainer.train_step()
    assert trainer.constraint.multiplier == pytest.approx(0.6)
    assert trainer.constraint.weight == 0.0


def test_without_an_ended_episode_the_multiplier_stays() -> None:
    trainer = build(n_steps=4)
    assert trainer.train_step() | {"cost": None, "multiplier": 0.0} == trainer.curve[0]
    assert trainer.train_step()["multiplier"] == pytest.approx(0.3)


def test_the_advantages_of_a_rollout_are_those_of_the_lagrangian() -> None:
    # Costs are twice the rewards and have twice their values: so have their advantages, and the
    # Lagrangian with the multiplier 3 has (1 - 3 * 2) / (1 + 3) times the advantages of rewards.
    trainer = build()
    assert trainer.constraint is not None
    assert trainer.critic is not None
    trainer.constraint.critic.load_state_dict(trainer.critic.state_dict())
    last: Any = trainer.constraint.critic[-1]
    with torch.no_grad():
        last.weight.mul_(2)
        last.bias.mul_(2)
    experience = trainer.collect()
    penalized = []
    for trainer.constraint.weight in (0.0, 3.0):
        penalized.append(trainer.make_rollout(experience))
    assert_close(penalized[1].advantages, penalized[0].advantages * -1.25)
    assert penalized[0].advantages.abs().min() > 0.01
    assert penalized[1].returns is not None
    assert penalized[0].returns is not None
    assert torch.equal(penalized[1].returns, penalized[0].returns)  # those of the rewards


def test_the_critic_of_costs_learns_their_discounted_sums() -> None:
    trainer = build(n_envs=1, n_steps=10, hidden_sizes=[32])
    assert trainer.constraint is not None
    experience = trainer.collect()  # two episodes
    for _ in range(60):
        trainer.constraint.fit(experience, trainer.objective, learning_rate=1e-2)
    with torch.no_grad():
        values = trainer.constraint.critic(torch.arange(5.0)[:, None])[:, 0]
    expected = [2 * sum(0.9**k for k in range(5 - time)) for time in range(5)]
    assert_close(values, torch.tensor(expected), atol=0.3, rtol=0)


# The icy road -------------------------------------------------------------------------------------


def test_an_action_has_its_effects_on_the_next_section() -> None:
    env = IcyRoad()
    observation, _ = env.reset(seed=0)
    grips = [*env.grips[:SECTIONS]]
    assert {*grips} == {DRY, ICY}
    assert observation.tolist() == pytest.approx([0.0, DRY, grips[0], 1.0])
    rewards, costs, ended = [], [], False
    for time in itertools.count():
        assert not ended
        observation, reward, ended, truncated, info = env.step(np.array([(time % 3) / 2]))
        rewards.append(reward)
        costs.append(info["cost"])
        assert not truncated
        if ended:
            break
        following = grips[time + 1] if time + 1 < SECTIONS else DRY
        ahead = (SECTIONS - time - 1) / SECTIONS
        assert observation.tolist() == pytest.approx(
            [(time % 3) / 2, grips[time], following, ahead]
        )
    speeds = [(time % 3) / 2 for time in range(SECTIONS)]
    assert rewards == pytest.approx([0.0, *speeds])
    assert costs == pytest.approx([0.0, *(v * v / g for v, g in zip(speeds, grips, strict=True))])


def test_speeds_outside_the_bounds_are_clipped() -> None:
    env = IcyRoad()
    env.reset(seed=0)
    env.step(np.array([7.0]))
    assert env.step(np.array([-7.0]))[1] == 1.0
    assert env.step(np.array([0.0]))[1] == 0.0


def test_the_optimum_is_the_best_of_all_speeds() -> None:
    limit = 5.0
    best = optimum(limit)
    dry, icy = np.meshgrid(np.linspace(0, 1, 2001), np.linspace(0, 1, 2001))
    returns = SECTIONS * (dry + icy) / 2
    costs = SECTIONS * (dry**2 / DRY + icy**2 / ICY) / 2
    within = np.where(costs <= limit, returns, -1.0)
    index = np.unravel_index(within.argmax(), within.shape)
    assert within[index] == pytest.approx(best.expected_return, abs=0.01)
    assert dry[index] == pytest.approx(best.speed_per_grip * DRY, abs=0.01)
    assert icy[index] == pytest.approx(best.speed_per_grip * ICY, abs=0.01)
    rise = optimum(limit + 1e-4).expected_return - optimum(limit - 1e-4).expected_return
    assert best.multiplier == pytest.approx(rise / 2e-4, rel=1e-6)


def test_the_best_policy_has_the_return_and_the_cost_of_the_closed_form() -> None:
    best = optimum(5.0)
    policy = Policy(spaces.EnvSpec(4, 1, [0.0], [1.0]), hidden_sizes=[], activation="tanh", distribution=None)  # fmt: skip
    with torch.no_grad():
        policy.body[0].weight.copy_(torch.tensor([[0.0, 0.0, best.speed_per_grip, 0.0]]))
    returns, costs = evaluate(policy, ROAD, {}, statistics=None, episodes=400, seed=0)
    error = 4 / math.sqrt(400)
    assert float(returns.mean()) == pytest.approx(
        best.expected_return, abs=error * float(returns.std())
    )
    assert float(costs.mean()) == pytest.approx(5.0, abs=error * float(costs.std()))


def test_a_limit_that_no_policy_reaches_has_no_closed_form() -> None:
    assert optimum(12.5).speed_per_grip == pytest.approx(1.0)
    with pytest.raises(ValueError, match="allows a speed above 1"):
        optimum(12.6)


def test_the_road_is_rendered(tmp_path: Path) -> None:
    trainer = build(environment=ROAD)
    policy_files.describe(
        tmp_path, trainer.config, spaces.inspect_env(*trainer.config.gym_environments)
    )
    policy_files.save(policy_files.policy_file(tmp_path, 0), trainer.policy, None, None)
    loaded = policy_files.load(tmp_path, 0)
    frames = [*policy_files.play_episodes(loaded, render_mode="rgb_array", episodes=1, seed=0)]
    assert len(frames) == SECTIONS + 2
    assert frames[0].image.shape == (50, 200, 3)
    assert any((frames[0].image != frame.image).any() for frame in frames[1:])


@pytest.mark.slow
def test_the_recipe_comes_close_to_the_best_policy_within_the_limit(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, overrides=["limited.seeds=[0]", "unlimited.seeds=[0]"])
    results = run(recipe, runs=tmp_path)
    (limited,) = results["limited"].metrics["control"]
    (unlimited,) = results["unlimited"].metrics["control"]
    best = optimum(5.0)
    assert limited["mean_cost"] < 5.0
    assert limited["mean_return"] > 0.96 * best.expected_return
    curve = json.loads((Path(results["limited"].folder) / "curve-0.json").read_text())["curve"]
    assert curve[-1]["multiplier"] == pytest.approx(best.multiplier, rel=0.1)
    assert unlimited["mean_return"] > 19.9
    assert unlimited["mean_cost"] > 45
