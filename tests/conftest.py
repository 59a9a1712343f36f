"""Fixtures and settings of all tests."""

# ruff: noqa: E402 (libraries read the environment when they are imported)

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist's workers share the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from jaxtyping import install_import_hook

# Shapes and types in the signatures of tensor functions are checked at every call.
CHECKED = ["align.functional", "align.rl", "align.online_rl.experience"]
install_import_hook(CHECKED, "beartype.beartype")

import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

SECONDS_PER_SLOW_TEST = 1800


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the number of kills of the test of killed runs, and the seed of kills of ranks."""
    parser.addoption("--kills", type=int, default=3, help="kills of tests/end_to_end/test_chaos.py")
    parser.addoption(
        "--kill-seed", type=int, help="the ranks and moments of tests/end_to_end/test_sharded_*"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests may take longer than the timeout in pyproject.toml."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SECONDS_PER_SLOW_TEST))


@pytest.fixture
def kill_generator(request: pytest.FixtureRequest) -> random.Random:
    """Generator of ranks and moments to kill. A test that fails prints the seed, to repeat them."""
    seed = request.config.getoption("--kill-seed")
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    print(f"--kill-seed {seed}")
    return random.Random(seed)


class Finished(NamedTuple):
    """A finished command: its exit code and its output."""

    code: int
    out: str
    err: str


@pytest.fixture
def launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """``launch("recipe.yaml", "dpo.beta=0.2")`` runs ``align/run.py`` here, in ``tmp_path``.

    Environment, signal handlers and working directory are restored.
    """
    from align.cli import run
    from align.runtime import exit_codes, signals

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signals, "_stop", signals._Stop())  # a signal concerns this run only
    before = dict(os.environ)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def call(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["align/run.py", *map(str, arguments)])
        app = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        app.command()(run.run_recipe)
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            exit_codes.guarded(app)
        return Finished(int(exit_info.value.code or 0), *capfd.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(before)
