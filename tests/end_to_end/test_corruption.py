"""Every file of finished and unfinished stages, damaged in every way: none is used in silence.

A trial damages one file and runs the recipe again. Its outcome is one of

- detected: an error or a line that names the file, or the stage's folder;
- harmless: the same results as without the damage;
- used: other results, without a line;
- traceback: an exception that is no user error.

``ALIGN_CORRUPTIONS`` is the number of trials with finished stages, an eighth of it that with each
unfinished stage; ``all`` makes every trial. The sample is the same each time. The counts are
printed: ``ALIGN_CORRUPTIONS=400 pytest -s -m slow tests/end_to_end/test_corruption.py``.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.damage import DAMAGES
from rich.console import Console

from align.config.recipe import load_recipe
from align.errors import UserError
from align.pipeline import lookup, runner
from align.runtime import artifacts, signals
from align.runtime.progress import Display
from align.stages import control

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 60, test_fraction: 0.2}
  sft:
    model:
      vocab_size: 300
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
    trainer: &trainer
      learning_rate: 1.0e-2
      max_steps: 6
      per_device_train_batch_size: 4
      save_steps: 2
      logging_steps: 1
      bf16: false
      gradient_checkpointing: false
  reward:
    model: sft
    trainer: *trainer
  dpo:
    model: sft
    trainer: *trainer
  kto:
    model: sft
    trainer: *trainer
  ppo:
    model: sft
    rewards: [reward]
    lora: {r: 2, alpha: 4}
    steps: 6
    batch_size: 8
    max_new_tokens: 8
    learning_rate: 5.0e-2
    save_steps: 2
  sample: {model: sft, n_prompts: 8, n_completions: 2, max_new_tokens: 48, temperature: 2.0}
  evaluate: {policies: [dpo], baseline: sft, judge: gold, n_prompts: 8, max_new_tokens: 8}
  control:
    environment: CartPole-v1
    algorithm: ppo
    seeds: [3, 5]
    steps: 300
    n_envs: 4
    n_steps: 16
    episodes: 2
"""
TRAINED = {"sft": 5, "reward": 5, "dpo": 5, "kto": 5, "ppo": 5, "control": 500}
"""The step of each training stage at which it is interrupted."""
POLICIES = ("sft", "dpo", "kto", "ppo")
N_TRIALS = os.environ.get("ALIGN_CORRUPTIONS", "24")
Trial = tuple[Path, str]
"""A file and the name of a damage."""


class StoppingDisplay(Display):
    """A display that requests an interruption at a step, as a signal does."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.text = io.StringIO()
        super().__init__(Console(file=self.text, width=10_000))
        self.stop_at = stop_at

    def step(
        self, name: str, done: int, total: int, metrics: Mapping[str, Any], unit: str = "step"
    ) -> None:
        """Show nothing."""
        if unit == "step" and self.stop_at is not None and done >= self.stop_at:
            signals._stop.requested = True


@dataclass
class World:
    """A folder with the recipe and its finished runs."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def run(self, *, until: str | None = None, stop_at: int | None = None) -> str:
        """Run the recipe in this process. Returns its output."""
        recipe = load_recipe(self.folder / "recipe.yaml")
        with StoppingDisplay(stop_at) as display:
            runner.run_recipe(recipe, self.runs, display, until=until)
        return display.text.getvalue()

    def stage(self, name: str) -> Path:
        (folder,) = self.runs.glob(f"{name}-????????????")
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("corruption"))
    (world.folder / "recipe.yaml").write_text(RECIPE)
    world.run()
    yield world
    shutil.rmtree(world.folder)


def selected(trials: list[Trial], *, share: int = 1) -> list[Trial]:
    """All trials, or a random sample of ``ALIGN_CORRUPTIONS`` divided by ``share``."""
    n_trials = len(trials) if N_TRIALS == "all" else int(N_TRIALS) // share
    return random.Random(0).sample(trials, min(n_trials, len(trials)))


def results(folder: Path) -> dict[str, object]:
    """What a later stage or a reader uses: bytes of files, and the logged losses and scores."""
    content: dict[str, object] = {}
    for file in artifacts.stage_files(folder):
        name = str(file.relative_to(folder))
        if name.endswith(".png"):
            continue  # pictures of the logs
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            keys = ("step", "seed", "loss", "score", "return")
            # An interrupted run also logs its durations, without any of these.
            content[name] = [
                [row.get(key) for key in keys] for row in rows if row.keys() & {*keys[2:]}
            ]
        elif name.startswith("curve-"):
            curve = json.loads(file.read_text())
            content[name] = (curve["returns"], [point["return"] for point in curve["curve"]])
        else:
            content[name] = file.read_bytes()
    return content


def outcome(use: Callable[[], str], file: Path, stage: Path, changed: Callable[[], bool]) -> str:
    """The outcome of a trial; ``use`` runs the recipe and returns its output."""
    try:
        text = use()
    except UserError as error:
        text = str(error)
        named = file.name in text or file.parent.name in text
        return "detected" if named else f"unclear: {text}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    if file.name in text or (file.parent != stage and f"{file.parent}:" in text):
        return "detected"
    return "used" if changed() else "harmless"


def assert_no_damage_is_used(outcomes: Mapping[Trial, str], title: str) -> None:
    counts = Counter(each.partition(":")[0] for each in outcomes.values())
    line = ", ".join(f"{counts[key]} {key}" for key in ("detected", "harmless"))
    print(f"\n{title}: {len(outcomes)} damages: {line}, {counts['used']} silently used, "
          f"{counts['traceback']} tracebacks, {counts['unclear']} unclear")  # fmt: skip
    wrong = {
        f"{file.parent.name}/{file.name}, {damage}": each
        for (file, damage), each in outcomes.items()
        if each not in ("detected", "harmless")
    }
    assert wrong == {}


def use_finished(world: World, file: Path) -> str:
    """Find a policy as `align chat` and `align play` do, then run the recipe."""
    name = file.parent.name.rpartition("-")[0]
    if name in (*POLICIES, "control"):
        with pytest.raises(UserError, match=re.escape(file.name)):
            if name == "control":
                lookup.find_control_policy(str(file.parent), world.runs)
            else:
                lookup.find_policy(name, world.runs)
    return world.run()


@pytest.mark.slow
def test_no_damaged_file_of_a_finished_stage_is_used(world: World, tmp_path: Path):
    files = [file for folder in world.runs.glob("*-????????????") for file in folder.rglob("*")]
    outcomes: dict[Trial, str] = {}
    for file, damage in selected([(f, d) for f in sorted(files) for d in DAMAGES if f.is_file()]):
        if file.name == artifacts.FILE and damage == "deleted":
            continue  # an unfinished stage without checkpoints
        if file.parent.name.startswith("reference-"):
            continue  # used by unfinished stages, see below
        shutil.copy2(file, tmp_path / "whole")
        DAMAGES[damage](file)
        outcomes[file, damage] = outcome(
            partial(use_finished, world, file), file, file.parent, lambda: True
        )
        restore(file, tmp_path / "whole")
    assert_no_damage_is_used(outcomes, "finished stages")
    assert "running" not in world.run()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_no_damaged_file_of_an_unfinished_stage_is_used(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(control, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    folder = world.stage(name)
    finished = tmp_path / "finished"
    folder.rename(finished)
    with pytest.raises(signals.Interrupted):
        world.run(until=name, stop_at=TRAINED[name])
    signals._stop.requested = False
    unfinished = tmp_path / "unfinished"
    folder.rename(unfinished)
    expected = results(finished)
    reference = [f for f in world.runs.glob("reference-*/*") if name == "dpo" and f.is_file()]
    files = [f.relative_to(unfinished) for f in sorted(unfinished.rglob("*")) if f.is_file()]
    paths = [folder / f for f in files if f.name != artifacts.WORKING] + reference
    outcomes: dict[Trial, str] = {}
    for file, damage in selected([(path, damage) for path in paths for damage in DAMAGES], share=8):
        shutil.copytree(unfinished, folder)
        shutil.copy2(file, tmp_path / "whole")
        DAMAGES[damage](file)
        outcomes[file, damage] = outcome(
            lambda: world.run(until=name), file, folder, lambda: results(folder) != expected
        )
        if file in reference:
            restore(file, tmp_path / "whole")
        shutil.rmtree(folder)
    finished.rename(folder)  # for the stages that start from it
    assert_no_damage_is_used(outcomes, f"unfinished {name}")


def restore(file: Path, whole: Path) -> None:
    """Undo a damage."""
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    shutil.copy2(whole, file)
