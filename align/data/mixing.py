"""data.mixing"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from align.data.deduplication import KEPT, WEIGHED_OUT, pairs_of
from align.data.row_store import _digest

if TYPE_CHECKING:
    from align.data.row_store import RowTable


def apply_weights(table: RowTable, weights: Mapping[int, float], seed: int) -> None:
    """Leave out rows so that the sources' shares of what is kept are as ``weights`` say.

    No row is repeated: the source that is shortest for its weight stays whole. A hash of the row and the seed decides,
    so the same rows stay wherever they stand.
    """
    origins = (
        np.frombuffer(table.origins, dtype=np.uint16) if len(table) else np.zeros(0, np.uint16)
    )
    rows = {o: np.flatnonzero((origins == o) & (table.verdict == KEPT)) for o in weights}
    here = {o: weight for o, weight in weights.items() if len(rows[o])}
    if not here:
        return
    scale = min(len(rows[o]) / weight for o, weight in here.items())
    mixed = pairs_of(table.keys)[:, 0] ^ np.uint64(_digest(str(seed))[0])
    mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(31)
    for origin, weight in here.items():
        target = int(scale * weight + 1e-9)
        ordered = rows[origin][np.argsort(mixed[rows[origin]], kind="stable")]
        which = np.zeros(len(table), dtype=bool)
        which[ordered[target:]] = True
        table.drop(which, WEIGHED_OUT)
