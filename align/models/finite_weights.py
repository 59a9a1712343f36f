"""Whether the weights of a model are finite numbers: neither NaN nor infinite."""

from __future__ import annotations

from torch import Tensor, nn


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight with a value that is not finite; None if all are finite.

    Of weights that are sharded over ranks, the part of this rank is examined. Quantized weights are
    skipped: training does not change them.
    """
    return next((name for name, weight in model.named_parameters() if not _is_finite(weight)), None)


def _is_finite(weight: Tensor) -> bool:
    held = getattr(weight, "ds_tensor", weight)  # DeepSpeed ZeRO-3
    held = held.to_local() if hasattr(held, "to_local") else held  # FSDP2
    held = held.detach()
    if not held.is_floating_point() or held.element_size() < 2:
        return True
    return bool(held.isfinite().all())
