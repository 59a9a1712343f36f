"""Locations of the files that ship with Align: the embedded data, the catalog and the recipes.

In a checkout they are the folders ``data/`` and ``recipes/``; a wheel carries them as
``align/_data`` and ``align/_recipes``.
"""

from __future__ import annotations

import os
from pathlib import Path

from align.errors import RecipeError, UserError, did_you_mean

EMBEDDED = {
    "embedded": ("demonstrations.jsonl.gz", "pairs.jsonl.gz"),
    "arithmetic": ("demonstrations.jsonl.gz",),
}
"""Files of the data sets that ship with Align, by the names that a recipe gives them."""
_PACKAGE = Path(__file__).parents[1]


def data_dir() -> Path:
    """Return the folder with the embedded data sets and the catalog.

    Raises:
        UserError: The folder is missing, so the installation is incomplete.
    """
    return _shipped("data")


def recipes_dir() -> Path:
    """Return the folder with the recipes of this project.

    Raises:
        UserError: The folder is missing, so the installation is incomplete.
    """
    return _shipped("recipes")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with Align by name, such as ``dpo`` and ``control/cartpole_ppo``."""
    root = recipes_dir()
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


def find_recipe(path: str | os.PathLike[str], file: Path | None = None) -> Path:
    """The file of a recipe: ``path`` itself (or ``file``), or the shipped recipe of that name.

    A folder does not hide the shipped recipe of its name.

    Raises:
        RecipeError: ``path`` is neither, and has no suffix of a file.
    """
    file = file or Path(os.path.normpath(path))
    try:
        if file.suffix or file.is_file():
            return file
    except OSError as error:  # the name is too long
        raise RecipeError(f"{file!s:.60}…: invalid path: {error.strerror}") from None
    shipped = shipped_recipes()
    name = Path(path).as_posix()
    if name not in shipped and file.exists():
        return file  # a folder: reading it reports the recipes that it contains
    if name not in shipped:
        hint = did_you_mean(name, shipped)
        raise RecipeError(
            f"{name}: no such recipe{hint}; name a file, or a shipped recipe: {', '.join(shipped)}"
        )
    relative = os.path.relpath(shipped[name])
    return shipped[name] if relative.startswith("..") else Path(relative)


def _shipped(name: str) -> Path:
    installed = _PACKAGE / f"_{name}"
    if installed.is_dir():
        return installed
    # Beside an installed package, a folder of this name belongs to some other package.
    checkout = _PACKAGE.parent / name
    if (_PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    raise UserError(
        f"{installed}: missing, so this installation of Align is incomplete; install it again"
    )
