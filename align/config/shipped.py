"""Locations of the files that ship with Align: the embedded data, the catalog and the recipes.

In a checkout they are the folders ``data/`` and ``recipes/``; a wheel carries them as
``align/_data`` and ``align/_recipes``.
"""

from __future__ import annotations

from pathlib import Path

from align.errors import UserError

_PACKAGE = Path(__file__).parents[1]


def data_dir() -> Path:
    """Return the folder with the embedded data set and the catalog.

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
