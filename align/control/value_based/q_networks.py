"""Double DQN and the dueling network, as subclasses of those of Stable-Baselines3."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn


class DoubleDQN(DQN):
    """DQN whose target is the target network's value of the trained network's best action.

    The maximum over one network's noisy values is too high on average; here the noise that chooses
    an action is not the noise of its value.

    Source: van Hasselt et al. 2016, arXiv:1509.06461, eq. 4.
    """

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Train with targets ``[batch, 1]``, whose maximum over actions is their only value."""
        target: Any = self.q_net_target

        def values_of_best_actions(observations: PyTorchObs) -> Tensor:
            best = self.q_net(observations).argmax(1, keepdim=True)
            return target(observations).gather(1, best)

        self.q_net_target = values_of_best_actions  # type: ignore[assignment]
        try:
            super().train(gradient_steps, batch_size)
        finally:
            self.q_net_target = target


class DuelingNetwork(QNetwork):
    """Action values as a value plus advantages with mean 0, in two streams.

    ``q_net`` computes the advantages; the stream of the value branches off before its last hidden
    layer and has the same widths. The best action has the largest advantage.

    Source: Wang et al. 2016, arXiv:1511.06581, eq. 9.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        widths = [self.features_dim, *self.net_arch][-2:]
        self.value = nn.Sequential(*create_mlp(widths[0], 1, widths[1:], self.activation_fn))

    def forward(self, obs: PyTorchObs) -> Tensor:
        """Action values ``[batch, actions]``."""
        shared = self.q_net[:-3](self.extract_features(obs, self.features_extractor))
        advantages = self.q_net[-3:](shared)
        values: Tensor = self.value(shared) + advantages - advantages.mean(1, keepdim=True)
        return values


class DuelingPolicy(DQNPolicy):
    """DQN's policy with dueling networks."""

    def make_q_net(self) -> DuelingNetwork:
        """A network, twice: trained and target."""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return DuelingNetwork(**arguments).to(torch.device(self.device))
