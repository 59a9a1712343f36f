"""Values that only an optimizer or a schedule checks are refused before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trl

from align.config.optimizers import required_package
from align.config.trl_fields import trl_fields
from align.errors import UserError
from align.training import trl_trainer


def arguments(folder: Path, **trainer: Any) -> Any:
    return trl_trainer.trl_arguments(
        trl.SFTConfig, folder, seed=0, trainer={"bf16": False} | trainer
    )


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"optim": "sgd", "optim_args": "momentum=lots"}, "sgd cannot be built: ValueError"),
        ({"optim": "adamw_torch", "adam_beta1": 2.0}, "adamw_torch cannot be built"),
        ({"optim": "adamw_torch", "adam_epsilon": -1.0}, "adamw_torch cannot be built"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
            "polynomial cannot be built: ValueError: lr_end",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": -1}},
            "inverse_sqrt cannot be built: ZeroDivisionError",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay cannot be built"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "linear cannot be built: TypeError"),
        ({"activation_offloading": True}, "requires a GPU"),
        ({"fp16": True}, "fp16: requires a GPU"),
        ({"logging_steps": 1.5}, "SFTConfig rejects these values: --logging_steps must be an int"),
    ],
)
def test_an_invalid_value_is_a_user_error(
    trainer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, **trainer)


OPTIMIZERS = [
    name
    for name in trl_fields("SFTConfig")["optim"].choices
    if (required_package(name) or ("",))[0] == "bitsandbytes"
]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_bitsandbytes_makes_a_step_on_this_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = pytest.importorskip("bitsandbytes").optim.optimizer
    arguments(tmp_path, optim=name)

    def fails(*_: Any) -> None:
        raise NotImplementedError("no kernel for cpu")

    for kind in (optim.Optimizer1State, optim.Optimizer2State):
        monkeypatch.setattr(kind, "update_step", fails)
    with pytest.raises(UserError, match=f"trainer.optim: {name} .*: NotImplementedError: no ker"):
        arguments(tmp_path, optim=name)


def test_losses_that_are_not_finite_are_not_filtered(tmp_path: Path) -> None:
    assert not dataclasses.asdict(arguments(tmp_path))["logging_nan_inf_filter"]


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    ],
)
def test_valid_values_are_accepted(trainer: dict[str, Any], tmp_path: Path) -> None:
    arguments(tmp_path, **trainer)
