"""Control's parts: environments in step, distributions, estimates, statistics, and what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from numpy.testing import assert_allclose, assert_array_equal
from torch.testing import assert_close

from align.control import policy_files, spaces, trainer
from align.control.environments import CLIP, Environments
from align.control.networks import Categorical, Gaussian, Policy, SquashedGaussian, critic
from align.control.spaces import EnvSpec
from align.control.trainer import Plan, PolicyGradientTrainer, derive_seed, evaluate
from align.functional import masked
from align.rl.update import Objective

PLAIN = EnvSpec(features=2, actions=2, low=None, high=None)
BOX = EnvSpec(features=2, actions=2, low=[-2.0, 0.0], high=[3.0, 1.0])


class Counting(gymnasium.Env):
    """Shows how many steps its episode has had, and which episode it is; pays what it is told to. Ends after ``length``."""

    steps: ClassVar[int] = 0  # of all of them

    def __init__(self, length: int = 5, ends: bool = True, pay: float = 1.0, shown: float = 1.0):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.length, self.ends, self.pay, self.shown = length, ends, pay, shown
        self.time, self.episode = 0, -1

    def seen(self) -> np.ndarray:
        return self.shown * np.array([self.time, self.episode], dtype=np.float64)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        Counting.steps += 1
        self.time += 1
        return self.seen(), self.pay, self.ends and self.time == self.length, False, {}


@pytest.fixture(autouse=True)
def counting() -> Iterator[None]:
    """Counting-v0 is cut by nothing, CountingCut-v0 after 5 steps, Forever-v0 after 20 and shows nothing that changes."""
    Counting.steps = 0
    torch.manual_seed(0)
    never = {"ends": False}
    gymnasium.register("Counting-v0", Counting)
    gymnasium.register("CountingCut-v0", Counting, max_episode_steps=5, kwargs=never)
    gymnasium.register("Forever-v0", Counting, max_episode_steps=20, kwargs=never | {"shown": 0.0})
    yield
    for name in ("Counting-v0", "CountingCut-v0", "Forever-v0"):
        del gymnasium.registry[name]


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "environment": "Counting-v0", "options": {}, "envs": 3, "steps": 120, "stretch": 8,
        "baseline": "value", "gamma": 0.9, "lam": 0.7, "objective": Objective(),
        "learning_rate": 1e-2, "value_learning_rate": 1e-2, "schedule": "constant", "hidden": (8,),
        "activation": "tanh", "distribution": None, "normalize_observations": False,
        "normalize_rewards": False,
    }  # fmt: skip
    return Plan(**given | changes)


def learner(seed: int = 0, **changes: Any) -> PolicyGradientTrainer:
    told = plan(**changes)
    return PolicyGradientTrainer(
        told, spaces.inspect_env(told.environment, told.options, told.distribution), seed
    )


def train(one: PolicyGradientTrainer) -> PolicyGradientTrainer:
    while not one.done:
        one.advance()
    return one


# Environments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "terminated"), [("Counting-v0", True), ("CountingCut-v0", False)])
def test_every_step_is_a_step_of_the_world_and_the_final_observation_comes_beside_it(
    name, terminated
):
    environments = Environments(name, {}, 2)
    assert_array_equal(environments.fresh(0), [[0, 0], [0, 0]])
    for time in range(1, 13):
        step = environments.step(np.zeros(2, dtype=np.int64))
        end = time % 5 == 0
        assert_array_equal(step.observations, [[time % 5, time // 5]] * 2)
        assert_array_equal(step.rewards, [1, 1])  # a phantom step would pay 0
        assert step.ended.tolist() == [end, end]
        assert step.terminated.tolist() == [end and terminated] * 2
        assert step.finals.tolist() == ([[5, time // 5 - 1]] * 2 if end else [])
        assert step.returns.tolist() == ([5, 5] if end else [])
    assert Counting.steps == 2 * 12


def test_carts_in_one_array_are_cut_and_reset_in_the_step_that_ends_their_episode():
    environments = Environments("CartPole-v1", {"max_episode_steps": 12}, 16)
    before = environments.fresh(1)
    generator = np.random.default_rng(0)
    since = np.zeros(16)
    seen = {"terminated": 0, "cut": 0}
    for _ in range(200):
        step = environments.step(generator.integers(2, size=16))
        since += 1
        assert (step.rewards == 1).all()
        assert_array_equal(step.returns, since[step.ended])
        beyond = (abs(step.finals[:, 0]) > 2.4) | (abs(step.finals[:, 2]) > 12 * math.pi / 180)
        assert_array_equal(beyond, step.terminated[step.ended])
        assert (since[step.ended & ~step.terminated] == 12).all()
        assert (abs(step.observations[step.ended]) <= 0.05).all()
        assert (since <= 12).all()
        seen["terminated"] += int(step.terminated.sum())
        seen["cut"] += int((step.ended & ~step.terminated).sum())
        since[step.ended] = 0
        before = step.observations
    assert before.dtype == np.float32
    assert min(seen.values()) > 10


def test_carts_in_one_array_move_as_gymnasiums_single_cart_does():
    environments = Environments("CartPole-v1", {}, 4)
    before = environments.fresh(3)
    single: Any = gymnasium.make("CartPole-v1").unwrapped
    single.reset()
    generator = np.random.default_rng(1)
    for _ in range(60):
        actions = generator.integers(2, size=4)
        step = environments.step(actions)
        after = step.observations.copy()
        after[step.ended] = step.finals
        for cart in range(4):
            single.state, single.steps_beyond_terminated = before[cart].astype(np.float64), None
            moved, _, terminated, _, _ = single.step(actions[cart])
            assert_allclose(after[cart], moved, rtol=1e-5, atol=1e-6)
            assert terminated == step.terminated[cart]
        before = step.observations


def test_observations_are_normalised_by_all_that_was_seen_and_finals_by_the_same():
    statistics = RunningMeanStd(shape=(2,))
    environments = Environments("Counting-v0", {"length": 3}, 2, statistics=statistics)
    environments.fresh(0)
    for _ in range(2):
        environments.step(np.zeros(2, dtype=np.int64))
    step = environments.step(np.zeros(2, dtype=np.int64))
    # Seen first: times 0, 1, 2, 0 of episodes 0, 0, 0, 1, twice each; 1e-4 counts of mean 0 and variance 1 come before.
    seen = np.array([[0, 0], [1, 0], [2, 0], [0, 1]])
    assert_allclose(statistics.mean, seen.mean(0), rtol=1e-4)
    assert_allclose(statistics.var, seen.var(0), rtol=1e-3)
    assert_allclose(step.observations[0], ([0, 1] - seen.mean(0)) / seen.std(0), rtol=1e-3)
    assert_allclose(step.finals[1], ([3, 0] - seen.mean(0)) / seen.std(0), rtol=1e-3)


def test_normalised_observations_are_bounded():
    statistics = RunningMeanStd(shape=(2,))
    environments = Environments("Counting-v0", {"length": 500}, 1, statistics=statistics)
    environments.fresh(0)
    statistics.mean[:], statistics.count = -1e6, 1e12
    assert_array_equal(environments.step(np.zeros(1, dtype=np.int64)).observations, [[CLIP, CLIP]])


def test_scaled_rewards_are_told_apart_from_returns():
    environments = Environments("Counting-v0", {"pay": 50.0}, 4, reward_gamma=0.9)
    environments.fresh(0)
    steps = [environments.step(np.zeros(4, dtype=np.int64)) for _ in range(50)]
    # Discounted sums within an episode: 50, 95, 135.5, 171.95, 204.755 (the last one is 50 in Gymnasium, which
    # forgets what came before a step that terminates).
    sums = np.array([50, 95, 135.5, 171.95, 50])
    assert_allclose(steps[-1].rewards, 50 / sums.std(), rtol=0.02)
    assert {r for step in steps for r in step.returns} == {250.0}


@pytest.mark.parametrize("passed", [0, 7, 40])
def test_an_environment_comes_to_the_same_point_again(passed):
    def new() -> Environments:
        statistics = RunningMeanStd(shape=(4,))
        return Environments("CartPole-v1", {}, 4, statistics=statistics, reward_gamma=0.9)

    actions = np.random.default_rng(0).integers(2, size=(100, 4))
    one, other = new(), new()
    one.fresh(9)
    one.step(actions[0])
    here = one.fresh(4)  # the statistics have seen more than what follows
    for taken in actions[:passed]:
        here = one.step(taken).observations
    state = one.state()
    assert len(state["actions"]) == passed
    again = other.restore(state)
    if passed:
        assert_array_equal(scaled(here, one), scaled(again, other))
    for taken in actions[passed:]:
        for a, b in zip(one.step(taken), other.step(taken), strict=True):
            assert_array_equal(a, b)


def scaled(observations: Any, environments: Environments) -> Any:
    """What was seen last, by the statistics as they are now."""
    return environments.step(np.ones(4, dtype=np.int64)).observations


def test_mujoco_is_quiet_about_gymnasiums_models_and_heard_otherwise(tmp_path, monkeypatch, capfd):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    Environments("HalfCheetah-v5", {}, 1).close()
    assert capfd.readouterr().err == ""
    mujoco.get_mju_user_warning()("Nan in QACC")
    assert "MuJoCo: Nan in QACC" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Distributions --------------------------------------------------------------------------------------------------------


def test_a_categorical_is_torchs():
    head, logits = Categorical(PLAIN), torch.randn(7, 3)
    actions = torch.randint(3, (7,))
    other = torch.distributions.Categorical(logits=logits)
    assert_close(head.logps(logits, actions), other.log_prob(actions))
    assert_close(head.entropy(logits), other.entropy())
    assert head.act(logits, 0.0).tolist() == logits.argmax(-1).tolist()


def test_gumbel_noise_samples_a_categorical():
    head = Categorical(EnvSpec(2, 3, None, None))
    logits = torch.tensor([1.0, 0.0, -1.0])
    noise = head.noise(40_000, generator=torch.Generator().manual_seed(0))
    shares = head.act(logits, noise).bincount().double() / 40_000
    expected = logits.softmax(-1).double()
    error = (expected * (1 - expected) / 40_000).sqrt()
    assert ((shares - expected).abs() < 4 * error).all()


def test_a_gaussian_is_torchs_and_the_world_gets_it_within_its_bounds():
    head, means = Gaussian(BOX), torch.randn(7, 2)
    torch.nn.init.normal_(head.log_std)
    noise = head.noise(7, generator=torch.Generator().manual_seed(0))
    actions = head.act(means, noise)
    other = torch.distributions.Normal(means, head.log_std.exp())
    assert_close(actions, other.loc + other.scale * noise)
    assert_close(head.logps(means, actions), other.log_prob(actions).sum(-1))
    assert_close(head.entropy(means), other.entropy().sum(-1))
    assert_close(head.act(means, 0.0), means)
    assert head.to_world(torch.tensor([[-9.0, 0.5], [9.0, 7.0]])).tolist() == [[-2, 0.5], [3, 1]]


def test_a_squashed_gaussian_is_torchs_transformed_one():
    head, means = SquashedGaussian(BOX).double(), torch.randn(7, 2).double()
    torch.nn.init.normal_(head.log_std)
    drawn = head.act(means, head.noise(7, generator=torch.Generator().manual_seed(0))).detach()
    # -2 + 5 (tanh + 1) / 2 = 0.5 + 2.5 tanh and 0 + (tanh + 1) / 2 = 0.5 + 0.5 tanh
    stretch = torch.distributions.AffineTransform(0.5, torch.tensor([2.5, 0.5]).double())
    other = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(means, head.log_std.exp()),
        [torch.distributions.TanhTransform(cache_size=1), stretch],
    )
    taken = stretch(torch.tanh(drawn))
    assert_close(torch.from_numpy(head.to_world(drawn)), taken)
    assert_close(head.logps(means, drawn), other.log_prob(taken).sum(-1))


def test_the_density_of_a_squashed_gaussian_sums_to_one_over_the_box():
    head = SquashedGaussian(EnvSpec(1, 1, [-2.0], [3.0])).double()
    actions = torch.linspace(-2, 3, 200_001, dtype=torch.float64)[1:-1]
    drawn = torch.atanh((actions - 0.5) / 2.5)
    density = head.logps(torch.full_like(drawn, 0.3)[:, None], drawn[:, None]).exp()
    assert_close(torch.trapezoid(density, actions), torch.tensor(1.0).double(), rtol=0, atol=1e-4)


def test_a_saturated_action_keeps_a_finite_density():
    head = SquashedGaussian(BOX)
    logps = head.logps(torch.zeros(2, 2), torch.tensor([[50.0, -50.0], [0.0, 0.0]]))
    assert logps.isfinite().all()


def test_networks_start_orthogonal_with_the_gains_of_the_paper():
    policy = Policy(PLAIN, hidden=[16, 16], activation="tanh", distribution=None)
    value = critic(PLAIN, hidden=[16, 16], activation="relu")
    assert [type(layer).__name__ for layer in value] == ["Linear", "ReLU"] * 2 + ["Linear"]
    for body, last in ((policy.body, 0.01), (value, 1.0)):
        gains = [layer.weight for layer in body if isinstance(layer, torch.nn.Linear)]
        assert_close(gains[1] @ gains[1].T, 2 * torch.eye(16), rtol=1e-4, atol=1e-4)
        rows = len(gains[2])
        assert_close(gains[2] @ gains[2].T, last**2 * torch.eye(rows), rtol=1e-4, atol=1e-6)


# Collecting and estimating --------------------------------------------------------------------------------------------


def expected_rows(
    one: PolicyGradientTrainer, ends: bool, length: int, start: int, steps: int
) -> list[Any]:
    """(value, advantage) of each step of one environment, forward in time; the critic says ``2 * time + 1``."""
    rows = []
    for first in range(start, start + steps):
        total, weight = 0.0, 1.0
        for k in range(first, start + steps):
            time = k % length
            last = time == length - 1
            following = 0.0 if last and ends else 2 * (time + 1) + 1
            total += weight * (1 + one.plan.gamma * following - (2 * time + 1))
            if last:
                break
            weight *= one.plan.gamma * one.plan.lam
        rows.append((2 * (first % length) + 1, total))
    return rows


@pytest.mark.parametrize(("name", "ends"), [("Counting-v0", True), ("CountingCut-v0", False)])
def test_advantages_of_a_stretch_are_those_of_a_sum_over_each_episodes_own_steps(name, ends):
    one = learner(environment=name, hidden=())
    with torch.no_grad():
        one.critic[0].weight.copy_(torch.tensor([[2.0, 0.0]]))
        one.critic[0].bias.fill_(1.0)
    for start in (0, 8):  # the second stretch begins in the middle of an episode
        rollout = one._rollout(*one._collect())
        by_time = expected_rows(one, ends, 5, start, 8)
        expected = torch.tensor([row for row in by_time for _ in range(3)])
        assert_close(rollout.values[:, 0], expected[:, 0])
        assert_close(rollout.advantages[:, 0], expected[:, 1])
        assert_close(rollout.returns, rollout.advantages + rollout.values)
        one.steps += 24


def test_the_ratio_is_one_before_the_first_step():
    one = train(learner(environment="CartPole-v1", steps=64, stretch=16, envs=4))
    rollout = one._rollout(*one._collect())
    with torch.no_grad():
        assert_close(one._evaluate(rollout.inputs).logps, rollout.logps)


def test_whole_episodes_count_the_first_of_each_environment_and_nothing_of_the_next():
    one = learner(environment="CartPole-v1", stretch=None, envs=8, lam=1.0)
    experience, valid = one._collect()
    assert experience.ended.any(0).all()
    assert sorted(experience.returns) == sorted(valid.sum(0).tolist())
    assert len(experience.returns) == 8
    rollout = one._rollout(experience, valid)
    assert len(rollout) == valid.sum()


def test_whole_episodes_begin_anew_in_each_update_and_elsewhere():
    one = learner(environment="CartPole-v1", stretch=None, envs=8, lam=1.0)
    starts = []
    collect = one._collect
    one._collect = lambda: starts.append(collect()) or starts[-1]  # type: ignore[func-returns-value]
    points = [one.advance() for _ in range(3)]
    first = torch.stack([experience.observations[0] for experience, _ in starts])
    assert (first.abs() <= 0.05).all()
    assert len(first.flatten(0, 1).unique(dim=0)) == 3 * 8
    lengths = [sum(experience.returns) for experience, _ in starts]  # a cart is paid 1 for a step
    assert [point["steps"] for point in points] == np.cumsum(lengths).tolist()
    assert [point["episodes"] for point in points] == [8, 8, 8]


def test_environments_are_renewed_before_the_way_back_to_a_state_grows_long(monkeypatch):
    monkeypatch.setattr(trainer, "RESET_INTERVAL", 100)
    one = learner(steps=480, environment="CartPole-v1")
    ways = []
    while not one.done:
        one.advance()
        ways.append(len(one.state()["environments"]["actions"]))
    # Updates of 8 steps in 3 environments: 5 of them pass 100 steps, then 4 (216 after 9), then 4 (312 after 13).
    assert [way // 8 for way in ways[:10]] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 1]


def test_seeds_begin_with_different_weights_and_a_seed_with_the_same():
    weights = [learner(seed).policy.body[0].weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_squashed_policy_needs_bounds():
    class Unbounded(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    gymnasium.register("Unbounded-v0", Unbounded)
    try:
        assert spaces.inspect_env("Unbounded-v0", {}, None).actions == 1
        with pytest.raises(
            spaces.UnfitError, match=r"unbounded actions.*expected gaussian"
        ) as error:
            spaces.inspect_env("Unbounded-v0", {}, "squashed")
        assert error.value.key == "distribution"
    finally:
        del gymnasium.registry["Unbounded-v0"]


def test_without_a_baseline_advantages_are_the_discounted_returns():
    one = learner(stretch=None, baseline="none", lam=1.0)
    rollout = one._rollout(*one._collect())
    # 1 + 0.9 + ... : (1 - 0.9^k) / 0.1 with k steps to go
    expected = torch.tensor([(1 - 0.9**k) / 0.1 for k in (5, 4, 3, 2, 1) for _ in range(3)])
    assert_close(rollout.advantages[:, 0], expected)
    assert rollout.values is rollout.returns is None


def test_steps_are_counted_as_the_worlds_count_them():
    one = train(learner(steps=100))
    assert one.steps == 120  # stretches of 24
    assert Counting.steps == 120
    assert [point["steps"] for point in one.curve] == [24, 48, 72, 96, 120]
    assert [point["episodes"] for point in one.curve] == [3, 6, 3, 6, 6]
    assert {point["return"] for point in one.curve} == {5.0}


def test_reward_one_for_ever_is_worth_one_over_one_minus_gamma_where_a_limit_is_no_end():
    told = {
        "learning_rate": 1e-9,
        "value_learning_rate": 0.1,
        "hidden": (),
        "stretch": 20,
        "envs": 2,
    }
    nothing = torch.zeros(1, 2)

    cut = train(learner(environment="Forever-v0", steps=12_000, lam=0.95, **told))
    assert_close(cut.critic(nothing), torch.tensor([[10.0]]), rtol=0, atol=0.1)  # 1 / (1 - 0.9)

    options = {"length": 20, "ends": True}
    ended = train(learner(environment="Forever-v0", options=options, steps=12_000, lam=1.0, **told))
    # The mean over k = 1 to 20 steps to go of (1 - 0.9^k) / 0.1: 10 - 10 * 0.9 * (1 - 0.9^20) / (0.1 * 20)
    mean = 10 - 10 * 0.9 * (1 - 0.9**20) / (0.1 * 20)
    assert_close(ended.critic(nothing), torch.tensor([[mean]]), rtol=0, atol=0.1)


def test_the_gradients_variance_is_that_of_episodes_gradients_by_hand():
    one = learner(environment="CartPole-v1", stretch=None, hidden=(), lam=1.0, envs=4)
    experience, valid = one._collect()
    found = one._variance(experience, valid)
    with torch.no_grad():
        values, _ = one._values(experience)
        by_name: dict[str, list[torch.Tensor]] = {"with_baseline": [], "without": []}
        for env in range(4):
            times = int(valid[:, env].sum())
            seen = experience.observations[:times, env]
            p = one.policy.body(seen).softmax(-1)
            # The gradient of log p(a) by logits is 1 at a, less p; a linear layer's is that times what it saw.
            by_logits = torch.nn.functional.one_hot(experience.actions[:times, env], 2) - p
            togo = torch.tensor([(1 - 0.9 ** (times - t)) / 0.1 for t in range(times)])
            for name, advantage in (
                ("with_baseline", togo - values[:times, env]),
                ("without", togo),
            ):
                weighed = -by_logits * advantage[:, None]
                by_name[name].append(torch.cat([(weighed.T @ seen).flatten(), weighed.sum(0)]))
    for name, gradients in by_name.items():
        together = torch.stack(gradients).double().numpy()
        assert_allclose(getattr(found, name), np.trace(np.cov(together.T)), rtol=1e-4)


def test_the_learning_rates_fall_on_a_line_to_nothing():
    one = learner(schedule="linear", value_learning_rate=4e-2, steps=96)
    rates = []
    for _ in range(4):
        one.advance()
        rates.append([group["lr"] for group in one.optimizer.param_groups])
    assert_allclose(rates, [[1e-2, 4e-2], [7.5e-3, 3e-2], [5e-3, 2e-2], [2.5e-3, 1e-2]])


# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": Objective(epochs=2, minibatches=3, clip_low=0.2, clip_high=0.2)}, id="ppo"),
        pytest.param({"stretch": None, "lam": 1.0}, id="reinforce"),
        pytest.param({"environment": "Pendulum-v1", "distribution": "squashed"}, id="squashed"),
        pytest.param({"environment": "LunarLander-v3", "steps": 600}, id="a world that cannot be copied"),
        pytest.param({"environment": "HalfCheetah-v5"}, id="a world whose copy is another"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("renewed", [50, 200_000])
def test_a_learner_that_goes_on_from_its_state_is_the_same_to_the_bit(
    changes, renewed, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "RESET_INTERVAL", renewed)
    told = {"environment": "CartPole-v1", "steps": 240, "schedule": "linear"} | changes
    told |= {"normalize_observations": True, "normalize_rewards": True}
    try:
        whole = learner(3, **told)
    except spaces.UnfitError as error:
        pytest.skip(str(error))
    train(whole)
    half = learner(3, **told)
    while half.steps < half.plan.steps // 2:
        half.advance()
    state = half.state()
    half.advance()  # what was written down does not move with it
    torch.save(state, tmp_path / "state.pt")
    again = learner(3, **told)
    again.restore(torch.load(tmp_path / "state.pt", weights_only=False))
    train(again)
    for a, b in ((whole.policy, again.policy), (whole.critic, again.critic)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert_array_equal(whole.statistics.mean, again.statistics.mean)
    timeless = [[{k: v for k, v in p.items() if k != "seconds"} for p in one.curve] for one in (whole, again)]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_seeds_for_different_ends_are_different():
    found = {derive_seed(*n) for n in [(0, 1), (0, 2), (1, 1), (1, 2), (0, 2, 1), (2, 0, 1)]}
    assert len(found) == 6


# Evaluation and files -------------------------------------------------------------------------------------------------


def test_an_evaluation_takes_one_episode_of_each_environment_and_leaves_the_statistics_alone(
    monkeypatch,
):
    monkeypatch.setattr(trainer, "EVALUATED_AT_ONCE", 40)
    one = train(learner(environment="CartPole-v1", normalize_observations=True))
    before = one.statistics.mean.copy(), one.statistics.var.copy(), one.statistics.count
    told = {"statistics": one.statistics, "episodes": 100, "seed": 0}
    returns = evaluate(one.policy, "CartPole-v1", {}, **told)
    assert returns.shape == (100,)
    assert_array_equal(one.statistics.mean, before[0])
    assert_array_equal(one.statistics.var, before[1])
    assert one.statistics.count == before[2]
    assert_close(evaluate(one.policy, "CartPole-v1", {}, **told), returns)
    assert len(returns.unique()) > 1


def test_an_evaluation_is_not_biased_to_short_episodes():
    # A push towards where the pole leans keeps carts up for quite different times.
    world = spaces.inspect_env("CartPole-v1", {}, None)
    policy = Policy(world, hidden=(), activation="tanh", distribution=None)
    with torch.no_grad():
        policy.body[0].weight.copy_(torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 1.0, 0.2]]))
    found = evaluate(policy, "CartPole-v1", {}, statistics=None, episodes=100, seed=0)
    environments = Environments("CartPole-v1", {}, 100)
    seen = environments.fresh(derive_seed(0, 3, 0))
    first = torch.zeros(100, dtype=torch.float64)
    for time in range(1, 501):
        step = environments.step((seen @ np.array([2.0, 0, 1.0, 0.2]) > 0).astype(np.int64))
        first[torch.from_numpy(step.ended) & (first == 0)] = time
        seen = step.observations
    assert_close(found, first)
    assert (
        2 * first.min() + 5 < first.max()
    )  # so some have begun another one before the last has ended


def test_a_policy_on_disk_is_the_policy(tmp_path):
    one = train(
        learner(environment="Pendulum-v1", normalize_observations=True, distribution="squashed")
    )
    world = spaces.inspect_env("Pendulum-v1", {}, "squashed")
    policy_files.save(tmp_path / "policy-0.safetensors", one.policy, one.critic, one.statistics)
    policy_files.describe(
        tmp_path, environment="Pendulum-v1", options={}, world=world, hidden=[8], activation="tanh",
        distribution="squashed", seeds=[0],
    )  # fmt: skip
    again = policy_files.load(tmp_path, 0)
    told = {"episodes": 5, "seed": 1}
    assert_close(
        evaluate(again.policy, again.environment, again.options, statistics=again.statistics, **told),
        evaluate(one.policy, "Pendulum-v1", {}, statistics=one.statistics, **told),
        rtol=0, atol=0,
    )  # fmt: skip


def test_a_process_that_trains_a_seed_of_its_own_counts_as_the_only_one(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert masked.ranks() == 2
    with masked.single_process():
        assert masked.ranks() == 1
    assert masked.ranks() == 2
