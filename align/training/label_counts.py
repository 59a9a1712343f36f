"""How many completions of each label KTO needs.

Imports no torch, so that ``align check`` counts too.
"""

from __future__ import annotations

import math

from align.errors import DataError


def check_label_counts(desirable: int, undesirable: int, *, batch_size: int) -> None:
    """Check that there is at least one completion of each label per batch.

    Raises:
        DataError: A label has too few completions.
    """
    rows = desirable + undesirable
    batches = math.ceil(rows / batch_size)
    for count, label in ((desirable, "desirable"), (undesirable, "undesirable")):
        if count == 0:
            raise DataError(
                f"no completion is {label}, but KTO needs both labels; use a source that has both"
            )
        if count < batches:
            raise DataError(
                f"{count:,} {label} of {rows:,} completions are not enough for {batches:,} "
                "batches, which all need both labels; set `per_device_train_batch_size` to "
                f"{math.ceil(rows / count)} or more"
            )
