"""The launcher and the `align` command as users call them: exit codes, signals, output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import recipe_runs
from typer.testing import CliRunner

from align import __version__
from align.cli.main import app

ROOT = Path(__file__).parents[2]
SMALL = [
    "prepare.max_rows=200",
    "sft.model.hidden_size=32",
    "sft.model.vocab_size=400",
    "sft.trainer.max_steps=8",
    "dpo.trainer.max_steps=12",
    "evaluate.max_new_tokens=24",
]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
SCRIPT = str(ROOT / "align" / "run.py")
RECIPE = str(ROOT / "recipes" / "dpo.yaml")


def call(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(command), cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )


def comparisons(runs: Path, recipe: str) -> list[dict[str, object]]:
    summary = json.loads((runs / recipe / "summary.json").read_text())
    return summary["stages"][-1]["metrics"]["comparisons"]


@pytest.mark.slow
def test_two_processes_run_the_same_recipe_and_one_of_them_prints(tmp_path):
    done = call(*LAUNCH, *TWO, SCRIPT, RECIPE, *SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sft: ran") == 1
    assert done.stdout.count("win rates against ") == 1
    artifacts = [json.loads(f.read_text()) for f in (tmp_path / "runs").glob("*/artifact.json")]
    stages = sorted(artifact["stage"] for artifact in artifacts)
    assert stages == ["dpo", "evaluate", "prepare", "reference", "sft"]
    assert [artifact["world_size"] for artifact in artifacts] == [2] * 5
    two = comparisons(tmp_path / "runs", "dpo")
    (reference_folder,) = (tmp_path / "runs").glob("reference-*")
    reference = pq.read_table(reference_folder / "logps.parquet")

    # One process that evaluates the same policies samples the same completions: all metrics are
    # equal. It computes the same reference log-probabilities, into a folder of the same name.
    shutil.copy(RECIPE, tmp_path / "recipe.yaml")
    shutil.copy(ROOT / "recipes" / "sft.yaml", tmp_path)
    shutil.rmtree(reference_folder)
    for folder in (tmp_path / "runs").glob("evaluate-*"):
        shutil.rmtree(folder)
    runs = tmp_path / "runs"
    assert recipe_runs.run(runs, *SMALL) == 0, recipe_runs.log(runs)
    assert recipe_runs.log(runs).count("reused") >= 3
    assert comparisons(runs, "recipe") == two
    assert recipe_runs.run(runs, *SMALL, "--force", "dpo", "--until", "dpo") == 0
    alone = pq.read_table(reference_folder / "logps.parquet")
    for column in reference.column_names:
        expected = reference[column].to_pylist()
        assert alone[column].to_pylist() == pytest.approx(expected, abs=1e-3)


FOUR_STAGES = """\
stages:
  prepare: {source: embedded, max_rows: 60, test_fraction: 0.2}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
    trainer: &trainer {learning_rate: 1.0e-2, adam_epsilon: 1.0e-4, max_steps: 3, per_device_train_batch_size: 2,
      logging_steps: 1, bf16: false, gradient_checkpointing: false, save_strategy: "no"}
  dpo: {model: sft, trainer: *trainer}
"""


@pytest.mark.slow
def test_four_processes_of_accelerate_launch_have_the_losses_of_one(tmp_path):
    runs = {"4": tmp_path / "four" / "runs", "1": tmp_path / "one" / "runs"}
    for folder in runs.values():
        folder.parent.mkdir()
        (folder.parent / "recipe.yaml").write_text(FOUR_STAGES)
    command = [*LAUNCH, *TWO, "--num_processes", "4", SCRIPT, "recipe.yaml"]
    done = call(*command, folder=runs["4"].parent)
    assert done.returncode == 0, done.stderr
    batch = [f"{stage}.trainer.per_device_train_batch_size=8" for stage in ("sft", "dpo")]
    assert recipe_runs.run(runs["1"], *batch) == 0, recipe_runs.log(runs["1"])
    for stage in ("sft", "dpo"):
        losses = {}
        for processes, place in runs.items():
            (folder,) = place.glob(f"{stage}-*")
            artifact = json.loads((folder / "artifact.json").read_text())
            assert artifact["world_size"] == int(processes)
            lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            losses[processes] = [line["loss"] for line in lines if "loss" in line]
        assert len(losses["1"]) == 3
        assert max(losses["1"]) - min(losses["1"]) > 0.001, f"{stage}: flat, which proves nothing"
        assert losses["4"] == pytest.approx(losses["1"], rel=0, abs=1e-4), stage


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[], ["--config", TWO[1]]], ids=["one process", "two processes"])
def test_align_run_exits_with_the_code_of_the_run(tmp_path, launch):
    align = [sys.executable, "-m", "align.cli.main"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    invalid = subprocess.run(
        # Refused by the launcher, before it starts a process.
        [*align, "run", RECIPE, *launch, *SMALL, "dpo.trainer.loss_weights=[1.0]"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert invalid.returncode == 2, invalid.stderr
    assert invalid.stderr.count("dpo.trainer.loss_weights: 1 weights for 2 of `loss_type`") == 1
    assert "Traceback" not in invalid.stderr

    overrides = [*SMALL, "sft.trainer.max_steps=2000"]
    with subprocess.Popen(
        [*align, "run", RECIPE, *launch, *overrides],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        while not list(tmp_path.glob("runs/sft-*/metrics.jsonl")):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.1)
        # As `timeout` does: to the launcher, and to the process group of launcher and run.
        run.send_signal(signal.SIGTERM)
        os.killpg(run.pid, signal.SIGTERM)
        _, stderr = run.communicate(timeout=120)
    assert run.returncode == 130, stderr
    assert stderr.count("the same command resumes") == 1
    assert "Traceback" not in stderr
    assert list(tmp_path.glob("runs/sft-*/checkpoint-*/complete.json"))


@pytest.mark.slow
def test_an_error_of_rank_0_ends_all_ranks(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "reject": "c"}))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "align.cli.main", "run", RECIPE),
            *("--config", TWO[1], "prepare.source=rows.jsonl"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("no column `rejected`") == 1
    assert "Traceback" not in done.stderr


def test_help_plan_and_check_write_no_files(tmp_path, monkeypatch):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def align(*arguments: str) -> str:
        command = [sys.executable, "-m", "align.cli.main", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    def here(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.stdout

    assert align("--version") == f"align {__version__}\n"
    plan = align("plan", RECIPE)
    assert all(word in plan for word in ("prepare", "sft", "dpo", "evaluate", "729", "424"))
    monkeypatch.chdir(tmp_path)
    assert all(word in here("--help") for word in ("run", "plan", "check", "chat", "env"))
    facts = dict(line.split(": ", 1) for line in here("env").splitlines())
    assert facts["align"] == __version__
    assert facts.keys() >= {"commit", "platform", "python", "torch", "trl", "deepspeed", "devices"}
    assert "no errors" in here("check", RECIPE, "prepare.max_rows=200")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_checkout_runs_without_being_installed_and_from_any_folder(tmp_path):
    # Python puts the folder of a script first on the path, which is align/; run.py replaces it.
    done = call(sys.executable, SCRIPT, RECIPE, "--until", "prepare", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/prepare-*/artifact.json"))


OWN_LABELS = """\
stages:
  prepare: {source: embedded, max_rows: 200}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}
    trainer: {max_steps: 80, learning_rate: 1.0e-2, bf16: false, gradient_checkpointing: false} # until completions end with eos
  sample: {model: sft, n_prompts: 30, n_completions: 3, max_new_tokens: 64, batch_size: 12}
  label: {judge: gold, pairing: all, label_noise: bradley_terry}
  kto:
    model: sft
    preferences: label
    trainer: {num_train_epochs: 2, per_device_train_batch_size: 4, logging_steps: 1, bf16: false, gradient_checkpointing: false}
"""


@pytest.mark.slow
def test_two_processes_sample_and_label_the_same_rows_as_one_and_train_kto_on_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text(OWN_LABELS)
    run = {"one": recipe_runs.run, "two": recipe_runs.run_on_two_processes}
    for name, start in run.items():
        assert start(tmp_path / name) == 0, recipe_runs.log(tmp_path / name)
        files = [json.loads(f.read_text()) for f in (tmp_path / name).glob("*/artifact.json")]
        artifacts = {artifact["stage"]: artifact for artifact in files}
        assert artifacts["kto"]["world_size"] == (2 if name == "two" else 1)
        # both sides of the pairs in batches of 4, shared by the processes
        pairs = artifacts["label"]["metrics"]["pairs"]["train"]
        batches = -(-2 * pairs // 4)
        batches_of_a_process = -(-batches // 2) if name == "two" else batches
        assert artifacts["kto"]["metrics"]["steps"] == 2 * batches_of_a_process
        assert artifacts["sample"]["metrics"]["rows"] == 90
    # Two processes train on other batches than one, so the policies differ: both now sample the
    # same policy.
    (policy,) = (tmp_path / "one").glob("sft-*")
    (data,) = (tmp_path / "one").glob("prepare-*")
    text = f"stages:\n  sample: {{model: {policy}, prompts: {data}, n_prompts: 30, n_completions: 3, max_new_tokens: 64, batch_size: 12}}\n  label: {{judge: gold, pairing: all, label_noise: bradley_terry}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert run["two"](tmp_path / "again") == 0, recipe_runs.log(tmp_path / "again")
    for pattern in ("sample-*/completions-train.parquet", "label-*/pairs-train.parquet"):
        (one,), (two,) = ((tmp_path / runs).glob(pattern) for runs in ("one", "again"))
        assert pq.read_table(one).equals(pq.read_table(two))
