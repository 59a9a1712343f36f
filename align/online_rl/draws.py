"""Seeds of the completions that this process samples at once.

The seed of a completion depends on its place among those of all processes, so its random numbers do
not depend on the number of processes. Neither does the completion, except where rounding, which
depends on the other rows of a batch, changes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.config.online_rl import OnlineRL
from align.online_rl.prompts import completion_places, own_places
from align.runtime.seeds import derive_seed, derive_seeds


@dataclass(frozen=True, slots=True)
class Draw:
    """The completions that are sampled at once, on this process."""

    seed: int
    """The same on all processes."""
    places: Sequence[int]
    """Place of each completion of this process among those of all."""

    @property
    def seeds(self) -> list[int]:
        """The seed of each completion."""
        return derive_seeds(self.seed, self.places)

    def turn(self, number: int, rows: Sequence[int]) -> list[int]:
        """The seeds of a turn of the episodes at ``rows``."""
        return derive_seeds(derive_seed(self.seed, number), (self.places[row] for row in rows))


def training_draw(config: OnlineRL, step: int, number: int = 0, end: int | None = None) -> Draw:
    """Draw ``number`` of a step, up to the completion ``end`` of this process."""
    seed = derive_seed(config.seed, "sample", step, number)
    return Draw(seed, completion_places(config)[:end])


def held_out_draw(config: OnlineRL, n_prompts: int) -> Draw:
    """The completions of the held-out prompts, the same in every evaluation."""
    return Draw(derive_seed(config.seed, "evaluate"), own_places(n_prompts))
