"""Policies and critics: small perceptrons, and the three distributions over actions that stand on them.

A policy is a body and a head. The body turns observations into the head's parameters; the head is a distribution:
:class:`Categorical`, :class:`Gaussian` or :class:`SquashedGaussian`, with the same five methods and nothing in common but
those. Noise is drawn for a whole stretch at once and then used step by step: drawing costs more than a forward here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from align.control.spaces import EnvSpec
from align.functional.policy_gradient import entropy

_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Categorical(nn.Module):
    """One of several actions, by logits."""

    def __init__(self, world: EnvSpec) -> None:
        super().__init__()
        self.actions = world.actions

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise: the greatest of logits plus it is a sample."""
        uniform = torch.empty(*shape, self.actions).exponential_(generator=generator)
        return -uniform.log_()

    def act(self, logits: Float[Tensor, "*b k"], noise: Float[Tensor, "*b k"] | float) -> Tensor:
        """Sample; with noise 0 take the likeliest."""
        return (logits + noise).argmax(-1)

    def logps(self, logits: Float[Tensor, "*b k"], actions: Shaped[Tensor, "*b"]) -> Tensor:
        """Log-probabilities of ``actions``."""
        return torch.log_softmax(logits, -1).gather(-1, actions[..., None]).squeeze(-1)

    def entropy(self, logits: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
        """Entropy in nats."""
        return entropy(logits)

    def to_world(self, actions: Shaped[Tensor, "*b"]) -> np.ndarray:
        """Actions as the environment takes them."""
        return actions.numpy()


class Gaussian(nn.Module):
    """Independent normal distributions around the body's means; their deviations do not depend on what is seen.

    An action beyond the bounds is taken at the bound, and counts as what was drawn.
    """

    low: Tensor
    high: Tensor

    def __init__(self, world: EnvSpec) -> None:
        super().__init__()
        self.actions = world.actions
        self.log_std = nn.Parameter(torch.zeros(world.actions))
        self.register_buffer("low", torch.tensor(world.low), persistent=False)
        self.register_buffer("high", torch.tensor(world.high), persistent=False)

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise."""
        return torch.empty(*shape, self.actions).normal_(generator=generator)

    def act(self, means: Float[Tensor, "*b k"], noise: Float[Tensor, "*b k"] | float) -> Tensor:
        """Sample; with noise 0 take the mean."""
        return means + self.log_std.exp() * noise

    def logps(self, means: Float[Tensor, "*b k"], actions: Float[Tensor, "*b k"]) -> Tensor:
        """Log-densities of ``actions`` as drawn."""
        return _normal_logps(means, self.log_std, actions).sum(-1)

    def entropy(self, means: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
        """Differential entropy in nats: ``log(std * sqrt(2 pi e))``, summed."""
        total = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return total.expand(means.shape[:-1])

    def to_world(self, actions: Float[Tensor, "*b k"]) -> np.ndarray:
        """Actions as the environment takes them."""
        return actions.clamp(self.low, self.high).numpy()


class SquashedGaussian(nn.Module):
    """:class:`Gaussian` numbers u, of which the environment takes ``tanh(u)``, stretched to its bounds.

    What is stored and scored is u: taking u back from a saturated tanh would lose it. Densities are those of what the
    environment takes.

    Source: Haarnoja et al. 2018, arXiv:1801.01290, appendix C.
    """

    low: Tensor
    high: Tensor

    def __init__(self, world: EnvSpec) -> None:
        super().__init__()
        self.actions = world.actions
        self.log_std = nn.Parameter(torch.zeros(world.actions))
        self.register_buffer("low", torch.tensor(world.low), persistent=False)
        self.register_buffer("high", torch.tensor(world.high), persistent=False)

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise."""
        return torch.empty(*shape, self.actions).normal_(generator=generator)

    def act(self, means: Float[Tensor, "*b k"], noise: Float[Tensor, "*b k"] | float) -> Tensor:
        """Sample u; with noise 0 take its mean."""
        return means + self.log_std.exp() * noise

    def logps(self, means: Float[Tensor, "*b k"], actions: Float[Tensor, "*b k"]) -> Tensor:
        """Log-densities: the normal one of u, less the logarithm of the slope from u to the environment's action.

        ``log(1 - tanh(u)**2)`` is ``2 (log 2 - u - softplus(-2 u))``, which does not overflow.
        """
        slope = 2 * (math.log(2) - actions - functional.softplus(-2 * actions))
        slope = slope + ((self.high - self.low) / 2).log()
        return (_normal_logps(means, self.log_std, actions) - slope).sum(-1)

    def entropy(self, means: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
        """Entropy of u in nats; that of ``tanh(u)`` has no closed form."""
        total = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return total.expand(means.shape[:-1])

    def to_world(self, actions: Float[Tensor, "*b k"]) -> np.ndarray:
        """Actions as the environment takes them."""
        return (self.low + (self.high - self.low) * (actions.tanh() + 1) / 2).numpy()


def _normal_logps(means: Tensor, log_std: Tensor, values: Tensor) -> Tensor:
    scaled = (values - means) * (-log_std).exp()
    return -0.5 * scaled.square() - log_std - 0.5 * math.log(2 * math.pi)


Head = Categorical | Gaussian | SquashedGaussian
_HEADS: dict[str, type[Head]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "squashed": SquashedGaussian,
}


class Policy(nn.Module):
    """A body and a head."""

    def __init__(
        self, world: EnvSpec, *, hidden: Sequence[int], activation: str, distribution: str | None
    ) -> None:
        super().__init__()
        kind = distribution or ("categorical" if world.low is None else "gaussian")
        self.head: Head = _HEADS[kind](world)
        # A last layer near 0: all actions are likely at first, and the first advantages decide.
        self.body = perceptron(world.features, hidden, world.actions, activation, gain=0.01)


def critic(world: EnvSpec, *, hidden: Sequence[int], activation: str) -> nn.Sequential:
    """The value of what is seen, ``[..., 1]``."""
    return perceptron(world.features, hidden, 1, activation, gain=1.0)


def perceptron(
    features: int, hidden: Sequence[int], outputs: int, activation: str, *, gain: float
) -> nn.Sequential:
    """Linear layers with orthogonal weights and no bias at first; ``gain`` is the last one's, the others have sqrt(2).

    Source: Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, detail 2.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([features, *hidden]):
        layers += [_linear(before, after, math.sqrt(2)), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, _linear([features, *hidden][-1], outputs, gain))


def _linear(before: int, after: int, gain: float) -> nn.Linear:
    layer = nn.Linear(before, after)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
