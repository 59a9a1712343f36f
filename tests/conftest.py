"""What all tests share. Loaded before torch is: the environment is read when libraries are imported."""

# ruff: noqa: E402 (the environment comes before the imports that read it)

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist's workers share the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from jaxtyping import install_import_hook

# Shapes and types in the signatures of the mathematics are checked at every call.
install_import_hook(["align.functional", "align.rl"], "beartype.beartype")

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer


class Finished(NamedTuple):
    """A command that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """``launch("recipe.yaml", "dpo.beta=0.2")``: ``align/run.py`` in this process, started in ``tmp_path``.

    The environment, the signal handlers and the working directory are given back.
    """
    from align.cli import run
    from align.runtime import exit_codes

    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["align/run.py", *map(str, arguments)])
        app = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        app.command()(run.run_recipe)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            exit_codes.guarded(app)
        return Finished(int(left.value.code or 0), *capfd.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)
