"""Optimizers of transformers: the packages that they need, and the fields that they do not read."""

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
PACKAGES = (
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("adamw_torch_4bit", "torchao", "torchao"),
    ("adamw_torch_8bit", "torchao", "torchao"),
    *(
        (part, "bitsandbytes", "-e '.[quantization]'")
        for part in ("adamw_8bit", "bnb", "paged", "lion", "ademamix")
    ),
)
"""Parts of the values of ``optim``, each with the module that such an optimizer imports and the
argument of ``pip install``. The first part that fits decides."""
UNSUPPORTED = {
    "adamw_anyprecision": (
        "needs torchdistx, whose last release is for torch 1.12 and Python 3.10; set another, "
        "such as `optim: adamw_torch`"
    ),
}
"""Values of ``optim`` that cannot be used here, each with the error."""
LOW_RANK = ("galore_", "apollo_")
"""Beginnings of the values of ``optim`` that read ``optim_target_modules``."""


def required_package(optimizer: str) -> tuple[str, str] | None:
    """The module that an optimizer imports, and the argument of ``pip install``; None: torch's.

    >>> required_package("paged_adamw_8bit"), required_package("adamw_torch")
    (('bitsandbytes', "-e '.[quantization]'"), None)
    """
    packages = ((module, name) for part, module, name in PACKAGES if part in optimizer)
    return next(packages, None)


def field_errors(optimizer: str, changed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields among ``changed`` that an optimizer does not read, each with the error.

    Of an optimizer that cannot be used here, ``optim`` alone.
    """
    if optimizer in UNSUPPORTED:
        yield "optim", UNSUPPORTED[optimizer]
        return
    for name, optimizers in UNREAD.items():
        if name in changed and optimizer in optimizers:
            yield name, f"`optim: {optimizer}` does not read it; remove it"
    if "optim_target_modules" in changed and not optimizer.startswith(LOW_RANK):
        yield (
            "optim_target_modules",
            f"only GaLore and APOLLO read it, not `{optimizer}`; remove it",
        )
