"""Keys of the algorithms that learn from a replay buffer of their own steps."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from align.config.base import between_keys
from align.config.control.base import Control


class Replay(Control):
    """Random actions at first, then updates with batches of a buffer of steps."""

    learning_rate: float = Field(1e-3, gt=0.0)
    """Learning rate of all networks."""
    buffer_size: int = Field(100_000, ge=1)
    """Steps in the replay buffer; later ones replace the oldest."""
    learning_starts: int = Field(1000, ge=0)
    """Steps with random actions before the first update."""
    batch_size: int = Field(256, ge=1)
    """Steps that an update samples from the buffer."""

    @between_keys
    def _check_learning_starts(self) -> Iterator[str]:
        if self.learning_starts >= self.steps:
            yield (
                f"`learning_starts` ({self.learning_starts}) must be less than `steps` "
                f"({self.steps}): otherwise nothing is learned; lower it"
            )

    @property
    def steps_before_learning(self) -> int:
        """Steps with random actions."""
        return self.learning_starts
