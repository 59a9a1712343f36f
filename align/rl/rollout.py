"""A rollout: actions of a policy with their advantages, the input of an update.

Left out: how it was collected, which differs between environments and language models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, device


@dataclass(frozen=True, slots=True)
class Rollout:
    """Rows of actions with everything that a loss needs; no tensor carries a gradient.

    Rows are shuffled and never split. In control, a row is one step (``[envs * steps, 1]``); in
    language, one completion (``[completions, tokens]``). Where ``mask`` is False, entries are
    padding and may have any value.
    """

    inputs: dict[str, Shaped[Tensor, "batch ..."]]
    """Inputs of the policy's forward pass; the first axis of each is the batch."""
    logps: Float[Tensor, "batch time"]
    """Log-probabilities of the actions, by the policy before the update, in nats."""
    advantages: Float[Tensor, "batch time"]
    """Advantages of the actions."""
    mask: Bool[Tensor, "batch time"]
    """True where there is an action."""
    values: Float[Tensor, "batch time"] | None = None
    """The critic's values before the update; None without a critic."""
    returns: Float[Tensor, "batch time"] | None = None
    """The critic's targets; None without a critic."""
    weights: Float[Tensor, "batch time"] | None = None
    """Importance weights, if another engine sampled than the one that computed ``logps``."""
    ref_logps: Float[Tensor, "batch time"] | None = None
    """Log-probabilities of the actions under a reference, for a KL term of the loss."""

    def __len__(self) -> int:
        return len(self.mask)

    def take(self, index: Int[Tensor, " rows"]) -> Rollout:
        """Copy the rows at ``index``, in that order."""
        return self._each(lambda tensor: tensor[index.to(tensor.device)])

    def split(self, parts: int) -> list[Rollout]:
        """Split the rows into consecutive parts, whose sizes differ by at most 1, as views."""
        if parts == 1:
            return [self]
        ends = [len(self) * part // parts for part in range(parts + 1)]
        return [self._each(itemgetter(slice(*part))) for part in itertools.pairwise(ends)]

    def to(self, target: device | str) -> Rollout:
        """Move every tensor to a device."""
        return self._each(lambda tensor: tensor.to(target))

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
            ref_logps=optional(self.ref_logps),
        )
