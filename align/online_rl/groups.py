"""Groups, the completions of one prompt. Those with equal scores teach nothing, and are replaced.

Drawing others is the dynamic sampling of DAPO (Yu et al. 2025, arXiv:2503.14476, section 3.2). All
seeds and prompts of a further draw follow from the step and the number of the draw, so a resumed
run equals an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from align.config.online_rl import OnlineRL
from align.config.online_rl_keys import GroupKeys
from align.data.rows import Row
from align.functional.masked import max_over_ranks, sum_over_ranks
from align.online_rl.completions import Completions
from align.online_rl.scoring import Scores

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Completions of this rank with their scores; the completions of a prompt are consecutive."""

    rows: list[Row]
    """The row of the prompt of each completion."""
    completions: Completions
    scores: Scores
    sampling_seconds: float
    """Time that sampling took."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> Batch:
        """The completions at ``indices``, in that order."""
        return Batch(
            [self.rows[i] for i in indices],
            _take(self.completions, indices),
            _take(self.scores, indices),
            self.sampling_seconds,
        )

    def join(self, other: Batch) -> Batch:
        """The completions of both batches."""
        return Batch(
            self.rows + other.rows,
            _join(self.completions, other.completions),
            _join(self.scores, other.scores),
            self.sampling_seconds + other.sampling_seconds,
        )


def mixed(scores: Tensor, n: int) -> list[bool]:
    """For each group of ``n`` completions, whether their scores differ.

    >>> mixed(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    [True, False]
    """
    groups = scores.view(-1, n)
    differ: list[bool] = (groups.amax(1) > groups.amin(1)).tolist()
    return differ


def draw_batch(
    draw: Callable[[int, int | None], Batch], config: OnlineRL, device: torch.device
) -> tuple[Batch, dict[str, float]]:
    """The completions of an update, and metrics of their groups.

    ``draw(number, groups)`` samples and scores completions of so many prompts, or of all prompts of
    a step. Groups with equal scores are replaced if the recipe filters them.
    """
    first = draw(0, None)
    if not isinstance(config, GroupKeys):
        return first, {}
    n = config.n_completions
    differ = mixed(first.scores.score, n)
    equal = torch.tensor([float(not each) for each in differ], device=device)
    total = sum_over_ranks(torch.stack([equal.sum(), torch.ones_like(equal).sum()]))
    metrics = {"equal_groups": float(total[0] / total[1])}
    if config.filter is None:
        return first, metrics
    batch, draws = fill_with_mixed_groups(
        first, draw, n=n, max_draws=config.max_draws, device=device
    )
    return batch, metrics | {"draws": float(draws)}


def fill_with_mixed_groups(
    first: Batch,
    draw: Callable[[int, int | None], Batch],
    *,
    n: int,
    max_draws: int,
    device: torch.device,
) -> tuple[Batch, int]:
    """Replace the groups of ``first`` whose scores are equal; returns the number of draws as well.

    Draws are counted from the first. After ``max_draws`` of them, groups with equal scores fill the
    batch. All ranks draw until none lacks a group, because a sampler may need all of them.
    """
    size, draws = len(first), 1
    kept, spare = _divide(first, n)
    while draws < max_draws:
        lacking = torch.tensor((size - len(kept)) // n, device=device)
        groups = int(max_over_ranks(lacking))
        if groups <= 0:
            break
        more, equal = _divide(draw(draws, groups), n)
        kept, spare = kept.join(more), spare.join(equal)
        draws += 1
    return kept.join(spare).take(range(size)), draws


def _divide(batch: Batch, n: int) -> tuple[Batch, Batch]:
    """The groups whose scores differ, with the time of the batch, and the others."""
    differ = [each for each in mixed(batch.scores.score, n) for _ in range(n)]
    others = batch.take([i for i, each in enumerate(differ) if not each])
    return (
        batch.take([i for i, each in enumerate(differ) if each]),
        dataclasses.replace(others, sampling_seconds=0.0),
    )


def _take(columns: T, indices: Sequence[int]) -> T:
    """A data class of columns with the entries at ``indices`` of each."""
    return _each(lambda column: _entries(column, indices), columns)


def _entries(column: Any, indices: Sequence[int]) -> Any:
    if isinstance(column, Tensor):
        return column[torch.tensor(indices, dtype=torch.long)]
    return [column[i] for i in indices]


def _join(columns: T, others: T) -> T:
    """A data class of columns with the entries of both."""

    def joined(column: Any, other: Any) -> Any:
        return torch.cat([column, other]) if isinstance(column, Tensor) else column + other

    return _each(joined, columns, others)


def _each(change: Callable[..., Any], *owners: T) -> T:
    """Change the columns of data classes: tensors, lists, and those in mappings; None stays."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(owners[0]):  # type: ignore[arg-type]
        columns = [getattr(owner, field.name) for owner in owners]
        if isinstance(columns[0], dict):
            parts = ([column[key] for column in columns] for key in columns[0])
            values[field.name] = dict(zip(columns[0], (change(*p) for p in parts), strict=True))
        else:
            values[field.name] = None if columns[0] is None else change(*columns)
    return dataclasses.replace(owners[0], **values)  # type: ignore[type-var]
