"""Completions that carry a label each, as KTO wants them: their order, their partners for the KL term, their weights.

TRL 1.16 unpairs pairs into all chosen, then all rejected completions, by blocks of 1,000, and its KTO trainer reads them
in that order in every epoch: batches hold one label for hundreds of steps. Here the two labels are interleaved in their
proportion and every epoch has an order of its own, drawn from the seed.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from random import Random
from typing import Any

import torch

from align.config.training import KTO
from align.errors import UserError

RATIO = (1.0, 4 / 3)


# Order -------------------------------------------------------------------------------------------


def interleaved(
    labels: Sequence[bool],
    prompts: Sequence[Hashable],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[int]:
    """Places of all rows in an order whose every stretch of ``batch_size`` is a good batch.

    Each batch has both labels, in the proportion of the whole, and no prompt fills more than half of it, so that every row
    finds a completion of another prompt. A prompt's k-th desirable and k-th undesirable row (both sides of a pair) go to
    the same batch where these rules let them: what they share then cancels in the gradient, and is computed once. The last
    batch is filled up with rows from the beginning: fewer than a batch are seen twice, others in each epoch.

    Raises:
        UserError: No such order exists.
    """
    rows = len(labels)
    check(sum(labels), rows - sum(labels), batch_size=batch_size)
    batches = math.ceil(rows / batch_size)
    total = batches * batch_size if batches > 1 else rows
    sides = _shuffled(labels, prompts, Random(f"{seed}:{epoch}"))
    desirable = round(total * len(sides[True]) / rows)
    slots = {True: desirable, False: total - desirable}
    queues = {label: deque(islice(cycle(side), slots[label])) for label, side in sides.items()}
    found: list[list[int]] = []
    for start in range(0, total, batch_size):
        size = min(batch_size, total - start)
        # A label's slots are spread evenly: by slot t it has had its share of t, rounded down.
        wanted = [
            (slot + 1) * desirable // total > slot * desirable // total
            for slot in range(start, start + size)
        ]
        found.append(_batch(wanted, queues, prompts, room=size // 2))
    _repair(found, labels, prompts)
    return [row for batch in found for row in batch]


def check(desirable: int, undesirable: int, *, batch_size: int) -> None:
    """Make sure that there is one completion of each label for every batch.

    Raises:
        UserError: There is not.
    """
    rows = desirable + undesirable
    batches = math.ceil(rows / batch_size)
    for have, word in ((desirable, "desirable"), (undesirable, "undesirable")):
        if have == 0:
            raise UserError(
                f"no completion is {word}; KTO learns from both labels: name a source that has both"
            )
        if have < batches:
            raise UserError(
                f"{have:,} {word} completions of {rows:,} are not enough for {batches:,} batches: every batch holds both "
                f"labels; set `per_device_train_batch_size` to {math.ceil(rows / have)} or more"
            )


def _shuffled(
    labels: Sequence[bool], prompts: Sequence[Hashable], generator: Random
) -> dict[bool, list[int]]:
    """The rows of each label, shuffled alike: the k-th row of a prompt has one place under both labels."""
    keys: dict[tuple[Hashable, int], float] = {}
    seen: Counter[tuple[Hashable, bool]] = Counter()
    sides: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for row, (label, prompt) in enumerate(zip(labels, prompts, strict=True)):
        name = (prompt, seen[prompt, label])
        seen[prompt, label] += 1
        if name not in keys:
            keys[name] = generator.random()
        sides[label].append((keys[name], row))
    return {label: [row for _, row in sorted(side)] for label, side in sides.items()}


def _batch(
    wanted: Sequence[bool],
    queues: dict[bool, deque[int]],
    prompts: Sequence[Hashable],
    *,
    room: int,
) -> list[int]:
    """Take the next rows with these labels, passing over prompts that have no room left in this batch."""
    batch: list[int] = []
    held: Counter[Hashable] = Counter()
    for label in wanted:
        queue = queues[label]
        fits = (i for i, row in enumerate(queue) if held[prompts[row]] < room)
        place = next(fits, 0)  # none fits: `_repair` will exchange it
        row = queue[place]
        del queue[place]
        held[prompts[row]] += 1
        batch.append(row)
    return batch


def _repair(batches: list[list[int]], labels: Sequence[bool], prompts: Sequence[Hashable]) -> None:
    """Where the end of an epoch left a prompt with more than half a batch, exchange rows with other batches."""

    def crowded(batch: Sequence[int]) -> Iterator[int]:
        held: Counter[Hashable] = Counter()
        for place, row in enumerate(batch):
            held[prompts[row]] += 1
            if held[prompts[row]] > len(batch) // 2:
                yield place

    def swaps(batch: list[int], place: int) -> bool:
        for other in batches:
            for there, row in enumerate(other):
                if other is batch or labels[row] != labels[batch[place]]:
                    continue
                if prompts[row] == prompts[batch[place]]:
                    continue
                before = [len(list(crowded(each))) for each in (batch, other)]
                batch[place], other[there] = other[there], batch[place]
                after = [len(list(crowded(each))) for each in (batch, other)]
                if after[0] < before[0] and after[1] <= before[1]:
                    return True
                batch[place], other[there] = other[there], batch[place]
        return False

    for batch in batches:
        while (place := next(crowded(batch), None)) is not None:
            if not swaps(batch, place):
                raise UserError(
                    "one prompt has more than half of a batch's completions, so some find none of another prompt for "
                    "the KL term; add prompts, or set another `per_device_train_batch_size`"
                )


# Partners ----------------------------------------------------------------------------------------


def mismatched(prompts: Sequence[Hashable]) -> list[int]:
    """For each row of a batch the row whose completion it gets for the KL term: one of another prompt, each used once.

    Rows are laid in a ring, those of a prompt side by side, and turned by the largest such group. Where all prompts differ
    that is TRL's own rotation by one. Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1 (the estimate of z0).

    >>> mismatched(["a", "b", "c"])
    [2, 0, 1]
    >>> mismatched(["a", "a", "b", "b"])
    [2, 3, 0, 1]
    """
    held = Counter(prompts)
    most = max(held.values())
    assert 2 * most <= len(prompts), "one prompt has more than half of the batch"
    places = dict(zip(held, count(), strict=False))  # of a prompt, by its first row
    ring = sorted(range(len(prompts)), key=lambda row: places[prompts[row]])
    partners = [0] * len(ring)
    for place, row in enumerate(ring):
        partners[row] = ring[place - most]
    return partners


# Weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weights:
    """What the losses of either label are multiplied by, and the ratio of the two labels' sums."""

    desirable: float
    undesirable: float
    ratio: float

    @property
    def advised(self) -> bool:
        """Whether the ratio is in the range that the paper advises, up to rounding."""
        return RATIO[0] - 1e-6 <= self.ratio <= RATIO[1] + 1e-6


def weights(
    n_desirable: int,
    n_undesirable: int,
    *,
    desirable: float | None = None,
    undesirable: float | None = None,
) -> Weights:
    """Complete the weights so that ``desirable * n_desirable / (undesirable * n_undesirable)`` is in 1:1 to 4:3.

    What is given stays. Without either, the label with too little weight is raised to the nearer end of the range, and the
    other's weight is 1. Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.

    >>> weights(100, 100)
    Weights(desirable=1.0, undesirable=1.0, ratio=1.0)
    >>> weights(100, 400)
    Weights(desirable=4.0, undesirable=1.0, ratio=1.0)
    """
    counts = n_desirable / n_undesirable
    ratio = counts * (desirable or 1.0) / (undesirable or 1.0)
    wanted = min(max(ratio, RATIO[0]), RATIO[1])
    if desirable is None and (undesirable is not None or ratio <= wanted):
        desirable = (undesirable or 1.0) * wanted / counts
    if undesirable is None:
        desirable = desirable or 1.0
        undesirable = desirable * counts / wanted
    assert desirable is not None
    return Weights(desirable, undesirable, counts * desirable / undesirable)


COLUMNS = ("prompt_ids", "completion_ids", "label")  # that a batch is made of


def label_weights(config: KTO, labels: Any) -> Weights:
    desirable = sum(labels)
    check(desirable, len(labels) - desirable, batch_size=len(labels))  # both are there
    return weights(
        desirable,
        len(labels) - desirable,
        desirable=config.desirable_weight,
        undesirable=config.undesirable_weight,
    )


def weights_warning(weights: Weights) -> str:
    return (
        f"the desirable side weighs {weights.ratio:.2f} times the undesirable one, and the KTO paper advises 1 to 1.33; "
        "without `desirable_weight` and `undesirable_weight` they are set so"
    )


class MixedLabels(torch.utils.data.Dataset[dict[str, Any]]):
    """Labelled rows in an order of each epoch's own. accelerate's loader calls ``set_epoch`` before it begins one."""

    def __init__(self, rows: Any, *, batch_size: int, seed: int) -> None:
        self.rows = rows.select_columns(list(COLUMNS))
        self.labels: list[bool] = self.rows["label"][:]
        prompts = [hash(tuple(ids)) for ids in self.rows["prompt_ids"]]  # a tenth of the memory
        self._order = functools.partial(
            interleaved, self.labels, prompts, batch_size=batch_size, seed=seed
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.order = self._order(epoch=epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[self.order[place]]


def with_kl_partners(
    collate: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]]
) -> Any:
    """A batch of TRL's, in which the KL completion of each row is another prompt's."""
    partners = mismatched([tuple(row["prompt_ids"]) for row in rows])
    return collate(
        [
            row | {"KL_completion_ids": rows[partner]["completion_ids"]}
            for row, partner in zip(rows, partners, strict=True)
        ]
    )
