"""Experiment trackers of ``report_to``: the package, and the key for their server.

Without these checks, transformers reports a missing package, and the server a missing key, when a
stage begins to train.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from align.errors import not_installed

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "comet_ml": ("comet_ml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
"""Modules of which a tracker needs one; of all others, the module has the name of the tracker."""


@dataclass(frozen=True, slots=True)
class Key:
    """Where the key of a tracker is looked for."""

    variable: str
    """Environment variable that holds it."""
    file: str
    """File in the home folder that holds it."""
    offline: Mapping[str, tuple[str, ...]]
    """Environment variables with the values for which no key is needed."""
    repair: str


KEYS: Mapping[str, Key] = {
    "wandb": Key(
        "WANDB_API_KEY",
        ".netrc",
        {"WANDB_MODE": ("offline", "disabled", "dryrun"), "WANDB_DISABLED": ("true", "1")},
        "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline",
    ),
    "comet_ml": Key(
        "COMET_API_KEY",
        ".comet.config",
        {"COMET_MODE": ("OFFLINE", "DISABLED"), "COMET_START_ONLINE": ("0", "false")},
        "set COMET_API_KEY, or set COMET_MODE=OFFLINE",
    ),
    "clearml": Key(
        "CLEARML_API_ACCESS_KEY",
        "clearml.conf",
        {"CLEARML_OFFLINE_MODE": ("1", "true")},
        "run `clearml-init`, or set CLEARML_API_ACCESS_KEY",
    ),
    "neptune": Key(
        "NEPTUNE_API_TOKEN",
        "",
        {"NEPTUNE_MODE": ("offline", "debug")},
        "set NEPTUNE_API_TOKEN, or set NEPTUNE_MODE=offline",
    ),
}


def problem(tracker: str) -> str | None:
    """The reason for which a tracker cannot be used here, with its repair; None if there is none.

    >>> problem("none")
    """
    if tracker in ("none", "all"):  # all: those that are installed
        return None
    modules = PACKAGES.get(tracker, (tracker,))
    if not any(importlib.util.find_spec(module) for module in modules):
        return not_installed(tracker, modules[0])
    key = KEYS.get(tracker)
    if key is None or os.environ.get(key.variable) or _is_offline(key) or _in_file(tracker, key):
        return None
    return f"{tracker} has no key: {key.repair}"


def _is_offline(key: Key) -> bool:
    return any(os.environ.get(name) in values for name, values in key.offline.items())


def _in_file(tracker: str, key: Key) -> bool:
    """Whether the file of a tracker holds a key."""
    if tracker != "wandb":
        return bool(key.file) and (Path.home() / key.file).is_file()
    settings = Path("wandb") / "settings"  # written by `wandb offline`
    if settings.is_file() and "offline" in settings.read_text(encoding="utf-8", errors="replace"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rpartition("//")[2]
    try:
        file = os.environ.get("NETRC") or str(Path.home() / key.file)
        return netrc.netrc(file).authenticators(host.strip("/")) is not None
    except (OSError, netrc.NetrcParseError):
        return False
