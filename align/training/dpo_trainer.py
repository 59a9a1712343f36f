"""TRL's DPO trainer with a correct ``sft`` loss under gradient accumulation and on several ranks.

TRL's ``sft`` loss is the mean over the tokens of a micro-batch. The mean of such means is not the
mean over all tokens, because micro-batches have different numbers of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from trl import DPOTrainer

from align.training.token_batches import TokenBatchTrainer

TOKEN_MEAN = "sft"
"""The loss of TRL that is a mean over tokens; all others are means over pairs."""


class TokenWeightedDPOTrainer(TokenBatchTrainer, DPOTrainer):
    """A ``DPOTrainer`` whose ``sft`` loss is the mean over the tokens of an optimizer step."""

    loss_types: list[str]
    loss_weights: list[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shares: deque[float] = deque()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of a step, and compute the weight of each by its tokens."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if TOKEN_MEAN in self.loss_types:
            self._shares = deque(self._token_shares(batches))
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a micro-batch with the weight of its tokens."""
        if not self._shares:
            return super().training_step(*args, **kwargs)
        share, weights = self._shares.popleft(), self.loss_weights
        self.loss_weights = [
            weight * share if loss == TOKEN_MEAN else weight
            for loss, weight in zip(self.loss_types, weights, strict=True)
        ]
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.loss_weights = weights

    def _token_shares(self, batches: list[Mapping[str, Any]]) -> list[float]:
        """The tokens of each micro-batch, divided by the mean over all of them, on all ranks."""
        # The first half of the rows are the chosen completions; the first token is never predicted.
        counts = [int(b["completion_mask"].chunk(2)[0][:, 1:].sum()) for b in batches]
        if not counts:
            return []
        own = torch.tensor([sum(counts), len(counts)], device=self.accelerator.device)
        total, number = self.accelerator.gather(own[None]).sum(0).tolist()
        return [count * number / total for count in counts]
