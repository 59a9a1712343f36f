"""Convert the values of a recipe that is written in Python to those that a recipe file has."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from align.errors import RecipeError


def plain_values(value: Any) -> Any:
    """Convert values to the types of a recipe file.

    Tuples become lists, paths become text, and functions become ``module:function``.

    Raises:
        RecipeError: A function is not at the top level of its module.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(value):
        return _function_name(value)
    return value


def _function_name(function: Any) -> str:
    """``module:function`` of a function at the top level of a module."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not name.isidentifier() or getattr(sys.modules.get(str(module)), name, None) is not function:
        raise RecipeError(
            f"{function!r} cannot be imported by its name; define it with `def` at the top level "
            "of a module, script or notebook"
        )
    return f"{module}:{name}"
