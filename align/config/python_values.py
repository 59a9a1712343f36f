"""Convert the values of a recipe that is written in Python to those that a recipe file has."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from align.errors import RecipeError


def plain_values(value: Any) -> Any:
    """Values from Python as a recipe file has them: tuples become lists, paths text, and functions
    ``module:function``.

    Raises:
        RecipeError: A function that its module cannot be asked for by name.
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
            f"{function!r} cannot be imported by its name; define it with `def` at the top level of "
            "a module, script or notebook"
        )
    return f"{module}:{name}"
