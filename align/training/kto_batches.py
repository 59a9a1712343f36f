"""Batches of labeled completions for KTO: order, partners for the KL term, and label weights.

TRL 1.16 unpairs pairs into all chosen, then all rejected completions, in blocks of 1,000, and its
KTO trainer reads them in that order in every epoch: for hundreds of steps, a batch has a single
label. Here both labels are interleaved in their proportion, and every epoch has another order,
derived from the seed.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

import torch

from align.config.training import KTO
from align.errors import DataError
from align.training.label_counts import check_label_counts

RECOMMENDED_RATIO = (1.0, 4 / 3)
"""Range of the ratio of the summed weights of desirable and undesirable completions, from the KTO
paper."""
COLUMNS = ("prompt_ids", "completion_ids", "label")
"""Columns of a tokenized row that TRL's collator reads."""
BLOCK = 4
"""Fewest rows that stay together where batches have a number of tokens: both sides of two pairs."""


# Order -------------------------------------------------------------------------------------------


def interleaved(
    labels: Sequence[bool],
    prompts: Sequence[Hashable],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[int]:
    """Order of the rows in an epoch, as row indices; every ``batch_size`` of them form a batch.

    Each batch has both labels in the proportion of the whole data, and no prompt has more than half
    of a batch, so that every row can get the completion of another prompt for the KL term. The k-th
    desirable and the k-th undesirable row of a prompt (both sides of a pair) share a batch if these
    rules allow it: then their common part cancels in the gradient and is computed once. The last
    batch is filled with the first rows, fewer than a batch, which differ between epochs.

    Raises:
        DataError: No such order exists.
    """
    rows = len(labels)
    check_label_counts(sum(labels), rows - sum(labels), batch_size=batch_size)
    n_batches = math.ceil(rows / batch_size)
    total = n_batches * batch_size if n_batches > 1 else rows
    sides = _shuffled(labels, prompts, Random(f"{seed}:{epoch}"))
    desirable = round(total * len(sides[True]) / rows)
    slots = {True: desirable, False: total - desirable}
    queues = {label: deque(islice(cycle(side), slots[label])) for label, side in sides.items()}
    batches: list[list[int]] = []
    for start in range(0, total, batch_size):
        size = min(batch_size, total - start)
        # The slots of a label are spread evenly: the first t slots include its share of t, rounded
        # down.
        batch_labels = [
            (slot + 1) * desirable // total > slot * desirable // total
            for slot in range(start, start + size)
        ]
        batches.append(_take_batch(batch_labels, queues, prompts, limit=size // 2))
    _repair(batches, labels, prompts)
    return [row for batch in batches for row in batch]


def _shuffled(
    labels: Sequence[bool], prompts: Sequence[Hashable], generator: Random
) -> dict[bool, list[int]]:
    """Shuffle the rows of each label, with equal sort keys for both sides of a pair."""
    keys: dict[tuple[Hashable, int], float] = {}
    seen: Counter[tuple[Hashable, bool]] = Counter()
    sides: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for row, (label, prompt) in enumerate(zip(labels, prompts, strict=True)):
        pair = (prompt, seen[prompt, label])
        seen[prompt, label] += 1
        if pair not in keys:
            keys[pair] = generator.random()
        sides[label].append((keys[pair], row))
    return {label: [row for _, row in sorted(side)] for label, side in sides.items()}


def _take_batch(
    labels: Sequence[bool],
    queues: dict[bool, deque[int]],
    prompts: Sequence[Hashable],
    *,
    limit: int,
) -> list[int]:
    """Take the next row of each label in ``labels``, at most ``limit`` rows of one prompt."""
    batch: list[int] = []
    counts: Counter[Hashable] = Counter()
    for label in labels:
        queue = queues[label]
        candidates = (i for i, row in enumerate(queue) if counts[prompts[row]] < limit)
        index = next(candidates, 0)  # without a candidate, `_repair` swaps the row later
        row = queue[index]
        del queue[index]
        counts[prompts[row]] += 1
        batch.append(row)
    return batch


def _repair(batches: list[list[int]], labels: Sequence[bool], prompts: Sequence[Hashable]) -> None:
    """Swap rows between batches until no prompt has more than half of a batch.

    Only batches at the end of an epoch need this.

    Raises:
        DataError: No swap helps.
    """
    for batch in batches:
        while (index := next(_surplus(batch, prompts), None)) is not None:
            if not _swap(batch, index, batches, labels, prompts):
                raise DataError(
                    "one prompt has more than half of the completions of a batch, so some of them "
                    "get no completion of another prompt for the KL term; add prompts, or set "
                    "another `per_device_train_batch_size`"
                )


def _surplus(batch: Sequence[int], prompts: Sequence[Hashable]) -> Iterator[int]:
    """Indices of the rows by which a prompt exceeds half of the batch."""
    counts: Counter[Hashable] = Counter()
    for index, row in enumerate(batch):
        counts[prompts[row]] += 1
        if counts[prompts[row]] > len(batch) // 2:
            yield index


def _swap(
    batch: list[int],
    index: int,
    batches: list[list[int]],
    labels: Sequence[bool],
    prompts: Sequence[Hashable],
) -> bool:
    """Swap a row with one of the same label in another batch to reduce the surplus.

    False if every swap would add a surplus there.
    """

    def surplus(other: list[int]) -> tuple[int, int]:
        own, others = (len(list(_surplus(each, prompts))) for each in (batch, other))
        return own, others

    for other in batches:
        for k, row in enumerate(other):
            if other is batch or labels[row] != labels[batch[index]]:
                continue
            if prompts[row] == prompts[batch[index]]:
                continue
            before = surplus(other)
            batch[index], other[k] = other[k], batch[index]
            after = surplus(other)
            if after[0] < before[0] and after[1] <= before[1]:
                return True
            batch[index], other[k] = other[k], batch[index]
    return False


# Partners ----------------------------------------------------------------------------------------


def mismatched(prompts: Sequence[Hashable]) -> list[int]:
    """The partner of each row for the KL term: a row of another prompt, each used once.

    Rows are arranged in a ring, grouped by prompt, and rotated by the size of the largest group. If
    all prompts differ, this is TRL's rotation by one.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1 (the estimate of z0).

    >>> mismatched(["a", "b", "c"])
    [2, 0, 1]
    >>> mismatched(["a", "a", "b", "b"])
    [2, 3, 0, 1]
    """
    counts = Counter(prompts)
    largest = max(counts.values())
    assert 2 * largest <= len(prompts), "one prompt has more than half of the batch"
    rank = {prompt: k for k, prompt in enumerate(counts)}  # prompts by their first row
    ring = sorted(range(len(prompts)), key=lambda row: rank[prompts[row]])
    partners = [0] * len(ring)
    for place, row in enumerate(ring):
        partners[row] = ring[place - largest]
    return partners


# Weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weights:
    """Factors of the losses of both labels."""

    desirable: float
    undesirable: float
    ratio: float
    """Summed weights of the desirable completions, divided by those of the undesirable ones."""

    @property
    def is_recommended(self) -> bool:
        """Whether the ratio is in the range that the paper recommends, up to rounding."""
        return RECOMMENDED_RATIO[0] - 1e-6 <= self.ratio <= RECOMMENDED_RATIO[1] + 1e-6


def complete_weights(
    n_desirable: int,
    n_undesirable: int,
    *,
    desirable: float | None = None,
    undesirable: float | None = None,
) -> Weights:
    """Choose missing weights so that the summed weights of both labels have a ratio of 1:1 to 4:3.

    A weight that is set does not change. If neither is set, the weight of the label with too little
    total weight is raised to the nearer end of the range, and the other weight is 1.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.

    >>> complete_weights(100, 100)
    Weights(desirable=1.0, undesirable=1.0, ratio=1.0)
    >>> complete_weights(100, 400)
    Weights(desirable=4.0, undesirable=1.0, ratio=1.0)
    """
    counts = n_desirable / n_undesirable
    ratio = counts * (desirable or 1.0) / (undesirable or 1.0)
    target = min(max(ratio, RECOMMENDED_RATIO[0]), RECOMMENDED_RATIO[1])
    if desirable is None and (undesirable is not None or ratio <= target):
        desirable = (undesirable or 1.0) * target / counts
    if undesirable is None:
        desirable = desirable or 1.0
        undesirable = desirable * counts / target
    assert desirable is not None
    return Weights(desirable, undesirable, counts * desirable / undesirable)


def label_weights(config: KTO, labels: Sequence[bool]) -> Weights:
    """The weights of a stage: those of its config, completed for the numbers of its labels.

    Raises:
        DataError: A label has no completion.
    """
    desirable = sum(labels)
    check_label_counts(desirable, len(labels) - desirable, batch_size=len(labels))
    return complete_weights(
        desirable,
        len(labels) - desirable,
        desirable=config.desirable_weight,
        undesirable=config.undesirable_weight,
    )


def weights_warning(weights: Weights) -> str:
    """The warning for weights outside of the recommended range."""
    return (
        f"the desirable completions have {weights.ratio:.2f} times the weight of the undesirable "
        "ones, but the KTO paper recommends 1 to 1.33; remove `desirable_weight` and "
        "`undesirable_weight` to stay in this range"
    )


# Batches -----------------------------------------------------------------------------------------


class LabeledRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenized rows with their labels, in the order of the data."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows.select_columns(list(COLUMNS))
        self.labels: list[bool] = self.rows["label"][:]
        # Hashes take a tenth of the memory of the ids.
        self.prompts = [hash(tuple(ids)) for ids in self.rows["prompt_ids"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[index]
        return row

    def blocks(self, seed: int) -> list[list[int]]:
        """Row indices in blocks that keep the rules of :func:`interleaved`, and so do unions.

        A block is the smallest batch that can have both labels and both sides of a pair.

        Raises:
            DataError: A label has no completion, or one prompt has most of the rows.
        """
        rows, desirable = len(self.labels), sum(self.labels)
        check_label_counts(desirable, rows - desirable, batch_size=rows)
        size = max(BLOCK, math.ceil(rows / min(desirable, rows - desirable)))
        order = interleaved(self.labels, self.prompts, batch_size=size, seed=seed, epoch=0)
        return [order[start : start + size] for start in range(0, len(order), size)]


class MixedLabels(LabeledRows):
    """Labeled rows in the order of the current epoch.

    accelerate's data loader calls ``set_epoch`` before each epoch.
    """

    def __init__(self, rows: Any, *, batch_size: int, seed: int) -> None:
        super().__init__(rows)
        self._order = functools.partial(
            interleaved, self.labels, self.prompts, batch_size=batch_size, seed=seed
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Compute the order of an epoch."""
        self.order = self._order(epoch=epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(self.order[index])


def with_kl_partners(
    collate: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]]
) -> Any:
    """Collate a batch as TRL does; the KL completion of each row belongs to another prompt."""
    partners = mismatched([tuple(row["prompt_ids"]) for row in rows])
    return collate(
        [
            row | {"KL_completion_ids": rows[partner]["completion_ids"]}
            for row, partner in zip(rows, partners, strict=True)
        ]
    )
