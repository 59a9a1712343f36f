"""A limit on the costs of an episode: a Lagrangian multiplier, and a critic of costs.

The cost of a step is ``info["cost"]`` of the environment. The multiplier follows the undiscounted
costs of whole episodes, which the limit is about; the advantages of costs are discounted as those
of rewards are. Left out: several costs, and guarantees during training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from align.config.control.policy_gradient import PolicyGradient
from align.control.experience import Experience, estimate_advantages, state_values
from align.control.networks import build_critic
from align.control.seeds import derive_seed
from align.control.spaces import EnvSpec
from align.errors import UserError
from align.functional.constrained import ascended_multiplier, penalized_advantages
from align.rl.objective import Objective
from align.rl.rollout import Rollout
from align.rl.update import Evaluated, update


class Constraint:
    """The multiplier of a cost limit, and the critic that is the baseline of costs.

    Source: Ray, Achiam and Amodei 2019, Benchmarking Safe Exploration in Deep Reinforcement
    Learning, section 5 (PPO-Lagrangian).
    """

    def __init__(self, config: PolicyGradient, spec: EnvSpec, seed: int) -> None:
        assert config.cost_limit is not None
        self.config, self.limit, self.multiplier = config, config.cost_limit, 0.0
        self.weight = 0.0
        """Weight of the costs in the present update: the multiplier, and its damping."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, 4))
            self.critic = build_critic(
                spec,
                hidden_sizes=config.hidden_sizes,
                activation=config.activation,
                initialization=config.initialization,
            )
        self.optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=config.critic_learning_rate, eps=1e-5
        )
        self.parts = {"cost_critic": self.critic, "cost_optimizer": self.optimizer}
        self.generator = torch.Generator().manual_seed(derive_seed(seed, 5))

    def ascend(self, experience: Experience, *, learning_rate: float) -> None:
        """Update the multiplier by the mean cost of the ended episodes, if there are any.

        The damping is added to the multiplier for one update only. It lowers costs above the limit
        at once, whereas the multiplier alone is late and lets them circle around the limit.

        Source of the damping: Stooke, Achiam and Abbeel 2020, arXiv:2007.03964, algorithm 2.

        Raises:
            UserError: A step has no cost.
        """
        if bool(experience.costs.isnan().any()):
            raise UserError(
                f"`cost_limit`: a step of {self.config.environment} has no `cost` in `info`; every "
                "step needs one"
            )
        costs = experience.episode_costs
        if costs:
            mean = sum(costs) / len(costs)
            self.multiplier = ascended_multiplier(
                self.multiplier, cost=mean, limit=self.limit, learning_rate=learning_rate
            )
            self.weight = ascended_multiplier(
                self.multiplier, cost=mean, limit=self.limit, learning_rate=self.config.damping
            )

    @torch.no_grad()
    def advantages(self, experience: Experience) -> Float[Tensor, "time envs"]:
        """Advantages of the costs: positive where an action costs more than expected."""
        states = state_values(self.critic, experience)
        return estimate_advantages(experience.costs, states, experience, self.config)

    def penalized(
        self, advantages: Float[Tensor, "time envs"], experience: Experience
    ) -> Float[Tensor, "time envs"]:
        """Advantages of the rewards minus the weighted advantages of the costs."""
        costs = self.advantages(experience)
        return penalized_advantages(advantages, costs, multiplier=self.weight)

    def fit(self, experience: Experience, objective: Objective, *, learning_rate: float) -> None:
        """Train the critic of costs. The update is that of the policy with constant actions."""
        with torch.no_grad():
            values = state_values(self.critic, experience).values
        returns = (values + self.advantages(experience)).reshape(-1, 1)
        zeros = torch.zeros_like(returns)
        rollout = Rollout(
            inputs={"observations": experience.observations[:-1].flatten(0, 1), "logps": zeros},
            logps=zeros,
            advantages=zeros,
            mask=torch.ones_like(returns, dtype=torch.bool),
            values=values.reshape(-1, 1),
            returns=returns,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        only_values = Objective(
            epochs=objective.epochs,
            minibatches=objective.minibatches,
            max_grad_norm=objective.max_grad_norm,
        )
        update(self._evaluate, rollout, only_values, self.optimizer, generator=self.generator)

    def _evaluate(self, inputs: dict[str, Tensor]) -> Evaluated:
        return Evaluated(logps=inputs["logps"], values=self.critic(inputs["observations"]))

    def state(self) -> dict[str, Any]:
        """Multiplier and random numbers; ``parts`` has its own."""
        numbers = {"multiplier": self.multiplier, "weight": self.weight}
        return numbers | {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state` returned."""
        self.multiplier, self.weight = state["multiplier"], state["weight"]
        self.generator.set_state(state["generator"])
