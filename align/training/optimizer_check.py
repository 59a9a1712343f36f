"""Builds the optimizer and the schedule of training arguments once, for a single weight.

An optimizer of bitsandbytes also makes a step, because its kernels depend on the device.

Their libraries check most values only when they are built, which is after earlier stages trained.
Left out: optimizers that choose among the layers of a model, such as GaLore and LOMO.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, get_scheduler

from align.errors import UserError

BY_LAYER = ("galore", "apollo", "lomo", "muon", "dion")
"""Parts of the names of optimizers that need the model."""
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim"}
"""Packages of those of them that torch does not have."""
STEPS = 10
QUANTIZED_STATE = 4096
"""Elements of the smallest weight whose optimizer state bitsandbytes stores in 8 bits."""


def check_optimizer(arguments: Any) -> None:
    """Check that the optimizer and the schedule can be built and make steps.

    Raises:
        UserError: A value, or a package that is not installed, prevents it.
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=arguments.learning_rate)
    package = next((each for part, each in PACKAGES.items() if part in name), None)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"trainer.optim: {name} requires the package {package}, which is missing")
    if not any(part in name for part in BY_LAYER):
        try:
            optimizer_class, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
            optimizer = optimizer_class([weight], **keywords)
            if optimizer_class.__module__.startswith("bitsandbytes"):
                _step(optimizer, weight)
        except Exception as error:  # each optimizer raises what it likes
            raise UserError(f"trainer.optim: {name} cannot be built: {_words(error)}") from None
    try:
        with warnings.catch_warnings():  # of a schedule that steps before the optimizer
            warnings.simplefilter("ignore")
            schedule: Any = get_scheduler(
                arguments.lr_scheduler_type,
                optimizer,
                arguments.get_warmup_steps(STEPS),
                STEPS,
                scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
            )
            if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # others need a metric
                for _ in range(STEPS):
                    schedule.step()
    except Exception as error:  # an arithmetic error, for example
        raise UserError(
            f"trainer.lr_scheduler_kwargs: {getattr(arguments.lr_scheduler_type, 'value', '')} "
            f"cannot be built: {_words(error)}"
        ) from None


def _step(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
    """Make a step on the device of this process: some kernels exist for other devices only."""
    weight.data = torch.zeros(QUANTIZED_STATE, device=PartialState().device)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.data, weight.grad = torch.zeros(1), None
    optimizer.state.clear()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
