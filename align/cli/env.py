"""Print versions and devices, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from align.runtime import artifacts

OPTIONAL = ("deepspeed", "bitsandbytes", "gymnasium", "vllm")


def show_environment() -> None:
    """Print one line per fact: platform, versions, commit, devices."""
    for name, value in describe().items():
        print(f"{name}: {value}")


def describe() -> dict[str, str]:
    """Versions of Align and its libraries, the commit, and the devices that torch can use."""
    versions = artifacts.versions()
    facts = {
        "align": versions["align"],
        "commit": artifacts.commit() or "not a checkout",
        "platform": platform.platform(),
        **{name: version for name, version in versions.items() if name != "align"},
    }
    for name in OPTIONAL:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts | {"cpus": str(os.cpu_count()), "devices": _devices()}


def _devices() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return "MPS" if torch.backends.mps.is_available() else "cpu only"
