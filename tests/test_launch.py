"""Launched as a user launches it: two processes, exit codes, signals, and who prints."""

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

ROOT = Path(__file__).parents[1]
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


def comparisons(runs: Path) -> list[dict[str, object]]:
    summary = json.loads((runs / "dpo" / "summary.json").read_text())
    return summary["stages"][-1]["metrics"]["comparisons"]


@pytest.mark.slow
def test_two_processes_run_the_same_recipe_and_one_of_them_prints(tmp_path):
    done = call(*LAUNCH, *TWO, SCRIPT, RECIPE, *SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sft: ran") == 1
    assert done.stdout.count("held-out win rates") == 1
    made = [json.loads(f.read_text()) for f in (tmp_path / "runs").glob("*/artifact.json")]
    assert sorted(m["stage"] for m in made) == ["dpo", "evaluate", "prepare", "reference", "sft"]
    assert [m["world_size"] for m in made] == [2] * 5
    two = comparisons(tmp_path / "runs")
    (kept,) = (tmp_path / "runs").glob("reference-*")
    reference = pq.read_table(kept / "logps.parquet")

    # The same policies evaluated by one process: the same completions, so the same figures.
    for folder in (tmp_path / "runs").glob("evaluate-*"):
        shutil.rmtree(folder)
    again = call(*LAUNCH, SCRIPT, RECIPE, *SMALL, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reused") >= 3
    assert comparisons(tmp_path / "runs") == two

    # The reference's log-probabilities computed by one process: the same, in a folder of the same name.
    shutil.rmtree(kept)
    again = call(*LAUNCH, SCRIPT, RECIPE, *SMALL, "--force", "dpo", "--until", "dpo", folder=tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stderr
    alone = pq.read_table(kept / "logps.parquet")
    for column in reference.column_names:
        expected = reference[column].to_pylist()
        assert alone[column].to_pylist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[], ["--config", TWO[1]]], ids=["one process", "two processes"])
def test_align_run_ends_in_the_code_of_the_run(tmp_path, launch):
    align = [sys.executable, "-m", "align.cli"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    wrong = subprocess.run(
        # One weight for two losses is refused by the trainer's configuration, once the processes run.
        [*align, "run", RECIPE, *launch, *SMALL, "dpo.trainer.loss_weights=[1.0]"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert wrong.returncode == 2, wrong.stderr
    assert wrong.stderr.count("dpo.trainer: DPOConfig refuses") == 1
    assert "Traceback" not in wrong.stderr

    overrides = [*SMALL, "sft.trainer.max_steps=2000"]
    with subprocess.Popen(
        [*align, "run", RECIPE, *launch, *overrides],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        while not list(tmp_path.glob("runs/sft-*/metrics.jsonl")):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=120)
    assert run.returncode == 130, said
    assert "the same command goes on" in said
    assert list(tmp_path.glob("runs/sft-*/checkpoint-*/complete.json"))


@pytest.mark.slow
def test_a_mistake_that_only_the_main_process_meets_ends_all_of_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "reject": "c"}))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "align.cli", "run", RECIPE),
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


def test_help_and_plan_answer_without_a_recipe_that_ran(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def align(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "align.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )

    assert all(word in align("--help").stdout for word in ("run", "plan", "check", "chat"))
    plan = align("plan", RECIPE).stdout
    assert all(word in plan for word in ("prepare", "sft", "dpo", "evaluate", "729", "424"))
    assert "nothing wrong found" in align("check", RECIPE).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_checkout_runs_without_being_installed_and_from_any_folder(tmp_path):
    # Python puts align/ first on the path of a script in it; run.py takes it off again.
    done = call(sys.executable, SCRIPT, RECIPE, "--until", "prepare", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/prepare-*/artifact.json"))
