"""Trackers that are not installed, or have no key, are reported before a stage trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

import pytest

from align.pipeline import trackers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """The modules that are found; no key is set, and the home folder is empty."""
    modules: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
    for key in trackers.KEYS.values():
        for variable in (key.variable, *key.offline):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(tmp_path)
    return modules


@pytest.mark.parametrize(
    ("tracker", "modules", "expected"),
    [
        ("none", (), None),
        ("all", (), None),
        ("tensorboard", (), "tensorboard is not installed: pip install tensorboard"),
        ("tensorboard", ("tensorboardX",), None),
        ("mlflow", ("mlflow",), None),
        ("wandb", (), "wandb is not installed: pip install wandb"),
        ("wandb", ("wandb",), "wandb has no key: run `wandb login`, set WANDB_API_KEY, or set"),
        ("comet_ml", ("comet_ml",), "comet_ml has no key: set COMET_API_KEY"),
    ],
)
def test_a_missing_package_or_key_is_named_with_its_repair(
    tracker: str, modules: Collection[str], expected: str | None, installed: set[str]
) -> None:
    installed.update(modules)
    problem = trackers.problem(tracker)
    assert problem == expected if expected is None else str(problem).startswith(expected)


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_MODE", ".netrc", "wandb/settings"])
def test_a_key_or_an_offline_mode_of_wandb_is_found(
    name: str, installed: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed.add("wandb")
    if name == ".netrc":
        file = tmp_path / name
        file.write_text("machine api.wandb.ai login user password x\n", encoding="utf-8")
        file.chmod(0o600)
    elif "/" in name:
        (tmp_path / "wandb").mkdir()
        (tmp_path / name).write_text("[default]\nmode = offline\n", encoding="utf-8")
    else:
        monkeypatch.setenv(name, "offline")
    assert trackers.problem("wandb") is None
