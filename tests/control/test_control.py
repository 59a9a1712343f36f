"""Parts of control: environments, distributions, advantages, saved states, evaluation, files."""

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

from align.config.base import GymEnvironment
from align.config.control.policy_gradient import PolicyGradient
from align.control import evaluate as control_evaluate
from align.control import policy_files, policy_gradient, spaces
from align.control.environments import CLIP, CartPole, Environments, make_vector_env
from align.control.evaluate import evaluate
from align.control.experience import state_values
from align.control.networks import (
    Categorical,
    Gaussian,
    Policy,
    SquashedGaussian,
    build_critic,
)
from align.control.policy_gradient import PolicyGradientTrainer
from align.control.seeds import derive_seed
from align.control.spaces import EnvSpec
from align.errors import UserError
from align.functional import masked

DISCRETE = EnvSpec(n_features=2, n_actions=2, low=None, high=None)
BOX = EnvSpec(n_features=2, n_actions=2, low=[-2.0, 0.0], high=[3.0, 1.0])


class Counting(gymnasium.Env):
    """Observes the number of steps in the episode and of the episode, times ``scale``.

    Every step has reward ``reward``. An episode terminates after ``length`` steps if ``ends``.
    """

    steps: ClassVar[int] = 0  # of all instances

    def __init__(self, length: int = 5, ends: bool = True, reward: float = 1.0, scale: float = 1.0):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.length, self.ends, self.reward, self.scale = length, ends, reward, scale
        self.time, self.episode = 0, -1

    def observe(self) -> np.ndarray:
        return self.scale * np.array([self.time, self.episode], dtype=np.float64)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        Counting.steps += 1
        self.time += 1
        return self.observe(), self.reward, self.ends and self.time == self.length, False, {}


@pytest.fixture(autouse=True)
def counting() -> Iterator[None]:
    """Counting-v0 terminates, CountingCut-v0 is truncated after 5 steps, Forever-v0 after 20.

    Observations of Forever-v0 are constant.
    """
    Counting.steps = 0
    torch.manual_seed(0)
    never = {"ends": False}
    gymnasium.register("Counting-v0", Counting, max_episode_steps=1000)
    gymnasium.register("CountingCut-v0", Counting, max_episode_steps=5, kwargs=never)
    gymnasium.register("Forever-v0", Counting, max_episode_steps=20, kwargs=never | {"scale": 0.0})
    yield
    for name in ("Counting-v0", "CountingCut-v0", "Forever-v0"):
        del gymnasium.registry[name]


REINFORCE = {"algorithm": "reinforce", "n_steps": None, "gae_lambda": None}


def build(seed: int = 0, **changes: Any) -> PolicyGradientTrainer:
    """A trainer with small networks; by default one step of A2C per update."""
    settings: dict[str, Any] = {
        "environment": "Counting-v0",
        "algorithm": "a2c",
        "n_envs": 3,
        "steps": 120,
        "n_steps": 8,
        "gamma": 0.9,
        "gae_lambda": 0.7,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "normalize_advantages": False,
        "hidden_sizes": [8],
    }
    config = PolicyGradient(**settings | changes)
    spec = spaces.inspect_env(*config.gym_environments)
    return PolicyGradientTrainer(config, spec, seed)


def train(trained: PolicyGradientTrainer) -> PolicyGradientTrainer:
    while not trained.done:
        trained.train_step()
    return trained


# Environments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "terminated"), [("Counting-v0", True), ("CountingCut-v0", False)])
def test_there_are_no_phantom_steps_and_final_observations_are_returned_as_well(name, terminated):
    environments = Environments(name, {}, 2)
    assert_array_equal(environments.reset(0), [[0, 0], [0, 0]])
    for time in range(1, 13):
        step = environments.step(np.zeros(2, dtype=np.int64))
        end = time % 5 == 0
        assert_array_equal(step.observations, [[time % 5, time // 5]] * 2)
        assert_array_equal(step.rewards, [1, 1])  # a phantom step would have reward 0
        assert step.ended.tolist() == [end, end]
        assert step.terminated.tolist() == [end and terminated] * 2
        assert step.final_observations.tolist() == ([[5, time // 5 - 1]] * 2 if end else [])
        assert step.returns.tolist() == ([5, 5] if end else [])
    assert Counting.steps == 2 * 12


def test_vectorized_cartpole_is_truncated_and_reset_in_the_step_that_ends_an_episode():
    environments = Environments("CartPole-v1", {"max_episode_steps": 12}, 16)
    before = environments.reset(1)
    generator = np.random.default_rng(0)
    lengths = np.zeros(16)
    counts = {"terminated": 0, "truncated": 0}
    for _ in range(200):
        step = environments.step(generator.integers(2, size=16))
        lengths += 1
        assert (step.rewards == 1).all()
        assert_array_equal(step.returns, lengths[step.ended])
        beyond = (abs(step.final_observations[:, 0]) > 2.4) | (
            abs(step.final_observations[:, 2]) > 12 * math.pi / 180
        )
        assert_array_equal(beyond, step.terminated[step.ended])
        assert (lengths[step.ended & ~step.terminated] == 12).all()
        assert (abs(step.observations[step.ended]) <= 0.05).all()
        assert (lengths <= 12).all()
        counts["terminated"] += int(step.terminated.sum())
        counts["truncated"] += int((step.ended & ~step.terminated).sum())
        lengths[step.ended] = 0
        before = step.observations
    assert before.dtype == np.float32
    assert min(counts.values()) > 10


def test_vectorized_cartpole_moves_as_gymnasiums_single_environment():
    environments = Environments("CartPole-v1", {}, 4)
    before = environments.reset(3)
    single: Any = gymnasium.make("CartPole-v1").unwrapped
    single.reset()
    generator = np.random.default_rng(1)
    for _ in range(60):
        actions = generator.integers(2, size=4)
        step = environments.step(actions)
        after = step.observations.copy()
        after[step.ended] = step.final_observations
        for cart in range(4):
            single.state, single.steps_beyond_terminated = before[cart].astype(np.float64), None
            moved, _, terminated, _, _ = single.step(actions[cart])
            assert_allclose(after[cart], moved, rtol=1e-5, atol=1e-6)
            assert terminated == step.terminated[cart]
        before = step.observations


def test_observations_and_final_observations_are_normalized_by_all_earlier_observations():
    statistics = RunningMeanStd(shape=(2,))
    environments = Environments("Counting-v0", {"length": 3}, 2, statistics=statistics)
    environments.reset(0)
    for _ in range(2):
        environments.step(np.zeros(2, dtype=np.int64))
    step = environments.step(np.zeros(2, dtype=np.int64))
    # Times 0, 1, 2, 0 of episodes 0, 0, 0, 1, twice each, after 1e-4 counts of mean 0, variance 1.
    seen = np.array([[0, 0], [1, 0], [2, 0], [0, 1]])
    assert_allclose(statistics.mean, seen.mean(0), rtol=1e-4)
    assert_allclose(statistics.var, seen.var(0), rtol=1e-3)
    assert_allclose(step.observations[0], ([0, 1] - seen.mean(0)) / seen.std(0), rtol=1e-3)
    assert_allclose(step.final_observations[1], ([3, 0] - seen.mean(0)) / seen.std(0), rtol=1e-3)


def test_normalized_observations_are_bounded():
    statistics = RunningMeanStd(shape=(2,))
    environments = Environments("Counting-v0", {"length": 500}, 1, statistics=statistics)
    environments.reset(0)
    statistics.mean[:], statistics.count = -1e6, 1e12
    assert_array_equal(environments.step(np.zeros(1, dtype=np.int64)).observations, [[CLIP, CLIP]])


def test_rewards_are_scaled_and_returns_are_not():
    environments = Environments("Counting-v0", {"reward": 50.0}, 4, reward_gamma=0.9)
    environments.reset(0)
    steps = [environments.step(np.zeros(4, dtype=np.int64)) for _ in range(50)]
    # Discounted sums within an episode: 50, 95, 135.5, 171.95, 204.755. The last one is 50 in
    # Gymnasium, which resets the sum at a step that terminates.
    sums = np.array([50, 95, 135.5, 171.95, 50])
    assert_allclose(steps[-1].rewards, 50 / sums.std(), rtol=0.02)
    assert {r for step in steps for r in step.returns} == {250.0}


@pytest.mark.parametrize("n_steps", [0, 7, 40])
def test_restored_environments_continue_identically(n_steps):
    def new() -> Environments:
        statistics = RunningMeanStd(shape=(4,))
        return Environments("CartPole-v1", {}, 4, statistics=statistics, reward_gamma=0.9)

    actions = np.random.default_rng(0).integers(2, size=(100, 4))
    first, second = new(), new()
    first.reset(9)
    first.step(actions[0])
    first.reset(4)  # the statistics contain more than the following observations
    for row in actions[:n_steps]:
        first.step(row)
    state = first.state()
    assert len(state["actions"]) == n_steps
    second.restore(state)
    for row in actions[n_steps:]:
        for a, b in zip(first.step(row), second.step(row), strict=True):
            assert_array_equal(a, b)


def test_only_mujocos_warning_about_gymnasiums_models_is_suppressed(tmp_path, monkeypatch, capfd):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    Environments("HalfCheetah-v5", {}, 1).close()
    assert capfd.readouterr().err == ""
    mujoco.get_mju_user_warning()("Nan in QACC")
    assert "MuJoCo: Nan in QACC" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Distributions ------------------------------------------------------------------------------------


def test_the_categorical_distribution_equals_torchs():
    head, logits = Categorical(DISCRETE), torch.randn(7, 3)
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


def test_the_gaussian_equals_torchs_and_the_environment_receives_bounded_actions():
    head, means = Gaussian(BOX), torch.randn(7, 2)
    torch.nn.init.normal_(head.log_std)
    noise = head.noise(7, generator=torch.Generator().manual_seed(0))
    actions = head.act(means, noise)
    other = torch.distributions.Normal(means, head.log_std.exp())
    assert_close(actions, other.loc + other.scale * noise)
    assert_close(head.logps(means, actions), other.log_prob(actions).sum(-1))
    assert_close(head.entropy(means), other.entropy().sum(-1))
    assert_close(head.act(means, 0.0), means)
    assert head.env_actions(torch.tensor([[-9.0, 0.5], [9.0, 7.0]])).tolist() == [[-2, 0.5], [3, 1]]


def test_the_squashed_gaussian_equals_torchs_transformed_distribution():
    head, means = SquashedGaussian(BOX).double(), torch.randn(7, 2).double()
    torch.nn.init.normal_(head.log_std)
    values = head.act(means, head.noise(7, generator=torch.Generator().manual_seed(0))).detach()
    # -2 + 5 (tanh + 1) / 2 = 0.5 + 2.5 tanh and 0 + (tanh + 1) / 2 = 0.5 + 0.5 tanh
    scaling = torch.distributions.AffineTransform(0.5, torch.tensor([2.5, 0.5]).double())
    other = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(means, head.log_std.exp()),
        [torch.distributions.TanhTransform(cache_size=1), scaling],
    )
    actions = scaling(torch.tanh(values))
    assert_close(torch.from_numpy(head.env_actions(values)), actions)
    assert_close(head.logps(means, values), other.log_prob(actions).sum(-1))


@pytest.mark.parametrize("log_std", [-2.0, 0.0, 1.0])
def test_the_entropy_of_a_squashed_gaussian_is_that_of_its_density(log_std):
    head = SquashedGaussian(EnvSpec(1, 1, [-2.0], [3.0])).double()
    head.log_std.data.fill_(log_std)
    for mean in (-1.5, 0.0, 0.7):
        # -E[log density] over u, on a fine grid
        width = math.exp(log_std)
        u = (mean + width * torch.linspace(-9, 9, 20_001)).double()[:, None]
        means = torch.full_like(u, mean)
        chances = torch.distributions.Normal(mean, width).log_prob(u[:, 0]).exp()
        exact = -torch.trapezoid(chances * head.logps(means, u), u[:, 0])
        assert_close(head.entropy(torch.tensor([[mean]]).double())[0], exact, rtol=0, atol=0.02)


def test_the_entropy_of_a_squashed_gaussian_has_a_maximum():
    # That of the uniform distribution on [-2, 3], log 5, bounds it; the entropy of u has no bound.
    head = SquashedGaussian(EnvSpec(1, 1, [-2.0], [3.0]))
    entropies = []
    for log_std in (-3.0, -0.1, 3.0):
        head.log_std.data.fill_(log_std)
        entropies.append(head.entropy(torch.zeros(1, 1)).item())
    assert entropies[1] == pytest.approx(math.log(5), abs=0.03)
    assert entropies[0] < entropies[1] > entropies[2]
    (gradient,) = torch.autograd.grad(head.entropy(torch.zeros(1, 1)).sum(), [head.log_std])
    assert gradient < 0, "a bonus no longer widens a distribution that is too wide"


def test_the_density_of_a_squashed_gaussian_integrates_to_one():
    head = SquashedGaussian(EnvSpec(1, 1, [-2.0], [3.0])).double()
    actions = torch.linspace(-2, 3, 200_001, dtype=torch.float64)[1:-1]
    values = torch.atanh((actions - 0.5) / 2.5)
    density = head.logps(torch.full_like(values, 0.3)[:, None], values[:, None]).exp()
    assert_close(torch.trapezoid(density, actions), torch.tensor(1.0).double(), rtol=0, atol=1e-4)


def test_a_saturated_action_has_a_finite_density():
    head = SquashedGaussian(BOX)
    logps = head.logps(torch.zeros(2, 2), torch.tensor([[50.0, -50.0], [0.0, 0.0]]))
    assert logps.isfinite().all()


def test_initial_weights_are_orthogonal_with_the_gains_of_the_paper():
    policy = Policy(DISCRETE, hidden_sizes=[16, 16], activation="tanh", distribution=None)
    value = build_critic(DISCRETE, hidden_sizes=[16, 16], activation="relu")
    assert [type(layer).__name__ for layer in value] == ["Linear", "ReLU"] * 2 + ["Linear"]
    for body, last in ((policy.body, 0.01), (value, 1.0)):
        gains = [layer.weight for layer in body if isinstance(layer, torch.nn.Linear)]
        assert_close(gains[1] @ gains[1].T, 2 * torch.eye(16), rtol=1e-4, atol=1e-4)
        rows = len(gains[2])
        assert_close(gains[2] @ gains[2].T, last**2 * torch.eye(rows), rtol=1e-4, atol=1e-6)


def test_uniform_initial_weights_are_those_of_torchs_linear_layers():
    torch.manual_seed(0)
    shape = {"hidden_sizes": [16], "activation": "relu", "initialization": "uniform"}
    policy = Policy(BOX, **shape, distribution=None)
    critic = build_critic(BOX, **shape)
    torch.manual_seed(0)
    n_features, n_actions = BOX.n_features, BOX.n_actions
    for body, n_outputs in ((policy.body, n_actions), (critic, 1)):
        for layer, expected in (
            (body[0], torch.nn.Linear(n_features, 16)),
            (body[2], torch.nn.Linear(16, n_outputs)),
        ):
            assert torch.equal(layer.weight, expected.weight)
            assert torch.equal(layer.bias, expected.bias)


def test_the_initial_deviation_of_continuous_actions_is_that_of_the_recipe():
    keys = {"environment": "Pendulum-v1", "steps": 64, "n_envs": 2, "n_steps": 8}
    config = PolicyGradient(**keys, initial_log_std=-2.0)
    (environment,) = config.gym_environments
    spec = spaces.inspect_env(environment)
    trainer = PolicyGradientTrainer(config, spec, seed=0)
    assert trainer.policy.head.log_std.tolist() == [-2.0]
    assert PolicyGradientTrainer(PolicyGradient(**keys), spec, 0).policy.head.log_std == 0
    trainer.environments.close()
    with pytest.raises(spaces.UnfitError, match="continuous actions"):
        spaces.inspect_env(GymEnvironment("CartPole-v1", {}, needs=environment.needs))


def test_keys_of_the_initial_policy_change_no_digest_where_they_are_not_set():
    config = PolicyGradient(environment="Pendulum-v1", steps=64)
    keys = {"initial_log_std", "initialization", "cost_limit"}
    keys |= {"multiplier_learning_rate", "multiplier_damping"}
    assert not keys & config.digest_settings().keys()


# Collecting and advantages ------------------------------------------------------------------------


def expected_rows(
    config: PolicyGradient, ends: bool, length: int, start: int, steps: int
) -> list[Any]:
    """Value and advantage of each step of one environment; the critic returns ``2 * time + 1``."""
    rows = []
    for first in range(start, start + steps):
        total, weight = 0.0, 1.0
        for k in range(first, start + steps):
            time = k % length
            last = time == length - 1
            following = 0.0 if last and ends else 2 * (time + 1) + 1
            total += weight * (1 + config.gamma * following - (2 * time + 1))
            if last:
                break
            weight *= config.gamma * config.advantage_lambda
        rows.append((2 * (first % length) + 1, total))
    return rows


@pytest.mark.parametrize(("name", "ends"), [("Counting-v0", True), ("CountingCut-v0", False)])
def test_advantages_are_sums_over_the_steps_of_each_episode(name, ends):
    learner = build(environment=name, hidden_sizes=[])
    with torch.no_grad():
        learner.critic[0].weight.copy_(torch.tensor([[2.0, 0.0]]))
        learner.critic[0].bias.fill_(1.0)
    for start in (0, 8):  # the second rollout begins in the middle of an episode
        rollout = learner.make_rollout(learner.collect())
        by_time = expected_rows(learner.config, ends, 5, start, 8)
        expected = torch.tensor([row for row in by_time for _ in range(3)])
        assert_close(rollout.values[:, 0], expected[:, 0])
        assert_close(rollout.advantages[:, 0], expected[:, 1])
        assert_close(rollout.returns, rollout.advantages + rollout.values)
        learner.steps += 24


def test_the_ratio_before_the_first_optimizer_step_is_one():
    learner = train(build(environment="CartPole-v1", steps=64, n_steps=16, n_envs=4))
    rollout = learner.make_rollout(learner.collect())
    with torch.no_grad():
        assert_close(learner.evaluate_policy(rollout.inputs).logps, rollout.logps)


def test_of_whole_episodes_the_first_of_each_environment_counts():
    learner = build(environment="CartPole-v1", n_envs=8, **REINFORCE)
    experience = learner.collect()
    assert experience.ended.any(0).all()
    assert sorted(experience.returns) == sorted(experience.valid.sum(0).tolist())
    assert len(experience.returns) == 8
    assert len(learner.make_rollout(experience)) == experience.valid.sum()


def test_whole_episodes_start_from_new_states_in_each_update():
    learner = build(environment="CartPole-v1", n_envs=8, **REINFORCE)
    collected = []
    collect = learner.collect
    learner.collect = lambda: collected.append(collect()) or collected[-1]
    points = [learner.train_step() for _ in range(3)]
    first = torch.stack([experience.observations[0] for experience in collected])
    assert (first.abs() <= 0.05).all()
    assert len(first.flatten(0, 1).unique(dim=0)) == 3 * 8
    lengths = [sum(experience.returns) for experience in collected]  # each step has reward 1
    assert [point["steps"] for point in points] == np.cumsum(lengths).tolist()
    assert [point["episodes"] for point in points] == [8, 8, 8]


def test_environments_are_reset_regularly_to_keep_the_saved_actions_few(monkeypatch):
    monkeypatch.setattr(policy_gradient, "RESET_INTERVAL", 100)
    learner = build(steps=480, environment="CartPole-v1")
    counts = []
    while not learner.done:
        learner.train_step()
        counts.append(len(learner.state()["environments"]["actions"]))
    # Updates of 8 steps in 3 environments: the fifth passes 100 steps (120), the ninth 200 (216).
    assert [count // 8 for count in counts[:10]] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 1]


def test_initial_weights_depend_on_the_seed():
    weights = [build(seed).policy.body[0].weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_squashed_distribution_requires_bounded_actions():
    class Unbounded(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    gymnasium.register("Unbounded-v0", Unbounded, max_episode_steps=1000)
    try:
        assert spaces.inspect_env(GymEnvironment("Unbounded-v0", {})).n_actions == 1
        with pytest.raises(
            spaces.UnfitError, match=r"unbounded actions.*; expected gaussian"
        ) as error:
            spaces.inspect_env(GymEnvironment("Unbounded-v0", {}, "squashed"))
        assert error.value.key == "distribution"
    finally:
        del gymnasium.registry["Unbounded-v0"]


def test_without_a_baseline_advantages_are_the_discounted_returns():
    learner = build(baseline="none", **REINFORCE)
    rollout = learner.make_rollout(learner.collect())
    # 1 + 0.9 + ... : (1 - 0.9^k) / 0.1 with k steps to go
    expected = torch.tensor([(1 - 0.9**k) / 0.1 for k in (5, 4, 3, 2, 1) for _ in range(3)])
    assert_close(rollout.advantages[:, 0], expected)
    assert rollout.values is rollout.returns is None


def test_the_counted_steps_are_those_of_the_environments():
    learner = train(build(steps=100))
    assert learner.steps == 120  # updates of 24 steps
    assert Counting.steps == 120
    assert [point["steps"] for point in learner.curve] == [24, 48, 72, 96, 120]
    assert [point["episodes"] for point in learner.curve] == [3, 6, 3, 6, 6]
    assert {point["return"] for point in learner.curve} == {5.0}


def test_the_value_of_reward_one_forever_is_not_reduced_by_a_time_limit():
    settings = {
        "algorithm": "ppo",
        "epochs": 12,  # of the value: the learning rate of the policy is almost zero
        "minibatches": 1,
        "learning_rate": 1e-9,
        "value_learning_rate": 0.3,
        "hidden_sizes": [],
        "n_steps": 20,
        "n_envs": 2,
        "steps": 400,
        "environment": "Forever-v0",
    }
    observation = torch.zeros(1, 2)

    truncated = train(build(gae_lambda=0.95, **settings))
    assert_close(
        truncated.critic(observation), torch.tensor([[10.0]]), rtol=0, atol=0.1
    )  # 1 / (1 - 0.9)

    options = {"length": 20, "ends": True}
    terminated = train(build(environment_options=options, gae_lambda=1.0, **settings))
    # The mean over k = 1 to 20 steps to go of (1 - 0.9^k) / 0.1: 10 - 10 * 0.9 * (1 - 0.9^20) /
    # (0.1 * 20)
    mean = 10 - 10 * 0.9 * (1 - 0.9**20) / (0.1 * 20)
    assert_close(terminated.critic(observation), torch.tensor([[mean]]), rtol=0, atol=0.1)


def test_the_gradient_variance_by_hand():
    learner = build(environment="CartPole-v1", hidden_sizes=[], n_envs=4, **REINFORCE)
    experience = learner.collect()
    variance = learner.gradient_variance(experience)
    with torch.no_grad():
        values, _ = state_values(learner.critic, experience)
        by_name: dict[str, list[torch.Tensor]] = {"with_baseline": [], "without": []}
        for env in range(4):
            times = int(experience.valid[:, env].sum())
            seen = experience.observations[:times, env]
            p = learner.policy.body(seen).softmax(-1)
            # The gradient of log p(a) by logits is 1 at a, minus p; by the weights of a linear
            # layer, that times the observation.
            by_logits = torch.nn.functional.one_hot(experience.actions[:times, env], 2) - p
            returns = torch.tensor([(1 - 0.9 ** (times - t)) / 0.1 for t in range(times)])
            for name, advantage in (
                ("with_baseline", returns - values[:times, env]),
                ("without", returns),
            ):
                weighted = -by_logits * advantage[:, None]
                by_name[name].append(torch.cat([(weighted.T @ seen).flatten(), weighted.sum(0)]))
    for name, gradients in by_name.items():
        together = torch.stack(gradients).double().numpy()
        assert_allclose(getattr(variance, name), np.trace(np.cov(together.T)), rtol=1e-4)


def test_the_learning_rates_decay_linearly_to_0():
    learner = build(schedule="linear", value_learning_rate=4e-2, steps=96)
    rates = []
    for _ in range(4):
        learner.train_step()
        rates.append([group["lr"] for group in learner.optimizer.param_groups])
    assert_allclose(rates, [[1e-2, 4e-2], [7.5e-3, 3e-2], [5e-3, 2e-2], [2.5e-3, 1e-2]])


# State --------------------------------------------------------------------------------------------


PPO = {"algorithm": "ppo", "epochs": 2, "minibatches": 3}
BOX_2D = {"environment": "LunarLander-v3", "steps": 600}
MUJOCO = {"environment": "HalfCheetah-v5"}


@pytest.mark.parametrize(
    ("changes", "reset_interval"),
    [
        pytest.param(PPO, 50, id="ppo"),
        pytest.param(PPO, 200_000, id="ppo, no reset of the environments"),
        pytest.param(REINFORCE, 50, id="reinforce"),
        pytest.param({"environment": "Pendulum-v1", "distribution": "squashed"}, 50, id="squashed"),
        pytest.param(
            PPO | {"environment": "align.control.icy_road:IcyRoad-v0", "cost_limit": 1.0},
            50,
            id="a limit on costs",
        ),
        pytest.param(BOX_2D, 50, id="an environment that cannot be pickled"),
        pytest.param(BOX_2D, 200_000, id="an environment that cannot be pickled, no reset"),
        pytest.param(MUJOCO, 50, id="an environment that loses its state when pickled"),
        pytest.param(MUJOCO, 200_000, id="an environment that loses its state, no reset"),
    ],
)
def test_a_restored_trainer_continues_bitwise_identically(
    changes, reset_interval, tmp_path, monkeypatch
):
    monkeypatch.setattr(policy_gradient, "RESET_INTERVAL", reset_interval)
    settings = {"environment": "CartPole-v1", "steps": 240, "schedule": "linear"} | changes
    settings |= {"normalize_observations": True, "normalize_rewards": True}
    try:
        whole = build(3, **settings)
    except spaces.UnfitError as error:
        pytest.skip(str(error))
    train(whole)
    half = build(3, **settings)
    while half.steps < half.config.steps // 2:
        half.train_step()
    state = half.state()
    half.train_step()  # does not change the saved state
    torch.save(state, tmp_path / "state.pt")
    restored = build(3, **settings)
    restored.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    train(restored)
    for a, b in ((whole.policy, restored.policy), (whole.critic, restored.critic)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert_array_equal(whole.statistics.mean, restored.statistics.mean)
    curves = [
        [{k: v for k, v in point.items() if k != "seconds"} for point in learner.curve]
        for learner in (whole, restored)
    ]
    assert curves[0] == curves[1]
    if whole.constraint is not None:
        assert whole.constraint.multiplier > 0
        for x, y in zip(
            whole.constraint.critic.parameters(),
            restored.constraint.critic.parameters(),
            strict=True,
        ):
            assert torch.equal(x, y)


def test_derived_seeds_differ_by_purpose():
    seeds = {derive_seed(*n) for n in [(0, 1), (0, 2), (1, 1), (1, 2), (0, 2, 1), (2, 0, 1)]}
    assert len(seeds) == 6


# Evaluation and files -----------------------------------------------------------------------------


def test_an_evaluation_plays_one_episode_per_environment_and_does_not_update_the_statistics(
    monkeypatch,
):
    monkeypatch.setattr(control_evaluate, "EVALUATED_AT_ONCE", 40)
    learner = train(build(environment="CartPole-v1", normalize_observations=True))
    before = learner.statistics.mean.copy(), learner.statistics.var.copy(), learner.statistics.count
    settings = {"statistics": learner.statistics, "episodes": 100, "seed": 0}
    returns, costs = evaluate(learner.policy, "CartPole-v1", {}, **settings)
    assert returns.shape == (100,)
    assert costs.isnan().all()  # CartPole has none
    assert_array_equal(learner.statistics.mean, before[0])
    assert_array_equal(learner.statistics.var, before[1])
    assert learner.statistics.count == before[2]
    assert_close(evaluate(learner.policy, "CartPole-v1", {}, **settings).returns, returns)
    assert len(returns.unique()) > 1


def test_an_evaluation_is_not_biased_toward_short_episodes():
    # Pushing toward the side where the pole leans gives episodes of very different lengths.
    spec = spaces.inspect_env(GymEnvironment("CartPole-v1", {}))
    policy = Policy(spec, hidden_sizes=[], activation="tanh", distribution=None)
    with torch.no_grad():
        policy.body[0].weight.copy_(torch.tensor([[0.0, 0, 0, 0], [2.0, 0, 1.0, 0.2]]))
    returns, _ = evaluate(policy, "CartPole-v1", {}, statistics=None, episodes=100, seed=0)
    environments = Environments("CartPole-v1", {}, 100)
    seen = environments.reset(derive_seed(0, 3, 0))
    first = torch.zeros(100, dtype=torch.float64)
    for time in range(1, 501):
        step = environments.step((seen @ np.array([2.0, 0, 1.0, 0.2]) > 0).astype(np.int64))
        first[torch.from_numpy(step.ended) & (first == 0)] = time
        seen = step.observations
    assert_close(returns, first)
    # Some environments are in a later episode before the last one ends its first.
    assert 2 * first.min() + 5 < first.max()


def test_a_saved_and_loaded_policy_is_the_same(tmp_path):
    learner = train(
        build(environment="Pendulum-v1", normalize_observations=True, distribution="squashed")
    )
    spec = spaces.inspect_env(GymEnvironment("Pendulum-v1", {}, "squashed"))
    policy_files.save(
        tmp_path / "policy-0.safetensors", learner.policy, learner.critic, learner.statistics
    )
    policy_files.describe(tmp_path, learner.config, spec)
    loaded = policy_files.load(tmp_path, 0)
    settings = {"episodes": 5, "seed": 1}
    assert_close(
        evaluate(loaded.policy, loaded.environment, loaded.options, statistics=loaded.statistics, **settings).returns,
        evaluate(learner.policy, "Pendulum-v1", {}, statistics=learner.statistics, **settings).returns,
        rtol=0, atol=0,
    )  # fmt: skip


def test_inside_single_process_there_is_one_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert masked.ranks() == 2
    with masked.single_process():
        assert masked.ranks() == 1
    assert masked.ranks() == 2


@pytest.mark.parametrize("limit", [-1, 0, None, True, 1.5, "500"])
def test_a_time_limit_that_is_no_positive_number_is_refused(limit):
    with pytest.raises(ValueError, match="must be a whole number from 1"):
        PolicyGradient(
            environment="CartPole-v1", steps=10, environment_options={"max_episode_steps": limit}
        )


def test_an_environment_without_a_time_limit_is_refused():
    gymnasium.register("Endless-v0", Counting)
    try:
        with pytest.raises(
            spaces.UnfitError, match=r"has no time limit.*max_episode_steps"
        ) as error:
            spaces.inspect_env(GymEnvironment("Endless-v0", {}))
        assert error.value.key == "environment_options"
        spaces.inspect_env(GymEnvironment("Endless-v0", {"max_episode_steps": 50}))
    finally:
        del gymnasium.registry["Endless-v0"]


def test_cartpole_with_other_options_is_stepped_one_by_one():
    options = {"max_episode_steps": 7, "disable_env_checker": True}
    environments = make_vector_env("CartPole-v1", options, 2)
    assert not isinstance(environments, CartPole)
    assert isinstance(make_vector_env("CartPole-v1", {"max_episode_steps": 7}, 2), CartPole)


@pytest.mark.parametrize("distribution", ["gaussian", "squashed"])
def test_weights_that_are_not_finite_end_the_run(distribution):
    learner = build(environment="Pendulum-v1", learning_rate=1e38, distribution=distribution)
    with pytest.raises(UserError, match=r"seed 0: a weight is not finite after \d+ steps"):
        for _ in range(3):
            learner.train_step()
