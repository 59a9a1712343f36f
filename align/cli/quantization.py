"""The option ``--quantization`` of commands that load a model without a recipe."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from align.errors import UserError, not_installed, printable

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
        message = not_installed("bitsandbytes", "-e '.[quantization]'")
        raise UserError(f"--quantization: {message}")


def announce_mismatches(value: str | None, models: Iterable[Path | str]) -> None:
    """Print a line for each adapter that was trained on a base of another type than the option."""
    from align.pipeline import quantization_checks

    for model in models:
        line = quantization_checks.mismatch(Path(model).expanduser(), value)
        if line is not None:
            print(printable(f"{line}; `--quantization` decides"), file=sys.stderr)
