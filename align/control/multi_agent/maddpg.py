"""MADDPG: actors that see their own observations, critics that may see those of all agents.

The policy of all agents is one :class:`Policy`, so that evaluation, files and ``align play`` are
those of all algorithms. The state has the replay buffer, all random numbers, and the actions of the
current episode, which a restored trainer repeats. Left out: discrete actions, ensembles of
policies, and estimates of the policies of others.

Source: Lowe et al. 2017, arXiv:1706.02275, algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from align.config.control.maddpg import MultiAgent
from align.control.networks import Policy, agent_networks
from align.control.seeds import SeededEpisodes
from align.control.spaces import EnvSpec
from align.control.trainer import Trainer, recent_mean

POINTS = 200
"""Points of the learning curve, unless updates are further apart."""

SATURATION = 1e-3
"""Weight of the squares of actions before tanh, which has no gradient at the bounds. It is that of
the authors' program, https://github.com/openai/maddpg."""


class Steps(NamedTuple):
    """Steps of all agents, in any order."""

    observations: Float[Tensor, "steps agents features"]
    actions: Float[Tensor, "steps agents actions"]
    """Actions with the bounds of the environment scaled to ±1."""
    rewards: Float[Tensor, "steps agents"]
    next_observations: Float[Tensor, "steps agents features"]
    terminated: Bool[Tensor, " steps"]
    """The episode reached a terminal state; false at a time limit."""


class Learner(nn.Module):
    """Policies and critics of all agents, their targets, and the optimizer."""

    def __init__(self, config: MultiAgent, spec: EnvSpec) -> None:
        super().__init__()
        self.config, self.n_agents = config, spec.n_agents
        self.policy = Policy(spec, **asdict(config.policy_shape))
        n_inputs = spec.n_features + spec.n_actions
        if config.critic == "independent":
            n_inputs //= spec.n_agents
        sizes = n_inputs, config.hidden_sizes, 1
        self.critics = agent_networks(spec.n_agents, *sizes, "relu", gain=1.0)
        self.trained = {"policy_loss": self.policy.body, "value_loss": self.critics}
        self.targets = nn.ModuleDict(copy.deepcopy(self.trained)).requires_grad_(False)
        weights = [weight for networks in self.trained.values() for weight in networks.parameters()]
        self.optimizer = torch.optim.Adam(weights, config.learning_rate)

    def seen_by_critics(
        self,
        observations: Float[Tensor, "b agents features"],
        own: Float[Tensor, "b agents actions"],
        others: Float[Tensor, "b agents actions"],
    ) -> Float[Tensor, "b agents inputs"]:
        """What each agent's critic evaluates: the action ``own`` of its agent.

        A centralized critic sees the actions ``others`` of the other agents beside it, and the
        observations of all.
        """
        if self.config.critic == "independent":
            return torch.cat([observations, own], -1)
        n = self.n_agents
        is_own = torch.eye(n, dtype=torch.bool)[..., None]  # [critics, agents, 1]
        actions = torch.where(is_own, own[:, None], others[:, None])
        joint = observations.flatten(1)[:, None].expand(-1, n, -1)
        return torch.cat([joint, actions.flatten(2)], -1)

    def losses(self, batch: Steps) -> dict[str, Tensor]:
        """Losses of the policies and of the critics: sums over agents of means over steps.

        Each trains its own networks, although the gradient of the policies passes the critics.
        """
        n = self.n_agents
        with torch.no_grad():
            following = batch.next_observations
            actions = self.targets["policy_loss"](following.flatten(1)).tanh().unflatten(1, (n, -1))
            seen = self.seen_by_critics(following, actions, actions)
            next_values = self.targets["value_loss"](seen).squeeze(-1)
            next_values = next_values * ~batch.terminated[:, None]
            returns = batch.rewards + self.config.gamma * next_values
        seen = self.seen_by_critics(batch.observations, batch.actions, batch.actions)
        errors = self.critics(seen).squeeze(-1) - returns
        unbounded = self.policy.body(batch.observations.flatten(1))
        own = unbounded.tanh().unflatten(1, (n, -1))
        values = self.critics(self.seen_by_critics(batch.observations, own, batch.actions))
        penalty = SATURATION * unbounded.unflatten(1, (n, -1)).square().mean(-1, keepdim=True)
        return {
            "policy_loss": (penalty - values).mean(0).sum(),
            "value_loss": errors.square().mean(0).sum(),
        }

    def update(self, batch: Steps) -> dict[str, float]:
        """Take one optimizer step, and move the targets. Returns the losses before it."""
        losses = self.losses(batch)
        for name, networks in self.trained.items():
            weights = [*networks.parameters()]
            gradients = torch.autograd.grad(losses[name], weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            for name, networks in self.trained.items():
                targets = self.targets[name].parameters()
                for target, weight in zip(targets, networks.parameters(), strict=True):
                    target.lerp_(weight, self.config.tau)
        return {name: float(loss.detach()) for name, loss in losses.items()}


class MultiAgentTrainer(Trainer[MultiAgent]):
    """Trains the networks of all agents, of one seed."""

    def __init__(self, config: MultiAgent, spec: EnvSpec, seed: int) -> None:
        super().__init__(config, seed)
        self.n_agents = spec.n_agents
        env = gymnasium.make(config.environment, **config.environment_options)
        self.env = SeededEpisodes(env, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.learner = Learner(config, spec)
        optimizer = self.learner.optimizer
        self.parts = {**dict(self.learner.named_children()), "optimizer": optimizer}
        self.critic = self.learner.critics
        self.low, self.high = (np.array(bound, np.float32) for bound in (spec.low, spec.high))
        n, size = spec.n_agents, min(config.buffer_size, config.steps)
        features, actions = (
            torch.zeros(size, n, total // n) for total in (spec.n_features, spec.n_actions)
        )
        self.buffer = Steps(
            features, actions, torch.zeros(size, n), features.clone(), torch.zeros(size) > 0
        )
        self.observations = self._reset()
        self.episode_return = 0.0
        self.losses: dict[str, float] = {}

    def train(self) -> dict[str, Any]:
        """Train for a part of the steps."""
        config, episodes_before = self.config, self.env.episodes
        n_steps = min(max(1, config.steps // POINTS), config.steps - self.steps)
        for _ in range(n_steps):
            self._step()
        self.check_weights()
        return {
            "episodes": self.env.episodes - episodes_before,
            "return": recent_mean(self.recent_returns),
            **self.losses,
        }

    def _step(self) -> None:
        """Take one step in the environment, and update where one is due."""
        config, shape = self.config, self.buffer.actions.shape[1:]
        if self.steps < config.learning_starts:
            actions = 2 * torch.rand(shape, generator=self.generator) - 1
        else:
            with torch.no_grad():
                actions = self.policy.body(self.observations.view(1, -1)).tanh().view(shape)
            noise = torch.randn(shape, generator=self.generator)
            actions = (actions + config.action_noise * noise).clamp(-1, 1)
        scaled = self.low + (self.high - self.low) * (actions.flatten().numpy() + 1) / 2
        following, reward, terminated, truncated, info = self.env.step(scaled)
        next_observations = self._by_agent(following)
        rewards = torch.from_numpy(info["agent_rewards"])
        row = self.observations, actions, rewards, next_observations, torch.tensor(terminated)
        for column, value in zip(self.buffer, row, strict=True):
            column[self.steps % len(column)] = value
        self.steps += 1
        self.observations = next_observations
        self.episode_return += reward
        if terminated or truncated:
            self.recent_returns.append(self.episode_return)
            self.observations, self.episode_return = self._reset(), 0.0
        if self.steps >= config.learning_starts and self.steps % config.train_every == 0:
            n_filled = min(self.steps, len(self.buffer.rewards))
            rows = torch.randint(n_filled, (config.batch_size,), generator=self.generator)
            self.losses = self.learner.update(Steps(*(column[rows] for column in self.buffer)))

    def _reset(self) -> Tensor:
        return self._by_agent(self.env.reset()[0])

    def _by_agent(self, observations: np.ndarray) -> Tensor:
        return torch.from_numpy(observations).view(self.n_agents, -1)

    # State ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Networks, optimizer, replay buffer, random numbers, episode, and the curve so far."""
        return super().state() | {
            "buffer": [column[: self.steps].clone() for column in self.buffer],
            "episodes": self.env.episodes,
            "actions": [torch.from_numpy(action) for action in self.env.actions],
            "episode_return": self.episode_return,
            "losses": self.losses,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        super().restore(state)
        for column, saved in zip(self.buffer, state["buffer"], strict=True):
            column[: len(saved)] = saved
        self.env.resume(state["episodes"], [action.numpy() for action in state["actions"]])
        self.observations = self._reset()
        self.episode_return, self.losses = state["episode_return"], dict(state["losses"])
