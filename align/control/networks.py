"""Policies and critics: small perceptrons with a distribution over actions.

A policy has a body, which maps observations to the parameters of its head, a distribution:
:class:`Categorical`, :class:`Gaussian` or :class:`SquashedGaussian`. Noise is drawn for many steps
at once: drawing it for each step would take longer than a forward pass. Left out: networks that
policy and critic share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from align.control.spaces import EnvSpec
from align.functional.policy_gradient import entropy

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_QUADRATURE = (_NODES, _WEIGHTS / math.sqrt(2 * math.pi))
"""Nodes and weights of means under the standard normal distribution."""
ILLEGAL = 1e9
"""What is subtracted from the logit of an illegal action."""
# In place: the inputs of a ReLU are not needed again, and new memory costs more than the maximum.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": partial(nn.ReLU, inplace=True),
}


class Categorical(nn.Module):
    """A distribution over discrete actions, by logits."""

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__()
        self.n_actions = spec.n_actions

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Gumbel noise ``[*shape, n_actions]``: the argmax of logits plus noise is a sample."""
        uniform = torch.empty(*shape, self.n_actions).exponential_(generator=generator)
        return -uniform.log_()

    def act(self, logits: Float[Tensor, "*b k"], noise: Float[Tensor, "*b k"] | float) -> Tensor:
        """Sample; with noise 0, the most likely action."""
        return (logits + noise).argmax(-1)

    def logps(self, logits: Float[Tensor, "*b k"], actions: Shaped[Tensor, "*b"]) -> Tensor:
        """Log-probabilities of ``actions``."""
        return torch.log_softmax(logits, -1).gather(-1, actions[..., None]).squeeze(-1)

    def entropy(self, logits: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
        """Entropy in nats."""
        return entropy(logits)

    def env_actions(self, actions: Shaped[Tensor, "*b"]) -> np.ndarray:
        """Actions for the environment."""
        return actions.numpy()


class Gaussian(nn.Module):
    """Independent normal distributions with learned deviations that no observation changes.

    The body computes the means. The environment receives actions clipped to its bounds; densities
    are those of the unclipped actions.
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__()
        self.n_actions = spec.n_actions
        self.log_std = nn.Parameter(torch.zeros(spec.n_actions))
        self.register_buffer("low", torch.tensor(spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.high), persistent=False)

    def noise(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise ``[*shape, n_actions]``."""
        return torch.empty(*shape, self.n_actions).normal_(generator=generator)

    def act(self, means: Float[Tensor, "*b k"], noise: Float[Tensor, "*b k"] | float) -> Tensor:
        """Sample; with noise 0, the mean."""
        return means + self.log_std.exp() * noise

    def logps(self, means: Float[Tensor, "*b k"], actions: Float[Tensor, "*b k"]) -> Tensor:
        """Log-densities of the unclipped ``actions``."""
        return _normal_logps(means, self.log_std, actions).sum(-1)

    def entropy(self, means: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
        """Differential entropy in nats: ``log(std * sqrt(2 pi e))``, summed."""
        total = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return total.expand(means.shape[:-1])

    def env_actions(self, actions: Float[Tensor, "*b k"]) -> np.ndarray:
        """Actions for the environment, clipped to its bounds."""
        return actions.clamp(self.low, self.high).numpy()


class SquashedGaussian(Gaussian):
    """:class:`Gaussian` values u; the environment receives ``tanh(u)``, scaled to its bounds.

    Actions are stored as u, which cannot be recovered from a saturated tanh. Densities and entropy
    are those of the action that the environment receives.

    Source: Haarnoja et al. 2018, arXiv:1801.01290, appendix C.
    """

    def logps(self, means: Float[Tensor, "*b k"], actions: Float[Tensor, "*b k"]) -> Tensor:
        """Log-densities: that of u minus the logarithm of the slope from u to the action."""
        slopes = _tanh_log_slope(actions) + ((self.high - self.low) / 2).log()
        return (_normal_logps(means, self.log_std, actions) - slopes).sum(-1)

    def entropy(self, means: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
        """Differential entropy in nats: that of u plus the mean logarithm of the slope.

        The mean has no closed form and is computed by Gauss-Hermite quadrature. The entropy of u
        alone grows without bound as the deviation grows, whereas the actions gather at the bounds.
        """
        nodes, weights = (torch.from_numpy(a).to(means) for a in _QUADRATURE)
        values = means[..., None] + self.log_std.exp()[:, None] * nodes
        slopes = (_tanh_log_slope(values) * weights).sum(-1) + ((self.high - self.low) / 2).log()
        return super().entropy(means) + slopes.sum(-1)

    def env_actions(self, actions: Float[Tensor, "*b k"]) -> np.ndarray:
        """Actions for the environment, within its bounds."""
        return (self.low + (self.high - self.low) * (actions.tanh() + 1) / 2).numpy()


def _normal_logps(means: Tensor, log_std: Tensor, values: Tensor) -> Tensor:
    scaled = (values - means) * (-log_std).exp()
    return -0.5 * scaled.square() - log_std - 0.5 * math.log(2 * math.pi)


def _tanh_log_slope(values: Tensor) -> Tensor:
    """``log(1 - tanh(u)**2)`` as ``2 (log 2 - u - softplus(-2 u))``, which does not overflow."""
    return 2 * (math.log(2) - values - functional.softplus(-2 * values))


Head = Categorical | Gaussian
_HEADS: dict[str, type[Head]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "squashed": SquashedGaussian,
    "legal": Categorical,
}


class LegalActions(nn.Sequential):
    """Lowers the logits of illegal actions so far that their probability is 0.

    The last entries of an observation are a mask of the legal actions.
    """

    def forward(self, observations: Float[Tensor, "*b f"]) -> Float[Tensor, "*b k"]:
        """Logits."""
        logits: Tensor = super().forward(observations)
        return logits - ILLEGAL * (1 - observations[..., -logits.shape[-1] :])


class AgentLinear(nn.Module):
    """The linear layers of several agents, computed at once."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])[:, None])

    def forward(self, inputs: Float[Tensor, "agents b i"]) -> Float[Tensor, "agents b o"]:
        """Outputs of each agent's layer on its own inputs."""
        return torch.baddbmm(self.bias, inputs, self.weight)


class AgentNetworks(nn.Sequential):
    """A perceptron for each agent, all of the same sizes."""

    def forward(self, inputs: Float[Tensor, "b agents i"]) -> Float[Tensor, "b agents o"]:
        """Outputs of each agent's network on its own inputs."""
        return super().forward(inputs.transpose(0, 1)).transpose(0, 1)


class AgentBodies(AgentNetworks):
    """The body of a policy of several agents, each of which sees its own observation only."""

    def forward(self, observations: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Parameters of the actions of all agents, one agent after another."""
        weight = self.get_parameter("0.weight")  # of the first layer, [agents, inputs, outputs]
        return super().forward(observations.unflatten(-1, (len(weight), -1))).flatten(1)


def agent_networks(
    n_agents: int,
    n_inputs: int,
    hidden_sizes: Sequence[int],
    n_outputs: int,
    activation: str,
    *,
    gain: float | None,
) -> AgentNetworks:
    """The perceptrons of :func:`perceptron`, one for each agent."""
    sizes = n_inputs, hidden_sizes, n_outputs
    networks = [perceptron(*sizes, activation, gain=gain) for _ in range(n_agents)]
    layers = zip(*networks, strict=True)
    return AgentNetworks(
        *(AgentLinear(each) if isinstance(each[0], nn.Linear) else each[0] for each in layers)
    )


class Policy(nn.Module):
    """A body, which maps observations to parameters, and a head, the distribution of actions."""

    def __init__(
        self,
        spec: EnvSpec,
        *,
        hidden_sizes: Sequence[int],
        activation: str,
        distribution: str | None,
        initialization: str = "orthogonal",
    ) -> None:
        super().__init__()
        name = distribution or ("categorical" if spec.low is None else "gaussian")
        self.head: Head = _HEADS[name](spec)
        # The small last layer makes all actions about equally likely at first.
        gain = None if initialization == "uniform" else 0.01
        sizes = spec.n_features // spec.n_agents, hidden_sizes, spec.n_actions // spec.n_agents
        if spec.n_agents > 1:
            self.body: nn.Sequential = AgentBodies(
                *agent_networks(spec.n_agents, *sizes, activation, gain=gain)
            )
        else:
            self.body = perceptron(*sizes, activation, gain=gain)
        if name == "legal":
            self.body = LegalActions(self.body)


def table_policy(spec: EnvSpec, table: Float[Tensor, "states actions"]) -> Policy:
    """The policy whose logits in a numbered state are a row of a table."""
    policy = Policy(spec, hidden_sizes=[], activation="tanh", distribution="categorical")
    weights = {"0.weight": table.T.float(), "0.bias": torch.zeros(spec.n_actions)}
    policy.body.load_state_dict(weights)
    return policy


def build_critic(
    spec: EnvSpec,
    *,
    hidden_sizes: Sequence[int],
    activation: str,
    initialization: str = "orthogonal",
) -> nn.Sequential:
    """A network that maps observations ``[..., n_features]`` to values ``[..., 1]``."""
    gain = None if initialization == "uniform" else 1.0
    return perceptron(spec.n_features, hidden_sizes, 1, activation, gain=gain)


def perceptron(
    n_inputs: int,
    hidden_sizes: Sequence[int],
    n_outputs: int,
    activation: str,
    *,
    gain: float | None,
) -> nn.Sequential:
    """Linear layers, initialized with orthogonal weights and zero biases.

    The last layer has ``gain``, the others sqrt(2). With gain None, all weights and biases are
    uniform, as torch draws them: between ±1 / sqrt(inputs of the layer).

    Source: Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, detail
    2.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([n_inputs, *hidden_sizes]):
        hidden_gain = None if gain is None else math.sqrt(2)
        layers += [_linear(before, after, hidden_gain), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, _linear([n_inputs, *hidden_sizes][-1], n_outputs, gain))


def _linear(before: int, after: int, gain: float | None) -> nn.Linear:
    layer = nn.Linear(before, after)
    if gain is not None:
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer
