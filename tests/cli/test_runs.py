"""Tests of `align runs`, and of the reasons of `align plan` for stages that run again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import finished_runs
from typer.testing import CliRunner

from align.cli import inventory
from align.cli.main import app
from align.config.recipe import read_recipe
from align.errors import ArtifactError, UserError
from align.pipeline.plan import plan
from align.runtime import artifacts

DAY = 24 * 3600
RECIPE = """
stages:
  prepare: {source: embedded, max_rows: 8}
  sft: {model: {hidden_size: 16, num_hidden_layers: 1}, trainer: {max_steps: 1}}
"""


def finished(runs: Path, name: str, digest: str, *, days: float = 0, inputs=(), **fields) -> Path:
    """A finished stage with one weight file of 1,000 bytes."""
    sources = {
        str(k): {"folder": str(source), "digest": source.name[-1] * 64}
        for k, source in enumerate(inputs)
    }
    folder = finished_runs.stage(runs, name, digest=digest * 64, inputs=sources, **fields)
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    made = time.time() - days * DAY
    for path in (*folder.iterdir(), folder):
        os.utime(path, (made, made))
    return folder


def summary(runs: Path, name: str, *stages: Path) -> None:
    (runs / name).mkdir()
    content = {"stages": [{"folder": str(folder)} for folder in stages]}
    (runs / name / "summary.json").write_text(json.dumps(content))


def invoke(runs: Path, *arguments: str, input: str | None = None):
    return CliRunner().invoke(app, ["runs", "--runs", str(runs), *arguments], input=input)


@pytest.fixture
def runs(tmp_path):
    """A run of dpo on sft with cached reference log-probabilities; an old and a new sft unused."""
    runs = tmp_path / "runs"
    sft = finished(runs, "sft", "a", days=3, recipe={"seed": 0, "trainer": {"max_steps": 5}})
    finished(runs, "sft", "b", days=2, recipe={"seed": 1, "trainer": {"max_steps": 5}})
    finished(runs, "sft", "c", recipe={"seed": 1, "trainer": {"max_steps": 7}})
    cache = finished(runs, "reference", "d", days=3)
    reference = {"reference": {"folders": [cache.name]}}
    dpo = finished(
        runs, "dpo", "e", days=3, inputs=[sft], metrics=reference, headline={"loss": 0.65012}
    )
    summary(runs, "dpo-recipe", dpo)
    return runs


def by_name(runs):
    return {stage.folder.name[:-11]: stage for stage in inventory.take_inventory(runs).stages}


def test_a_run_refers_to_its_stages_their_inputs_and_cached_log_probabilities(runs):
    referred = {name: stage.runs for name, stage in by_name(runs).items()}
    assert referred == {
        "dpo-e": ("dpo-recipe",),
        "reference-d": ("dpo-recipe",),
        "sft-a": ("dpo-recipe",),
        "sft-b": (),
        "sft-c": (),
    }


def test_the_list_shows_result_size_and_the_settings_that_differ(runs):
    lines = invoke(runs).stdout.splitlines()
    dpo = next(k for k, line in enumerate(lines) if line.startswith("dpo-e"))
    assert lines[dpo].split()[1:3] == ["3", "d"]
    assert lines[dpo].endswith("kB  dpo-recipe")
    assert lines[dpo + 1].strip() == "loss 0.6501"
    settings = {line[:5]: lines[k + 1].strip() for k, line in enumerate(lines) if "sft-" in line}
    assert settings == {
        "sft-a": "seed=0 trainer.max_steps=5",
        "sft-b": "seed=1 trainer.max_steps=5",
        "sft-c": "seed=1 trainer.max_steps=7",
    }
    size = sum(stage.bytes for stage in by_name(runs).values())
    assert size > 5000
    assert f"5 stages, {size / 1000:.3g} kB" in lines[-1]


def test_the_list_of_one_name(runs):
    assert [line[:5] for line in invoke(runs, "sft").stdout.splitlines() if line[0] == "s"] == [
        "sft-c",
        "sft-b",
        "sft-a",
    ]
    with pytest.raises(UserError, match=r"kto: no stage of this name in .*runs; `align runs`"):
        raise invoke(runs, "kto").exception


def test_pruning_removes_old_stages_that_no_run_refers_to(runs):
    result = invoke(runs, "--prune", "--yes")
    assert "removed 1 stage, " in result.stdout
    assert set(by_name(runs)) == {"dpo-e", "reference-d", "sft-a", "sft-c"}
    assert "nothing to remove" in invoke(runs, "--prune", "--yes").stdout
    invoke(runs, "--prune", "--yes", "--older-than", "0")
    assert set(by_name(runs)) == {"dpo-e", "reference-d", "sft-a"}


def test_pruning_asks(runs, monkeypatch):
    with pytest.raises(UserError, match="would remove 1 stage; confirm with --yes"):
        raise invoke(runs, "--prune", input="y\n").exception
    monkeypatch.setattr("align.cli.runs._can_ask", lambda: True)
    assert "nothing was removed" in invoke(runs, "--prune", input="n\n").stdout
    assert len(by_name(runs)) == 5
    assert "removed 1 stage" in invoke(runs, "--prune", input="y\n").stdout
    assert len(by_name(runs)) == 4


def test_a_stage_that_a_run_is_writing_is_not_removed(runs):
    folder = next(runs.glob("sft-b*"))
    (folder / artifacts.FILE).unlink()
    with FileLock(folder / artifacts.WORKING):
        assert "in use by a run" in invoke(runs).stdout
        invoke(runs, "--prune", "--yes", "--older-than", "0")
        assert set(by_name(runs)) == {"dpo-e", "reference-d", "sft-a", "sft-b"}
    assert "unfinished" in invoke(runs).stdout
    invoke(runs, "--prune", "--yes", "--older-than", "0")
    assert "sft-b" not in by_name(runs)


def test_stages_of_an_unfinished_run_are_kept(runs):
    (runs / "recipe").mkdir()
    used = next(runs.glob("sft-b*"))
    file = runs / "recipe" / "planned-0123456789ab.json"
    file.write_text(json.dumps({"stages": [{"folder": used.name}]}))
    assert by_name(runs)["sft-b"].runs == ("recipe (unfinished)",)
    assert "nothing to remove" in invoke(runs, "--prune", "--yes").stdout
    file.unlink()
    assert "removed 1 stage" in invoke(runs, "--prune", "--yes").stdout


def test_a_stage_that_a_run_refers_to_while_pruning_asks_is_kept(runs, monkeypatch):
    def answer(question: str) -> bool:
        summary(runs, "other", next(runs.glob("sft-b*")))
        return True

    monkeypatch.setattr("align.cli.runs._can_ask", lambda: True)
    monkeypatch.setattr("align.cli.runs.typer.confirm", answer)
    assert "removed 0 stages" in invoke(runs, "--prune").stdout
    assert "sft-b" in by_name(runs)


def test_a_stage_that_a_run_holds_since_it_was_listed_is_not_removed(runs):
    stage = by_name(runs)["sft-b"]
    lock = FileLock(stage.folder / artifacts.WORKING)
    with lock, pytest.raises(ArtifactError, match="a run has begun to write it"):
        inventory.remove(stage)
    assert (stage.folder / artifacts.FILE).is_file()


def test_folders_that_no_stage_has_written_are_not_stages(runs):
    copy = runs / "backup-202611271200"  # a date and a time look like a digest
    copy.mkdir()
    (copy / "notes.txt").write_text("mine")
    os.utime(copy, (0, 0))
    assert copy.name not in invoke(runs).stdout
    invoke(runs, "--prune", "--yes", "--older-than", "0")
    assert (copy / "notes.txt").is_file()


def test_damaged_records_and_summaries_are_shown_and_lose_nothing(runs):
    (next(runs.glob("sft-c*")) / artifacts.FILE).write_text("{")
    (runs / "broken").mkdir()
    (runs / "broken" / "summary.json").write_text('{"stages": [1]}')
    output = invoke(runs).stdout
    assert "damaged: " in output
    assert f"warning: {runs / 'broken' / 'summary.json'}: cannot be read (TypeError" in output
    with pytest.raises(UserError, match=r"summary.json.*cannot be read.*--prune"):
        raise invoke(runs, "--prune", "--yes").exception
    assert len(by_name(runs)) == 5


def test_a_missing_folder_and_a_link(runs, tmp_path):
    with pytest.raises(ArtifactError, match="none: no such folder; name another one with --runs"):
        raise invoke(tmp_path / "none").exception
    target = tmp_path / "elsewhere-ffffffffffff"
    target.mkdir()
    (runs / target.name).symlink_to(target)
    assert target.name not in invoke(runs).stdout
    invoke(runs, "--prune", "--yes", "--older-than", "0")
    assert target.is_dir()


def planned(tmp_path, *overrides):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return {stage.name: stage for stage in plan(read_recipe(file, overrides), tmp_path / "runs")}


def finish(stage) -> None:
    """Record a planned stage as finished."""
    stage.folder.mkdir(parents=True)
    artifacts.write_artifact(
        stage.folder,
        artifacts.Artifact(
            stage=stage.stage,
            name=stage.name,
            digest=stage.digest,
            recipe=stage.config.model_dump(exclude={"stage"}),
            inputs={
                key: {"folder": str(target), "digest": stage.digests[key]}
                for key, target in stage.inputs.items()
            },
            metrics={},
            versions={},
            commit=None,
            seed=0,
            world_size=1,
            seconds=1.0,
            peak_memory_bytes=None,
        ),
    )


def test_the_plan_names_the_keys_for_which_a_stage_runs_again(tmp_path):
    for stage in planned(tmp_path).values():
        finish(stage)
    far = planned(tmp_path, "sft.seed=3", "sft.trainer.max_steps=4", "sft.trainer.warmup_steps=1")
    finish(far["sft"])
    stages = list(inventory.finished_stages(tmp_path / "runs", {"prepare", "sft"}))

    def reason(name, *overrides):
        return inventory.explain_new(planned(tmp_path, *overrides)[name], stages)

    change = reason("sft", "sft.trainer.max_steps=2")
    assert change.settings == {"trainer.max_steps": (1, 2)}
    assert change.inputs == ()
    assert (
        str(change)
        == f"trainer.max_steps 1 → 2 (compared with {planned(tmp_path)['sft'].folder.name})"
    )
    change = reason("sft", "prepare.max_rows=9")
    assert (change.settings, change.inputs) == ({}, ("demonstrations",))
    assert reason("prepare", "prepare.max_rows=9").settings == {"max_rows": (8, 9)}
    long = inventory.Change(tmp_path / "judge", {"guideline": ("a b\n" * 50, None)}, ())
    assert str(long) == f"guideline {'a b ' * 9}a b… → None (compared with judge)"
    output = CliRunner().invoke(
        app,
        ["plan", str(tmp_path / "recipe.yaml"), "sft.seed=1", "--runs", str(tmp_path / "runs")],
    )
    assert "sft: new run: seed 0 → 1 (compared with sft-" in output.stdout
    assert "prepare: new run" not in output.stdout
