"""Whether the weights of a model are finite numbers: neither NaN nor infinite."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight with a value that is not finite; None if all are finite.

    Of weights that are sharded over ranks, the part of this rank is examined. Quantized weights are
    skipped: training does not change them.
    """
    return next((name for name, p in model.named_parameters() if not is_finite(_own_part(p))), None)


def is_finite(weight: Tensor) -> bool:
    """Whether all values of a tensor are finite; of quantized ones, always."""
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.numel() == 0:
        return True
    # `isfinite` needs 1.75 times the memory of the largest weight; extremes need none, and are NaN
    # where a value is.
    smallest, largest = torch.aminmax(weight.detach())
    return bool(smallest.isfinite() & largest.isfinite())


def _own_part(weight: Tensor) -> Tensor:
    held = getattr(weight, "ds_tensor", weight)  # DeepSpeed ZeRO-3
    return held.to_local() if hasattr(held, "to_local") else held  # FSDP2
