"""How a launch configuration divides weights among processes, from the launcher's variables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import UserError

SUPPORTED = ("FSDP2", "ZeRO-2", "ZeRO-3")
FILES = "accelerate_configs/ has files for FSDP2, ZeRO-2 and ZeRO-3"


def kind() -> str | None:
    """Which of ``SUPPORTED`` the launch configuration requires; None if every process has all.

    Another version of FSDP, or another stage of ZeRO, is named as well; :func:`check` refuses it.
    """
    if _is_true("ACCELERATE_USE_FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    if _is_true("ACCELERATE_USE_MEGATRON_LM"):
        return "Megatron-LM"
    if _is_true("ACCELERATE_USE_DEEPSPEED"):
        return f"ZeRO-{_zero().get('stage', 2)}"
    return None


def check() -> None:
    """Check that the launch configuration shards in a way that Align supports.

    Raises:
        UserError: One line for each key that has to change.
    """
    lines = list(_problems(kind()))
    if lines:
        raise UserError(*lines)


def _problems(found: str | None) -> Iterator[str]:
    if found is not None and found not in SUPPORTED:
        yield f"the launch configuration requires {found}, which is not supported; {FILES}"
    elif found == "FSDP2":
        state = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
        if state != "FULL_STATE_DICT":
            yield (
                f"the launch configuration has fsdp_state_dict_type: {state}, with which no model "
                "would be saved; set FULL_STATE_DICT"
            )
        if _is_true("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            yield (
                "the launch configuration has fsdp_cpu_ram_efficient_loading: true, but every "
                "process checks and merges the weights it loads; set false"
            )
    elif found == "ZeRO-3" and not _zero().get("stage3_gather_16bit_weights_on_model_save"):
        yield (
            "the launch configuration does not set zero3_save_16bit_model: true, without which no "
            "model would be saved"
        )


def _zero() -> dict[str, Any]:
    """Settings of ZeRO: of DeepSpeed's own file if there is one, else those of accelerate."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return {
            "stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
            "stage3_gather_16bit_weights_on_model_save": _is_true(
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"
            ),
        }
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a configuration of DeepSpeed with `zero_optimization` "
            f"({' '.join(str(error).split())}); {FILES}"
        ) from None


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
