"""Tests of checks that need no finished stage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from align.cli import main as cli
from align.config.recipe import ErrorCollector, load_recipe
from align.pipeline import preflight
from align.pipeline.plan import plan_stages

PPO = """\
stages:
  prepare: {source: embedded, max_rows: 50}
  sft: {model: {vocab_size: 300}}
  reward: {model: sft}
  ppo: {model: sft, rewards: [reward], steps: 2, batch_size: 4, quantization: nf4, lora: {}}
  dpo: {model: sft, quantization: nf4, lora: {}}
  kto: {model: sft, trainer: {optim: paged_adamw_8bit}}
  evaluate: {policies: [dpo], baseline: sft, judge: gold, quantization: nf4}
"""


def test_a_missing_optional_dependency_is_an_error_before_anything_runs(
    launch, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (tmp_path / "recipe.yaml").write_text(PPO)
    finished = launch("recipe.yaml")
    assert finished.code == 2
    for key in (
        "ppo.quantization",
        "dpo.quantization",
        "kto.trainer.optim",
        "evaluate.quantization",
    ):
        message = f"{key}: bitsandbytes is not installed: pip install -e '.[quantization]'"
        assert finished.err.count(message) == 1, finished.err
    assert not list(tmp_path.glob("runs/*"))


TRAINER = """\
stages:
  prepare: {source: embedded, max_rows: 50}
  sft: {model: {vocab_size: 300}, trainer: {report_to: [wandb], use_liger_kernel: true}}
  grpo:
    {model: sft, rewards: ["align.rewards.gold:rewards"], steps: 1, batch_size: 4,
     n_completions: 2, report_to: [trackio]}
"""


def test_trackers_and_packages_of_trainer_fields_are_checked_before_anything_runs(
    launch, tmp_path, monkeypatch
):
    for module in ("wandb", "trackio", "liger_kernel"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "recipe.yaml").write_text(TRAINER)
    finished = launch("recipe.yaml")
    assert finished.code == 2
    for line in (
        "sft.trainer.report_to: wandb is not installed: pip install wandb",
        "grpo.report_to: trackio is not installed: pip install trackio",
        "sft.trainer.use_liger_kernel: liger_kernel is not installed: pip install liger-kernel",
    ):
        assert line in finished.err
    assert not list(tmp_path.glob("runs/*"))


EVERY_PHASE = """\
stages:
  prepare: {source: rows.jsonl}
  other: {stage: prepare, source: embedded}
  sft: {model: {}, demonstrations: other, sede: 1}
  dpo: {model: base, pairs: other}
  ppo: {model: sft, prompts: other, rewards: ["no_such_module:score"], steps: 2, batch_size: 3}
  control: {environment: CartPol-v1, steps: 100}
  ppo_2: {stage: ppo, model: owner/name, prompts: other, rewards: ["no_such_module:score"], steps: 2,
    batch_size: 4}
"""
ERRORS = [
    "recipe.yaml:2: prepare: rows.jsonl: ",
    "recipe.yaml:4: sft.sede: unknown key; did you mean `seed`?",
    "recipe.yaml:5: dpo.model: no earlier stage `base`",
    "recipe.yaml:6: ppo.rewards.0: no_such_module:score: cannot be imported",
    "recipe.yaml:7: control.environment: unknown environment CartPol-v1",
    "recipe.yaml:8: ppo_2.model: owner/name: no such folder, not in the cache",
    "recipe.yaml:8: ppo_2.rewards.0: no_such_module:score: cannot be imported",
    "--until nothing: no such stage",
]


def test_errors_of_all_phases_are_reported_at_once_and_equal_in_check_and_run(
    launch, tmp_path, monkeypatch, capfd
):
    (tmp_path / "recipe.yaml").write_text(EVERY_PHASE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    finished = launch("recipe.yaml", "--until", "nothing")
    lines = finished.err.splitlines()
    assert finished.code == 2
    assert [line[: len(start)] for line, start in zip(lines, ERRORS, strict=True)] == ERRORS
    monkeypatch.setattr(sys, "argv", ["align", "check", "recipe.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capfd.readouterr().err.splitlines() == lines[:-1]
    assert not (tmp_path / "runs").exists()


def test_check_builds_the_configurations_of_trl_that_only_trl_can_check(monkeypatch):
    recipe = load_recipe("dpo", ["sft.trainer.load_best_model_at_end=true"])
    stages = plan_stages(ErrorCollector(recipe), Path("runs"))
    built = []
    monkeypatch.setattr(
        preflight,
        "check_trainer_arguments",
        lambda errors, stages: built.extend(stage.name for stage in stages),
    )
    preflight.check_unusual_trainers(ErrorCollector(recipe), stages)
    assert built == ["sft"]


def test_files_of_completions_and_annotations_are_read_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text('{"prompt": "a", "completion": "x"}\n{"prompt": "a"}\n')
    Path("people.jsonl").write_text('{"prompt": "a", "first": "x", "second": "y"}\n')
    Path("recipe.yaml").write_text(
        "stages:\n"
        "  prepare: {source: embedded, max_rows: 50}\n"
        "  evaluate:\n"
        "    policies: [own.jsonl]\n"
        "    baseline: reference\n"
        "    judge: [{annotations: people.jsonl}, {function: math}]\n"
    )
    errors = ErrorCollector(load_recipe("recipe.yaml"))
    preflight.check_row_files(errors, plan_stages(errors, tmp_path / "runs"))
    completions, annotations = sorted(errors.lines)
    assert completions.startswith(
        "recipe.yaml:4: evaluate.policies.0: own.jsonl: row 2: `completion`: missing"
    )
    assert annotations.startswith("recipe.yaml:6: evaluate.judge.0.annotations: people.jsonl:")
