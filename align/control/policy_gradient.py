"""Policy-gradient training on environments: collect, estimate advantages, update.

One loop serves REINFORCE, A2C and PPO, which differ in their settings and in how they collect: A2C
and PPO a fixed number of steps from environments that continue, REINFORCE one whole episode of
each. :func:`align.rl.update.update` also trains language models.

Between two updates the whole state can be saved, and a trainer restored from it reaches bitwise the
same weights. To keep that state short (see :class:`Environments`), all environments are reset after
every 200,000 steps, whether or not the run is interrupted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from jaxtyping import Float
from torch import Tensor, nn

from align.config.control.policy_gradient import PolicyGradient
from align.control.constraint import Constraint
from align.control.environments import Environments, Step
from align.control.experience import Experience, estimate_advantages, state_values
from align.control.networks import Gaussian, Policy, build_critic
from align.control.seeds import derive_seed
from align.control.spaces import EnvSpec
from align.control.trainer import RECENT, Trainer, recent_mean
from align.functional.returns import discounted_returns
from align.rl.objective import Objective
from align.rl.rollout import Rollout
from align.rl.update import Evaluated, update

RESET_INTERVAL = 200_000
"""Steps after which all environments are reset."""
N_VARIANCES = 20
"""Number of measurements of the gradient variance in a run."""
NOISE = 64
"""Steps whose noise is drawn at once."""


class GradientVariance(NamedTuple):
    """Trace of the covariance of the policy gradients of single episodes."""

    with_baseline: float
    without: float


def build_objective(config: PolicyGradient) -> Objective:
    """The objective of an update. REINFORCE and A2C take one step without clipping."""
    is_ppo = config.algorithm == "ppo"
    clip = (config.clip or 0.2) if is_ppo else math.inf
    return Objective(
        epochs=config.update_epochs,
        minibatches=config.update_minibatches,
        clip_low=clip,
        clip_high=config.clip_high or clip,
        value_clip=config.value_clip,
        entropy_coef=config.entropy_coef,
        max_grad_norm=config.max_grad_norm or math.inf,
        target_kl=config.target_kl,
        whiten=config.normalize_advantages,
    )


class PolicyGradientTrainer(Trainer[PolicyGradient]):
    """Trains the policy of one seed."""

    def __init__(self, config: PolicyGradient, spec: EnvSpec, seed: int) -> None:
        super().__init__(config, seed)
        self.objective = build_objective(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = Policy(
                spec,
                hidden_sizes=config.hidden_sizes,
                activation=config.activation,
                distribution=config.distribution,
                initialization=config.initialization,
            )
            if config.initial_log_std is not None:
                assert isinstance(policy.head, Gaussian)  # checked before the stage runs
                nn.init.constant_(policy.head.log_std, config.initial_log_std)
            if config.baseline == "value":
                self.critic = build_critic(
                    spec,
                    hidden_sizes=config.hidden_sizes,
                    activation=config.activation,
                    initialization=config.initialization,
                )
        self._learning_rates = [config.learning_rate]
        groups = [{"params": [*policy.parameters()], "lr": config.learning_rate}]
        if self.critic is not None:
            self._learning_rates.append(config.critic_learning_rate)
            groups += [{"params": [*self.critic.parameters()], "lr": config.critic_learning_rate}]
        self.optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
        self.parts = {"policy": policy, "optimizer": self.optimizer}
        if self.critic is not None:
            self.parts["critic"] = self.critic
        self.constraint = None
        if config.cost_limit is not None:
            self.constraint = Constraint(config, spec, seed)
            self.parts |= self.constraint.parts
        self.statistics = (
            RunningMeanStd(shape=(spec.n_features,)) if config.normalize_observations else None
        )
        self.environments = self.env = Environments(
            config.environment,
            config.environment_options,
            config.n_envs,
            statistics=self.statistics,
            reward_gamma=config.gamma if config.normalize_rewards else None,
            vectorization=config.vectorization,
        )
        self._recent_costs: deque[float] = deque(maxlen=RECENT)
        self._observations: Any = None  # None: reset the environments first

    def train(self) -> dict[str, Any]:
        """Collect experience and update once."""
        steps_before = self.steps
        is_linear = self.config.schedule == "linear"
        remaining = max(0.0, 1 - steps_before / self.config.steps) if is_linear else 1.0
        experience = self.collect()
        self.steps += int(experience.valid.sum())
        self.recent_returns.extend(experience.returns)
        point: dict[str, Any] = {
            "episodes": len(experience.returns),
            "return": recent_mean(self.recent_returns),
        }
        if self.constraint is not None:
            self._recent_costs.extend(experience.episode_costs)
            self.constraint.ascend(
                experience, learning_rate=self.config.multiplier_step * remaining
            )
            point["cost"] = recent_mean(self._recent_costs)
            point["multiplier"] = self.constraint.multiplier
        rollout = self.make_rollout(experience)
        if self._measures_variance(steps_before):
            variance = self.gradient_variance(experience)
            point |= {f"gradient_variance/{k}": value for k, value in variance._asdict().items()}
        for group, rate in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = rate * remaining
        diagnostics = update(
            self.evaluate_policy, rollout, self.objective, self.optimizer, generator=self.generator
        )
        if self.constraint is not None:
            rate = self.config.critic_learning_rate * remaining
            self.constraint.fit(experience, self.objective, learning_rate=rate)
        self.check_weights()
        with torch.no_grad():
            inputs = rollout.inputs["observations"]
            point["entropy"] = float(self.policy.head.entropy(self.policy.body(inputs)).mean())
        point |= {k: v for k, v in asdict(diagnostics).items() if k not in point}
        return {k: None if v != v else v for k, v in point.items()}  # JSON has no NaN

    def _measures_variance(self, steps_before: int) -> bool:
        """Whether to measure the gradient variance: with each twentieth of the run."""
        if not self.config.collects_episodes or self.critic is None:
            return False
        total = self.config.steps
        return steps_before == 0 or (
            steps_before * N_VARIANCES // total != self.steps * N_VARIANCES // total
        )

    # Collecting -----------------------------------------------------------------------------------

    def collect(self) -> Experience:
        """Step the environments as far as the algorithm needs for an update."""
        if self.config.collects_episodes or self._observations is None:
            self._observations = self.environments.reset(derive_seed(self.seed, 2, self.steps))
        if self.config.collects_episodes:
            experience = self._step_until(lambda n_steps, ended: bool(ended.all()))
            ends_before = experience.ended.cumsum(0) - experience.ended.long()
            is_first = (experience.ended & (ends_before == 0))[experience.ended]
            returns = [r for r, first in zip(experience.returns, is_first, strict=True) if first]
            return experience._replace(returns=returns, valid=ends_before == 0)
        n_steps = self.config.rollout_steps
        experience = self._step_until(lambda n, ended: n == n_steps)
        steps_after = self.steps + experience.rewards.numel()
        if self.steps // RESET_INTERVAL != steps_after // RESET_INTERVAL:
            self._observations = None
        return experience

    @torch.no_grad()
    def _step_until(self, is_enough: Callable[[int, Any], bool]) -> Experience:
        """Step until ``is_enough(number of steps, which environments have ended an episode)``."""
        environments, head = self.environments, self.policy.head
        observations = [np.asarray(self._observations, np.float32)]
        steps: list[Step] = []
        actions: list[Tensor] = []
        ended = np.zeros(environments.n_envs, dtype=bool)
        while not is_enough(len(steps), ended):
            if len(steps) % NOISE == 0:
                noise = head.noise(NOISE, environments.n_envs, generator=self.generator)
            outputs = self.policy.body(torch.from_numpy(observations[-1]))
            actions.append(head.act(outputs, noise[len(steps) % NOISE]))
            step = environments.step(head.env_actions(actions[-1]))
            observations.append(np.asarray(step.observations, np.float32))
            steps.append(step)
            ended |= step.ended
        self._observations = steps[-1].observations
        finals = np.concatenate([step.final_observations for step in steps]).astype(np.float32)
        all_ended = torch.from_numpy(np.stack([s.ended for s in steps]))
        return Experience(
            observations=torch.from_numpy(np.stack(observations)),
            actions=torch.stack(actions),
            rewards=torch.from_numpy(np.stack([s.rewards for s in steps]).astype(np.float32)),
            terminated=torch.from_numpy(np.stack([s.terminated for s in steps])),
            ended=all_ended,
            final_observations=torch.from_numpy(finals),
            returns=[float(r) for s in steps for r in s.returns],
            valid=torch.ones_like(all_ended),
            costs=torch.from_numpy(np.stack([s.costs for s in steps]).astype(np.float32)),
            episode_costs=[float(c) for s in steps for c in s.episode_costs],
        )

    # Advantages -----------------------------------------------------------------------------------

    @torch.no_grad()
    def make_rollout(self, experience: Experience) -> Rollout:
        """Advantages and targets of the critic; one row per valid step."""

        def rows(values: Tensor) -> Tensor:
            return values[experience.valid].unsqueeze(1)

        observations = experience.observations[:-1][experience.valid]
        actions = experience.actions[experience.valid]
        logps = self.policy.head.logps(self.policy.body(observations), actions)
        values = returns = None
        if self.critic is None:
            # The value after the time limit is unknown and counts as 0.
            advantages = self._returns(experience, torch.zeros_like(experience.rewards))
        else:
            states = state_values(self.critic, experience)
            advantages = estimate_advantages(experience.rewards, states, experience, self.config)
            returns = rows(advantages + states.values)
            values = rows(states.values)
        if self.constraint is not None:
            advantages = self.constraint.penalized(advantages, experience)
        return Rollout(
            inputs={"observations": observations, "actions": actions},
            logps=logps.unsqueeze(1),
            advantages=rows(advantages),
            mask=torch.ones(len(logps), 1, dtype=torch.bool),
            values=values,
            returns=returns,
        )

    def _returns(
        self, experience: Experience, next_values: Float[Tensor, "time envs"]
    ) -> Float[Tensor, "time envs"]:
        return discounted_returns(
            experience.rewards.T,
            next_values.T,
            experience.terminated.T,
            experience.ended.T,
            gamma=self.config.gamma,
        ).T

    def evaluate_policy(self, inputs: dict[str, Tensor]) -> Evaluated:
        """Log-probabilities, entropies and values of the steps of a rollout."""
        observations = inputs["observations"]
        outputs = self.policy.body(observations)
        logps = self.policy.head.logps(outputs, inputs["actions"]).unsqueeze(1)
        values = None if self.critic is None else self.critic(observations)
        entropy = None
        if self.objective.entropy_coef:
            entropy = self.policy.head.entropy(outputs).unsqueeze(1)
        return Evaluated(logps, entropy, values)

    def gradient_variance(self, experience: Experience) -> GradientVariance:
        """Variance of the gradient over episodes, with the critic as baseline and without."""
        assert self.critic is not None
        with torch.no_grad():
            values, next_values = state_values(self.critic, experience)
            returns = self._returns(experience, next_values)
        parameters = [*self.policy.parameters()]
        baselines = {"with_baseline": values, "without": torch.zeros_like(values)}
        gradients: dict[str, list[Tensor]] = {name: [] for name in baselines}
        for env in range(experience.valid.shape[1]):
            steps = experience.valid[:, env]
            outputs = self.policy.body(experience.observations[:-1, env][steps])
            logps = self.policy.head.logps(outputs, experience.actions[:, env][steps])
            for name, baseline in baselines.items():
                loss = -(logps * (returns - baseline)[:, env][steps]).sum()
                gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
                gradients[name].append(nn.utils.parameters_to_vector(gradient))
        traces = {name: float(torch.stack(g).var(0).sum()) for name, g in gradients.items()}
        return GradientVariance(**traces)

    # State ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, and the curve so far."""
        return super().state() | {
            "environments": self.environments.state(),
            "needs_reset": self._observations is None,
            "recent_costs": list(self._recent_costs),
            "constraint": self.constraint and self.constraint.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        super().restore(state)
        observations = self.environments.restore(state["environments"])
        self._observations = None if state["needs_reset"] else observations
        self._recent_costs.extend(state["recent_costs"])
        if self.constraint is not None:
            self.constraint.restore(state["constraint"])
