"""Collect, estimate, update: one loop for REINFORCE, A2C and PPO, which differ in settings and in what is collected.

A2C and PPO collect a stretch of steps from environments that go on; REINFORCE one whole episode from each. All end in
:func:`align.rl.update.update`, the one that trains language models too.

A :class:`Learner` is one seed. Between two updates its whole state can be written down, and one that goes on from there
ends in the same weights to the bit. So that an environment's state stays short (see :class:`Environments`), all of them
begin new episodes after every 200,000 steps, whether or not the run is ever stopped.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from align.control.environments import Environments, Step
from align.control.networks import Policy, critic
from align.control.spaces import EnvSpec
from align.functional.returns import discounted_returns, gae
from align.rl.rollout import Rollout
from align.rl.update import Evaluated, Objective, update

RESET_INTERVAL = 200_000  # steps after which all environments begin new episodes
N_VARIANCES = 20  # times in a run that the variance of the gradient is measured
RECENT = 100  # episodes in the learning curve's running mean
NOISE = 64  # steps whose noise is drawn at once
EVALUATED_AT_ONCE = 100  # episodes, each in an environment of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a seed's training is told. ``stretch`` None collects whole episodes; ``baseline`` none has no critic."""

    environment: str
    options: Mapping[str, Any]
    envs: int
    steps: int
    stretch: int | None
    baseline: Literal["value", "none"]
    gamma: float
    lam: float
    objective: Objective
    learning_rate: float
    value_learning_rate: float
    schedule: Literal["linear", "constant"]
    hidden: tuple[int, ...]
    activation: str
    distribution: str | None
    normalize_observations: bool
    normalize_rewards: bool


class Experience(NamedTuple):
    """What environments and policy did, time first: ``[time, envs, ...]``."""

    observations: Float[Tensor, "time+1 envs features"]
    actions: Shaped[Tensor, "time envs ..."]
    rewards: Float[Tensor, "time envs"]
    terminated: Bool[Tensor, "time envs"]
    ended: Bool[Tensor, "time envs"]
    finals: Float[Tensor, "ends features"]
    """What the ended episodes led to, by time, then by environment."""
    returns: list[float]
    """Of the episodes that ended."""


class GradientVariance(NamedTuple):
    """Trace of the covariance of one episode's policy gradient, over the episodes of a rollout."""

    with_baseline: float
    without: float


class PolicyGradientTrainer:
    """The training of one seed."""

    def __init__(self, plan: Plan, world: EnvSpec, seed: int) -> None:
        self.plan, self.seed = plan, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = Policy(
                world,
                hidden=plan.hidden,
                activation=plan.activation,
                distribution=plan.distribution,
            )
            self.critic = None
            if plan.baseline == "value":
                self.critic = critic(world, hidden=plan.hidden, activation=plan.activation)
        groups = [{"params": [*self.policy.parameters()], "lr": plan.learning_rate}]
        if self.critic is not None:
            groups += [{"params": [*self.critic.parameters()], "lr": plan.value_learning_rate}]
        self._rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        self.optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
        self.generator = torch.Generator().manual_seed(derive_seed(seed, 1))
        self.statistics = (
            RunningMeanStd(shape=(world.features,)) if plan.normalize_observations else None
        )
        self.environments = Environments(
            plan.environment,
            plan.options,
            plan.envs,
            statistics=self.statistics,
            reward_gamma=plan.gamma if plan.normalize_rewards else None,
        )
        self.steps = 0
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._observations: Any = None

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.steps >= self.plan.steps

    def advance(self) -> dict[str, Any]:
        """Collect and learn once. Returns the new point of the learning curve."""
        started, before, plan = time.perf_counter(), self.steps, self.plan
        experience, valid = self._collect()
        self.steps += int(valid.sum())
        self._recent.extend(experience.returns)
        point: dict[str, Any] = {"steps": self.steps, "episodes": len(experience.returns)}
        point["return"] = sum(self._recent) / len(self._recent) if self._recent else None
        rollout = self._rollout(experience, valid)
        if plan.stretch is None and plan.baseline == "value" and self._passed(before, N_VARIANCES):
            point |= _told("gradient_variance", self._variance(experience, valid))
        if plan.schedule == "linear":
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * max(0.0, 1 - before / plan.steps)
        told = update(
            self._evaluate, rollout, plan.objective, self.optimizer, generator=self.generator
        )
        with torch.no_grad():
            inputs = rollout.inputs["observations"]
            point["entropy"] = float(self.policy.head.entropy(self.policy.body(inputs)).mean())
        point |= {k: v for k, v in asdict(told).items() if k not in point}
        self.seconds += time.perf_counter() - started
        point["seconds"] = round(self.seconds, 4)
        point = {k: None if v != v else v for k, v in point.items()}  # JSON knows no NaN
        self.curve.append(point)
        return point

    def _passed(self, before: int, parts: int) -> bool:
        """Whether the run has come into another of its ``parts`` since ``before``."""
        total = self.plan.steps
        return before == 0 or before * parts // total != self.steps * parts // total

    def _collect(self) -> tuple[Experience, Bool[Tensor, "time envs"]]:
        """Experience, and which of its steps count: after its first end, an environment only waits for the others."""
        plan = self.plan
        if plan.stretch is None or self._observations is None:
            self._observations = self.environments.fresh(derive_seed(self.seed, 2, self.steps))
        if plan.stretch is None:
            experience = self._take(lambda time, ended: bool(ended.all()))
            earlier = experience.ended.cumsum(0) - experience.ended.long()
            first = experience.ended & (earlier == 0)
            kept = first[experience.ended]
            returns = [r for r, keep in zip(experience.returns, kept, strict=True) if keep]
            return experience._replace(returns=returns), earlier == 0
        experience = self._take(lambda time, ended: time == plan.stretch)
        here, then = self.steps, self.steps + experience.rewards.numel()
        if here // RESET_INTERVAL != then // RESET_INTERVAL:
            self._observations = None
        return experience, torch.ones_like(experience.ended)

    @torch.no_grad()
    def _take(self, enough: Callable[[int, Any], bool]) -> Experience:
        """Step until there is enough: ``enough(steps taken, which environments have had an end)``."""
        environments, head = self.environments, self.policy.head
        seen = [np.asarray(self._observations, np.float32)]
        steps: list[Step] = []
        taken: list[Tensor] = []
        ended = np.zeros(environments.count, dtype=bool)
        while not enough(len(steps), ended):
            if len(steps) % NOISE == 0:
                noise = head.noise(NOISE, environments.count, generator=self.generator)
            outputs = self.policy.body(torch.from_numpy(seen[-1]))
            taken.append(head.act(outputs, noise[len(steps) % NOISE]))
            step = environments.step(head.to_world(taken[-1]))
            seen.append(np.asarray(step.observations, np.float32))
            steps.append(step)
            ended |= step.ended
        self._observations = steps[-1].observations
        finals = np.concatenate([step.finals for step in steps]).astype(np.float32)
        return Experience(
            observations=torch.from_numpy(np.stack(seen)),
            actions=torch.stack(taken),
            rewards=torch.from_numpy(np.stack([s.rewards for s in steps]).astype(np.float32)),
            terminated=torch.from_numpy(np.stack([s.terminated for s in steps])),
            ended=torch.from_numpy(np.stack([s.ended for s in steps])),
            finals=torch.from_numpy(finals),
            returns=[float(r) for s in steps for r in s.returns],
        )

    @torch.no_grad()
    def _rollout(self, experience: Experience, valid: Bool[Tensor, "time envs"]) -> Rollout:
        """Advantages and targets; rows of one step each, of the steps that count."""
        e, plan = experience, self.plan

        def rows(values: Tensor) -> Tensor:
            return values[valid].unsqueeze(1)

        observations, actions = e.observations[:-1][valid], e.actions[valid]
        logps = self.policy.head.logps(self.policy.body(observations), actions)
        values = returns = None
        if (
            self.critic is None
        ):  # what the time limit hides cannot be known without a critic: it counts as nothing
            advantages = self._returns(e, torch.zeros_like(e.rewards))
        else:
            values, following = self._values(e)
            advantages = gae(
                e.rewards.T,
                values.T,
                following.T,
                e.terminated.T,
                e.ended.T,
                gamma=plan.gamma,
                lam=plan.lam,
            ).T
            returns = rows(advantages + values)
            values = rows(values)
        return Rollout(
            inputs={"observations": observations, "actions": actions},
            logps=logps.unsqueeze(1),
            advantages=rows(advantages),
            mask=torch.ones(len(logps), 1, dtype=torch.bool),
            values=values,
            returns=returns,
        )

    def _returns(self, e: Experience, following: Tensor) -> Tensor:
        gamma = self.plan.gamma
        return discounted_returns(
            e.rewards.T, following.T, e.terminated.T, e.ended.T, gamma=gamma
        ).T

    def _values(self, e: Experience) -> tuple[Tensor, Tensor]:
        """Values of what was seen, and of what each step led to, ``[time, envs]``: one pass for all of them."""
        assert self.critic is not None
        time, envs = e.rewards.shape
        known = torch.cat([e.observations.flatten(0, 1), e.finals])
        values = self.critic(known).squeeze(-1)
        following = values[envs : (time + 1) * envs].view(time, envs).clone()
        following[e.ended] = values[(time + 1) * envs :]
        return values[: time * envs].view(time, envs), following

    def _evaluate(self, inputs: dict[str, Tensor]) -> Evaluated:
        observations = inputs["observations"]
        outputs = self.policy.body(observations)
        logps = self.policy.head.logps(outputs, inputs["actions"]).unsqueeze(1)
        values = None if self.critic is None else self.critic(observations)
        entropy = None
        if self.plan.objective.entropy_coef:
            entropy = self.policy.head.entropy(outputs).unsqueeze(1)
        return Evaluated(logps, entropy, values)

    def _variance(self, e: Experience, valid: Bool[Tensor, "time envs"]) -> GradientVariance:
        """Of the same episodes, with the critic's values taken off the returns and without."""
        with torch.no_grad():
            values, following = self._values(e)
            returns = self._returns(e, following)
        parameters = [*self.policy.parameters()]
        gradients: dict[str, list[Tensor]] = {"with_baseline": [], "without": []}
        for env in range(valid.shape[1]):
            mine = valid[:, env]
            outputs = self.policy.body(e.observations[:-1, env][mine])
            logps = self.policy.head.logps(outputs, e.actions[:, env][mine])
            for name, baseline in (
                ("with_baseline", values),
                ("without", torch.zeros_like(values)),
            ):
                loss = -(logps * (returns - baseline)[:, env][mine]).sum()
                found = torch.autograd.grad(loss, parameters, retain_graph=True)
                gradients[name].append(nn.utils.parameters_to_vector(found))
        spread = {name: float(torch.stack(g).var(0).sum()) for name, g in gradients.items()}
        return GradientVariance(**spread)

    # What a checkpoint holds ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, and the curve so far."""
        return copy.deepcopy(
            {
                "policy": self.policy.state_dict(),
                "critic": self.critic and self.critic.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "environments": self.environments.state(),
                "between": self._observations is None,
                "steps": self.steps,
                "seconds": self.seconds,
                "curve": self.curve,
                "recent": list(self._recent),
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.policy.load_state_dict(state["policy"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        observations = self.environments.restore(state["environments"])
        self._observations = None if state["between"] else observations
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.curve = list(state["curve"])
        self._recent.extend(state["recent"])


def _told(name: str, values: NamedTuple) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in values._asdict().items()}


def derive_seed(*numbers: int) -> int:
    """A seed for one purpose, unlike those of other purposes and of neighbouring seeds."""
    # Vector environments count up from their seed: room is left between.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] // 2)


@torch.no_grad()
def evaluate(
    policy: Policy,
    environment: str,
    options: Mapping[str, Any],
    *,
    statistics: RunningMeanStd | None,
    episodes: int,
    seed: int,
) -> Float[Tensor, " episodes"]:
    """Unscaled, undiscounted returns of the greedy policy; the statistics stay as they are.

    Each environment gives its first episode: taking whichever end first would favour the short ones.
    """
    returns: list[float] = []
    while len(returns) < episodes:
        envs = min(EVALUATED_AT_ONCE, episodes - len(returns))
        environments = Environments(environment, options, envs, statistics=statistics)
        environments.learning = False
        observations = environments.fresh(derive_seed(seed, 3, len(returns)))
        found = np.full(envs, math.nan)
        while np.isnan(found).any():
            outputs = policy.body(torch.from_numpy(np.asarray(observations, np.float32)))
            step = environments.step(policy.head.to_world(policy.head.act(outputs, 0.0)))
            first = np.isnan(found) & step.ended
            found[first] = step.returns[np.isnan(found)[step.ended]]
            observations = step.observations
        environments.close()
        returns += found.tolist()
    return torch.tensor(returns, dtype=torch.float64)
