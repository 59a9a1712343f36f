"""What a policy did and how good it was, ready to learn from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, device


@dataclass(frozen=True, slots=True)
class Rollout:
    """Rows of actions, with all that a loss needs to know about them. Everything in it is constant: no gradient.

    A row is what is shuffled and never torn apart. Control has one step a row (``[envs * steps, 1]``), language one
    completion (``[completions, tokens]``). Where ``mask`` is False the entries are padding and may hold anything.
    """

    inputs: dict[str, Shaped[Tensor, "batch ..."]]
    """What the policy's forward needs; the first axis of each is the batch."""
    logps: Float[Tensor, "batch time"]
    """Log-probabilities of the actions taken, by the policy before the update. In nats."""
    advantages: Float[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    """True where there is an action."""
    values: Float[Tensor, "batch time"] | None = None
    """The critic's values before the update; None without a critic."""
    returns: Float[Tensor, "batch time"] | None = None
    """The critic's targets; None without a critic."""
    weights: Float[Tensor, "batch time"] | None = None
    """Importance weights, where another engine sampled than the one that gave ``logps``."""

    def __len__(self) -> int:
        return len(self.mask)

    def take(self, index: Int[Tensor, " rows"]) -> Rollout:
        """Copy the rows at ``index``, in its order."""
        return self._each(lambda tensor: tensor[index.to(tensor.device)])

    def split(self, parts: int) -> list[Rollout]:
        """Cut the rows into consecutive parts whose sizes differ by 1 at most. Nothing is copied."""
        if parts == 1:
            return [self]
        ends = [len(self) * part // parts for part in range(parts + 1)]
        return [self._each(itemgetter(slice(*part))) for part in itertools.pairwise(ends)]

    def to(self, where: device | str) -> Rollout:
        """Move every tensor to a device."""
        return self._each(lambda tensor: tensor.to(where))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rollout:
        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Rollout(
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            logps=change(self.logps),
            advantages=change(self.advantages),
            mask=change(self.mask),
            values=optional(self.values),
            returns=optional(self.returns),
            weights=optional(self.weights),
        )
