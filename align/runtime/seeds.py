"""Seeds derived from the recipe's seed and the place where a random draw happens.

Draws with different purposes are independent. No random state is kept between training steps, so a
checkpoint needs none: the seed of a draw depends only on its purpose, the step, and the place of a
row or the rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def derive_seed(seed: int, *parts: object) -> int:
    """A 63-bit seed that depends on every argument, such as a purpose, a step and a rank."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derive_seeds(seed: int, places: Iterable[int]) -> list[int]:
    """A seed for each place."""
    return [derive_seed(seed, place) for place in places]


def generator(seed: int, *parts: object) -> torch.Generator:
    """A CPU random generator with the derived seed."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
