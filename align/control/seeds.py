"""Seeds derived from the seed of a run, one for each purpose."""

from __future__ import annotations

import numpy as np


def derive_seed(*numbers: int) -> int:
    """A seed for one purpose, different from those of other purposes and of other seeds."""
    # Vector environments use consecutive seeds from the one that they receive.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] // 2)
