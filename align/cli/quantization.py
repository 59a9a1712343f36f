"""The option ``--quantization`` of commands that load a model without a recipe."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from align.errors import UserError

Quantization = Annotated[
    str | None,
    typer.Option(metavar="nf4", help="Store the linear layers of the model in 4 bits."),
]


def check_quantization(value: str | None) -> None:
    """Check the value of the option, and that its package is installed.

    Raises:
        UserError: Another value than ``nf4``, or bitsandbytes is missing.
    """
    if value not in (None, "nf4"):
        raise UserError(f"--quantization {value}: expected nf4")
    if value is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "--quantization: bitsandbytes is not installed: pip install -e '.[quantization]'"
        )
