"""Convert the values of a recipe that is written in Python to those that a recipe file has."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from align.config.yaml_loader import CONTROL_CHARACTER, MAX_DEPTH
from align.errors import RecipeError


def plain_values(value: Any, address: tuple[str, ...] = ()) -> Any:
    """Convert values to the types of a recipe file.

    Tuples become lists, paths become text, and functions become ``module:function``. ``address``
    has the keys above ``value``.

    Raises:
        RecipeError: A value cannot be in a recipe file, such as a date or a function that is not at
            the top level of its module.
    """
    place = ".".join(address) or "the recipe"
    if len(address) > MAX_DEPTH:
        raise RecipeError(f"{place:.60}…: nested more than {MAX_DEPTH} deep; remove a level")
    if isinstance(value, Mapping):
        return {str(key): plain_values(item, (*address, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item, (*address, str(i))) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif callable(value):
        value = _function_name(value)
    if not isinstance(value, str | int | float | None):
        raise RecipeError(
            f"{place}: expected text, a number, a list or a mapping, got {type(value).__name__}"
        )
    if isinstance(value, str) and CONTROL_CHARACTER.search(value):
        raise RecipeError(f"{place}: {value!r:.60} contains a line break or control character")
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
