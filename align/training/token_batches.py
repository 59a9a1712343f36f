"""Training with batches of a number of tokens: which rows they have, and their weights.

The rows are shuffled once by the seed and divided in that order; every epoch takes the batches in
another order. All ranks divide alike, and each takes every n-th batch; the largest batches are
halved until all ranks have equally many.

Batches then have different numbers of rows. TRL's losses of preferences are means over the rows of
a batch, and the mean of such means is not the mean over all rows of a step. So the loss of a batch
is multiplied by its number of rows divided by their mean over the batches of the step on all ranks.
The loss of SFT already is a mean over the tokens of a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from random import Random
from typing import Any

import torch
from accelerate.utils import gather
from transformers import Trainer
from transformers.trainer_pt_utils import BatchRebalanceSampler

from align.config.token_batches import TokenBatchStage
from align.models.token_batches import Item, divide
from align.runtime import distributed


class TokenBatches(BatchRebalanceSampler):
    """The batches of a rank, in another order in every epoch.

    transformers passes samplers of this base class on as samplers of batches that are already
    divided among the ranks.
    """

    def __init__(self, batches: Sequence[list[int]], *, seed: int, rank: int, ranks: int) -> None:
        self.batches, self.seed, self.rank, self.ranks = batches, seed, rank, ranks
        self.epoch = 0
        self.drop_last = False
        self.sampler = self  # where accelerate looks for `set_epoch` on several ranks

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.batches)))
        Random(f"{self.seed}:{self.epoch}").shuffle(order)
        for index in order[self.rank :: self.ranks]:
            yield self.batches[index]

    def __len__(self) -> int:
        return len(self.batches) // self.ranks


def build_batches(
    items: Sequence[Item], *, tokens: int, prefix_sharing: bool, seed: int, ranks: int
) -> list[list[int]]:
    """Batches of at most ``tokens`` tokens whose number is a multiple of ``ranks``.

    Batches with a single row cannot be halved; if no other is left, the first ones are repeated.
    """
    order = list(range(len(items)))
    Random(seed).shuffle(order)
    shuffled = [items[index] for index in order]
    parts = divide(shuffled, tokens=tokens, prefix_sharing=prefix_sharing)
    batches = [[order[index] for index in part] for part in parts]
    while len(batches) % ranks:
        place = max(range(len(batches)), key=lambda k: len(batches[k]))
        largest = batches[place]
        middle = len(largest) // 2
        if middle == 0:
            return batches + list(islice(cycle(batches), -len(batches) % ranks))
        batches[place : place + 1] = [largest[:middle], largest[middle:]]
    return batches


def use_token_batches(
    trainer: Any,
    config: TokenBatchStage,
    token_rows: Callable[[Mapping[str, Any]], Item],
    *,
    blocks: Sequence[list[int]] | None = None,
) -> None:
    """Divide the training rows of a trainer by ``tokens_per_batch``, if the stage sets it.

    ``token_rows`` returns the token rows of a row of the data set, which TRL truncates to
    ``max_length``. The rows of one of ``blocks`` stay in one batch.
    """
    if config.tokens_per_batch is None:
        return
    longest = trainer.args.max_length
    rows = [[ids[:longest] for ids in token_rows(row)] for row in trainer.train_dataset]
    if blocks is None:
        blocks = [[index] for index in range(len(rows))]
    batches = build_batches(
        [[ids for index in block for ids in rows[index]] for block in blocks],
        tokens=config.tokens_per_batch,
        prefix_sharing=config.prefix_sharing,
        seed=config.seed,
        ranks=distributed.world_size(),
    )
    batches = [[index for k in batch for index in blocks[k]] for batch in batches]
    trainer.token_batches = TokenBatches(
        batches, seed=config.seed, rank=distributed.rank(), ranks=distributed.world_size()
    )
    trainer.accelerator.gather = partial(_gather_rows, trainer.accelerator)


def _gather_rows(accelerator: Any, tensor: Any) -> Any:
    """Gather a tensor whose number of rows differs among the ranks, as TRL's metrics have."""
    if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0:
        return gather(tensor)
    counts = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = gather(accelerator.pad_across_processes(tensor))
    parts = padded.chunk(len(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class TokenBatchTrainer(Trainer):
    """A trainer whose step is the mean over its rows, whatever their division into batches."""

    token_batches: TokenBatches | None = None
    """The batches; None for a fixed number of rows."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.token_batches or super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of a step, and compute the weight of each by its rows."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._row_shares: deque[float] = deque()
        if self.token_batches is not None and items is None and batches:
            counts = [len(next(iter(batch.values()))) for batch in batches]
            own = torch.tensor([sum(counts), len(counts)], device=self.accelerator.device)
            total, number = self.accelerator.gather(own[None]).sum(0).tolist()
            self._row_shares.extend(count * number / total for count in counts)
        return batches, items

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of TRL with the weight of the batch, in training."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and getattr(self, "_row_shares", None):
            return loss * self._row_shares.popleft()
        return loss
