"""Builds the optimizer and the schedule of training arguments once, for a single weight.

An optimizer of bitsandbytes also makes a step, because its kernels depend on the device.

Their libraries check most values only when they are built, which is after earlier stages trained.
Left out: optimizers that choose among the layers of a model, such as GaLore and LOMO.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, get_scheduler

from align.config.optimizers import required_package
from align.errors import not_installed

BY_LAYER = ("galore", "apollo", "lomo", "muon", "dion")
"""Parts of the names of optimizers that need the model."""
STEPS = 10
QUANTIZED_STATE = 4096
"""Elements of the smallest weight whose optimizer state bitsandbytes stores in 8 bits."""


def optimizer_problems(arguments: Any) -> Iterator[str]:
    """The errors of the optimizer and of the schedule, each after its key.

    Each is built, or is a package that is not installed; steps are made with both.
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], lr=arguments.learning_rate)
    package = required_package(name)
    if package is not None and importlib.util.find_spec(package[0]) is None:
        yield f"trainer.optim: {not_installed(*package)}"
    elif not any(part in name for part in BY_LAYER):
        try:
            optimizer_class, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
            built = optimizer_class([weight], **keywords)
            if optimizer_class.__module__.startswith("bitsandbytes"):
                _step(built, weight)
            optimizer = built
        except Exception as error:  # each optimizer raises what it likes
            yield f"trainer.optim: {name} cannot be built: {_words(error)}"
    try:
        _build_schedule(arguments, optimizer)
    except Exception as error:  # an arithmetic error, for example
        schedule = getattr(arguments.lr_scheduler_type, "value", "")
        yield f"trainer.lr_scheduler_kwargs: {schedule} cannot be built: {_words(error)}"


def _build_schedule(arguments: Any, optimizer: torch.optim.Optimizer) -> None:
    """Build the schedule and make steps with it."""
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


def _step(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
    """Make a step on the device of this process: some kernels exist for other devices only."""
    weight.data = torch.zeros(QUANTIZED_STATE, device=PartialState().device)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.data, weight.grad = torch.zeros(1), None
    optimizer.state.clear()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
