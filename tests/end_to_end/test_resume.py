"""Kill it, start it again: the same weights to the last bit.

Each run is a fork of this process, so the libraries are imported once and a run takes a second or two. `kill -9` comes at
random moments of the time that an undisturbed run takes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.config import recipe
from align.pipeline import runner
from align.runtime import artifacts, checkpoints, environment, signals
from align.runtime.progress import Display

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 120}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}
    trainer: &trainer
      learning_rate: 1.0e-3
      max_steps: 24
      per_device_train_batch_size: 4
      save_steps: 2
      logging_steps: 2
      lr_scheduler_type: constant_with_warmup
      bf16: false
      gradient_checkpointing: false
  dpo:
    model: sft
    trainer: *trainer
  sft_lora:
    stage: sft
    model: sft
    lora: {r: 2, alpha: 4, dropout: 0.1}
    trainer: *trainer
  dpo_lora:
    stage: dpo
    model: sft_lora
    lora: {r: 2, alpha: 4, dropout: 0.1}
    trainer: *trainer
  kto: # 24 steps are two epochs, each with an order of its own
    model: sft
    trainer:
      learning_rate: 1.0e-3
      max_steps: 24
      per_device_train_batch_size: 16
      save_steps: 2
      logging_steps: 2
      lr_scheduler_type: constant_with_warmup
      bf16: false
      gradient_checkpointing: false
"""
ORDER = ["prepare", "sft", "dpo", "sft_lora", "dpo_lora", "kto"]


def start(runs: Path, until: str, **options: Any) -> int:
    """Run the recipe in a fork of this process; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = (runs.parent / "log").open("a")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        signals.install()
        read = recipe.load_recipe(runs.parent / "recipe.yaml")
        runner.run_recipe(read, runs, Display(Console(file=log)), until=until, **options)
        code = 0
    except signals.Interrupted:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a fork; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def weights(runs: Path, stage: str) -> bytes:
    (folder,) = runs.glob(f"{stage}-*")
    assert artifacts.read_artifact(folder) is not None
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of a chain that nothing stopped."""
    import trl  # the forks find it imported

    assert trl.SFTTrainer
    assert trl.DPOTrainer
    assert trl.KTOTrainer
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    environment.quiet_libraries()
    assert finish(start(folder / "runs", "kto")) == 0, (folder / "log").read_text()
    yield folder / "runs"
    shutil.rmtree(folder)


def beside(whole: Path, folder: Path, stage: str) -> Path:
    """New runs that have what comes before ``stage``."""
    (folder / "recipe.yaml").write_text(RECIPE)
    runs = folder / "runs"
    runs.mkdir()
    for name in ORDER[: ORDER.index(stage)]:
        (source,) = whole.glob(f"{name}-*")
        shutil.copytree(source, runs / source.name)
    return runs


def kill_at_random_moments(whole: Path, folder: Path, stage: str, kills: int) -> None:
    runs = beside(whole, folder, stage)
    (done,) = whole.glob(f"{stage}-*")
    made = artifacts.read_artifact(done)
    assert made is not None
    generator = random.Random(stage)
    for moment in range(kills):
        pid = start(runs, stage)
        time.sleep(made.seconds * (moment + generator.random()) / kills)
        os.kill(pid, signal.SIGKILL)
        finish(pid)
    assert finish(start(runs, stage)) == 0, (folder / "log").read_text()
    assert weights(runs, stage) == weights(whole, stage)
    (again,) = runs.glob(f"{stage}-*")
    kept = [path.name for path in again.iterdir()]
    assert not [name for name in kept if name.startswith(("checkpoint", ".")) or name == "ref"]
    lines = (again / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert set(range(2, 25, 2)) <= set(steps)


@pytest.mark.parametrize("stage", ["sft", "dpo", "dpo_lora", "kto"])
def test_killed_twice_and_started_again_it_ends_in_the_same_weights(whole, tmp_path, stage):
    kill_at_random_moments(whole, tmp_path, stage, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "sft_lora", "dpo_lora", "kto"])
def test_killed_at_five_moments_it_ends_in_the_same_weights(whole, tmp_path, stage):
    kill_at_random_moments(whole, tmp_path, stage, kills=5)


def wait_for(pid: int, runs: Path, pattern: str) -> None:
    """Wait until a fork has written something."""
    while not list(runs.glob(pattern)):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (runs.parent / "log").read_text()
        time.sleep(0.005)


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(whole, tmp_path):
    runs = beside(whole, tmp_path, "sft")
    pid = start(runs, "sft")
    wait_for(pid, runs, "sft-*/checkpoint-6/complete.json")
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    (folder,) = runs.glob("sft-*")
    last = checkpoints.list_checkpoints(folder)[-1]
    (last / checkpoints.COMPLETE_MARK).unlink()
    (last / "model.safetensors").write_bytes(b"half")
    assert finish(start(runs, "sft")) == 0, (tmp_path / "log").read_text()
    assert weights(runs, "sft") == weights(whole, "sft")


def test_killed_after_the_last_step_it_trains_no_further_one(whole, tmp_path):
    runs = beside(whole, tmp_path, "sft")
    pid = start(runs, "sft")
    wait_for(pid, runs, "sft-*/model.safetensors")
    os.kill(pid, signal.SIGKILL)
    finish(pid)
    (folder,) = runs.glob("sft-*")
    (folder / artifacts.FILE).unlink(missing_ok=True)  # where the kill came later than that
    assert finish(start(runs, "sft")) == 0, (tmp_path / "log").read_text()
    assert weights(runs, "sft") == weights(whole, "sft")
    made = artifacts.read_artifact(folder)
    assert made is not None
    assert made.metrics["steps"] == 24


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on_there(whole, tmp_path, number):
    runs = beside(whole, tmp_path, "dpo")
    pid = start(runs, "dpo")
    wait_for(pid, runs, "dpo-*/checkpoint-4/complete.json")
    os.kill(pid, number)
    assert finish(pid) == 130, (tmp_path / "log").read_text()
    (folder,) = runs.glob("dpo-*")
    assert artifacts.read_artifact(folder) is None
    step = int(checkpoints.list_checkpoints(folder)[-1].name.rpartition("-")[2])
    assert finish(start(runs, "dpo")) == 0
    assert f"going on from step {step}" in (tmp_path / "log").read_text()
    assert weights(runs, "dpo") == weights(whole, "dpo")


def test_stopped_in_its_second_epoch_kto_goes_on_in_that_epochs_order(whole, tmp_path):
    runs = beside(whole, tmp_path, "kto")
    pid = start(runs, "kto")
    wait_for(pid, runs, "kto-*/checkpoint-16/complete.json")
    os.kill(pid, signal.SIGTERM)
    assert finish(pid) == 130, (tmp_path / "log").read_text()
    (folder,) = runs.glob("kto-*")
    last = checkpoints.list_checkpoints(folder)[-1]
    assert json.loads((last / "trainer_state.json").read_text())["epoch"] > 1
    assert finish(start(runs, "kto")) == 0
    assert weights(runs, "kto") == weights(whole, "kto")


def test_another_seed_ends_in_other_weights(whole, tmp_path):
    runs = beside(whole, tmp_path, "dpo")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("  dpo:\n", "  dpo:\n    seed: 1\n"))
    assert finish(start(runs, "dpo")) == 0, (tmp_path / "log").read_text()
    assert weights(runs, "dpo") != weights(whole, "dpo")
