"""Implicit Q-learning and behavior cloning: the losses of a batch of recorded steps, and an update.

IQL never values an action outside of the data. Behavior cloning is the same imitation with equal
weights. Source: Kostrikov, Nair and Levine 2022, arXiv:2110.06169, algorithm 1.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from align.config.control.offline import Offline
from align.control.networks import Gaussian, Policy, build_critic
from align.control.recorded_steps import RecordedSteps
from align.control.spaces import EnvSpec
from align.functional.offline import advantage_weights, expectile_loss

LOG_STD = -5.0, 2.0
"""Bounds of the log-deviation of continuous actions: without them, equal actions have none."""


class ImitationLearner(nn.Module):
    """Policy, value, two action values, and the targets of those."""

    def __init__(self, config: Offline, spec: EnvSpec) -> None:
        super().__init__()
        self.config, self.n_actions, self.is_discrete = config, spec.n_actions, spec.low is None
        sizes: dict[str, Any] = {"hidden_sizes": config.hidden_sizes, "activation": "relu"}
        pairs = spec._replace(n_features=spec.n_features + spec.n_actions)
        self.policy = Policy(spec, **asdict(config.policy_shape))
        self.value = build_critic(spec, **sizes)
        self.action_values = nn.ModuleList([build_critic(pairs, **sizes) for _ in range(2)])
        self.targets = copy.deepcopy(self.action_values).requires_grad_(False)
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(trained, config.learning_rate, fused=True)

    def losses(self, batch: RecordedSteps) -> dict[str, Tensor]:
        """Mean losses of the steps; each trains its networks and is constant in the others."""
        logps = self.policy.head.logps(self.policy.body(batch.observations), batch.actions)
        if self.config.algorithm == "behavior_cloning":
            return {"policy_loss": -logps.mean()}
        actions = one_hot(batch.actions, self.n_actions) if self.is_discrete else batch.actions
        pairs = torch.cat([batch.observations, actions], -1)
        targets = torch.cat([network(pairs) for network in self.targets], -1).amin(-1)
        advantages = targets - self.value(batch.observations).squeeze(-1)
        with torch.no_grad():
            weights = advantage_weights(advantages, temperature=self.config.weight_temperature)
            next_values = self.value(batch.next_observations).squeeze(-1) * ~batch.terminated
            returns = batch.rewards + self.config.gamma * next_values
        errors = (
            torch.cat([network(pairs) for network in self.action_values], -1) - returns[:, None]
        )
        return {
            "policy_loss": -(weights * logps).mean(),
            "value_loss": expectile_loss(advantages, expectile=self.config.value_expectile).mean(),
            "action_value_loss": errors.square().sum(-1).mean(),
        }

    def update(self, batch: RecordedSteps) -> dict[str, Tensor]:
        """Take one optimizer step, and move the targets. Returns the losses before it."""
        losses = self.losses(batch)
        self.optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        self.optimizer.step()
        with torch.no_grad():
            if isinstance(self.policy.head, Gaussian):
                self.policy.head.log_std.clamp_(*LOG_STD)
            pairs = zip(self.targets.parameters(), self.action_values.parameters(), strict=True)
            for target, weight in pairs:
                target.lerp_(weight, self.config.target_rate)
        return {name: loss.detach() for name, loss in losses.items()}
