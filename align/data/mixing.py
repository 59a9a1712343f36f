"""Mixing: subsample the sources of a mixture to the shares that their weights set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from align.config.data import Prepare
from align.data.row_store import SUBSAMPLED, RowTable, as_digests, as_numbers, digest_words


def mix(tables: Iterable[RowTable], config: Prepare) -> None:
    """Apply the weights of ``config.mixture`` to each table; without weights, all rows are kept."""
    weights = {i: e.weight for i, e in enumerate(config.mixture) if e.weight is not None}
    for table in tables:
        apply_weights(table, weights, config.split_seed)


def apply_weights(table: RowTable, weights: Mapping[int, float], seed: int) -> None:
    """Drop rows until the sources' shares of the kept rows are proportional to ``weights``.

    No row is repeated: the source that is smallest relative to its weight keeps all rows. A hash of
    row and seed selects the rows, so the selection does not depend on their order.
    """
    sources = as_numbers(table.source_numbers, np.uint16)
    rows = {source: np.flatnonzero((sources == source) & table.kept) for source in weights}
    present = {source: weight for source, weight in weights.items() if len(rows[source])}
    if not present:
        return
    scale = min(len(rows[source]) / weight for source, weight in present.items())
    hashes = as_digests(table.row_digests)[:, 0] ^ np.uint64(digest_words(str(seed))[0])
    hashes = hashes * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(31)
    for source, weight in present.items():
        size = int(scale * weight + 1e-9)
        ordered = rows[source][np.argsort(hashes[rows[source]], kind="stable")]
        mask = np.zeros(len(table), dtype=bool)
        mask[ordered[size:]] = True
        table.drop(mask, SUBSAMPLED)
