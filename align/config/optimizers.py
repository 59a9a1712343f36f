"""Fields of transformers that its optimizers do not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ADAFACTOR = ("galore_adafactor", "galore_adafactor_layerwise", "adafactor")
_RMSPROP = ("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit")
_NOT_ADAM = (*_ADAFACTOR, *_RMSPROP, "sgd", "adagrad", "lomo", "adalomo")
_LION = ("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit")
_WITHOUT_ARGUMENTS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("adafactor", "lomo", "adalomo", *_LION),
)
UNREAD: dict[str, tuple[str, ...]] = {
    "adam_beta1": _NOT_ADAM,
    "adam_beta2": _NOT_ADAM,
    "adam_epsilon": (*_NOT_ADAM, *_LION),
    "optim_args": _WITHOUT_ARGUMENTS,
}
"""Fields with the values of ``optim`` whose optimizers do not read them."""
LOW_RANK = ("galore_", "apollo_")
"""Beginnings of the values of ``optim`` that read ``optim_target_modules``."""


def unread_fields(optimizer: str, changed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields among ``changed`` that an optimizer does not read, each with the error."""
    for name, optimizers in UNREAD.items():
        if name in changed and optimizer in optimizers:
            yield name, f"`optim: {optimizer}` does not read it; remove it"
    if "optim_target_modules" in changed and not optimizer.startswith(LOW_RANK):
        yield (
            "optim_target_modules",
            f"only GaLore and APOLLO read it, not `{optimizer}`; remove it",
        )
