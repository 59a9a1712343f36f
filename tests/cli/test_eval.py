"""`align eval` with finished policies: names, runs, prompts by lineage, judges, errors."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from helpers import ppo_fixtures, tiny_models
from typer.testing import CliRunner

from align.cli.comparison import FinishedStages, comparison_recipe, stages_of_run
from align.cli.main import app
from align.errors import RecipeError, UserError
from align.runtime import artifacts


@pytest.fixture
def runs(tmp_path_factory, tmp_path, monkeypatch):
    """A runs folder with the stages `prepare`, `sft` and `lora`, and a run of them."""
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    (folder / "tiny").mkdir(parents=True)
    stages = []
    for name, kind, source in (
        ("prepare", "prepare", world.data),
        ("sft", "sft", world.sft),
        ("lora", "sft", world.lora),
    ):
        target = folder / f"{name}-{'0' * 12}"
        target.symlink_to(source)
        stages.append({"name": name, "stage": kind, "folder": f"elsewhere/{target.name}"})
    (folder / "tiny" / "summary.json").write_text(json.dumps({"stages": stages}))
    return folder


def settings(runs, *arguments, baseline="sft", judges=("gold",), prompts=None):
    recipe = comparison_recipe(
        arguments, baseline=baseline, judges=judges, prompts=prompts, runs=runs
    )
    assert recipe.problems == ()
    return recipe, recipe.stages["evaluate"]


def test_stages_are_found_by_name_and_prompts_by_lineage(runs):
    recipe, stage = settings(runs, "lora", "n_prompts=7", "temperature=0.5")
    assert stage.policies == [str(runs / "lora-000000000000")]
    assert os.path.samefile(stage.baseline, runs / "sft-000000000000")
    assert os.path.samefile(stage.prompts, runs / "prepare-000000000000")
    assert (stage.judge, stage.n_prompts, stage.temperature) == ("gold", 7, 0.5)
    assert recipe.name == "eval-lora-sft"


def test_all_policies_of_a_run_are_compared(runs):
    _, stage = settings(runs, "runs/tiny")
    assert stage.policies == ["runs/lora-000000000000"]  # without the baseline and the data
    _, named = settings(runs, "runs/tiny", "sft", baseline="lora", prompts="prepare")
    assert named.policies == ["runs/sft-000000000000"]
    assert named.baseline == "runs/lora-000000000000"
    assert named.prompts == "runs/prepare-000000000000"


def test_a_folder_of_runs_names_its_newest_stages(runs):
    runs.rename(runs.parent / "other")
    _, stage = settings(runs, "other", "lora")
    assert stage.policies == ["other/lora-000000000000"]
    assert stage.baseline == "other/sft-000000000000"
    with pytest.raises(UserError, match="no finished policy `sft`"):
        settings(runs, "lora")  # without the folder, stages are looked up in --runs


def test_a_baseline_of_the_lineage_comes_before_a_newer_stage_of_its_name(runs):
    """The stage `sft` of another recipe is newer, but `lora` was not trained from it."""
    newer = runs / f"sft-{'1' * 12}"
    shutil.copytree(runs / f"sft-{'0' * 12}", newer)
    os.utime(newer / artifacts.FILE, (2e9, 2e9))
    _, stage = settings(runs, "lora")
    assert os.path.samefile(stage.baseline, runs / f"sft-{'0' * 12}")
    _, alone = settings(runs, "sft", baseline="lora")
    assert os.path.samefile(alone.policies[0], newer)


def test_the_stage_that_finished_last_is_the_newest_although_the_clock_was_set_back(runs):
    last = runs / f"sft-{'1' * 12}"
    shutil.copytree(runs / f"sft-{'0' * 12}", last)
    record = artifacts.read_artifact(last)
    (last / artifacts.FILE).unlink()
    artifacts.write_artifact(last, record)
    os.utime(last / artifacts.FILE, (0, 0))
    _, stage = settings(runs, "sft", baseline="lora")
    assert os.path.samefile(stage.policies[0], last)
    assert stages_of_run(runs)["sft"] == ("sft", last)


def test_the_lineage_has_each_stage_once(tmp_path, monkeypatch):
    """Twenty rounds, each with two inputs from the one before: 2**20 ways lead to the first."""
    for n in range(20):
        (tmp_path / str(n)).mkdir()

    def read_artifact(folder):
        before = {"folder": str(tmp_path / str(int(folder.name) - 1))}
        inputs = {} if folder.name == "0" else {"model": before, "pairs": before}
        return SimpleNamespace(name=folder.name, stage="dpo", inputs=inputs)

    monkeypatch.setattr(artifacts, "read_artifact", read_artifact)
    stages = FinishedStages(tmp_path)
    stages.prefer_lineage([str(tmp_path / "19")])
    assert list(stages.of_run) == [str(n) for n in range(20)]


def test_folders_are_taken_as_they_are(runs):
    folder = str(runs / "lora-000000000000")
    _, stage = settings(runs, folder, baseline=folder, prompts=str(runs / "prepare-000000000000"))
    assert stage.policies == [stage.baseline] == [folder]


def test_every_name_that_is_not_found_is_reported_at_once(runs):
    with pytest.raises(UserError) as error:
        settings(runs, "lroa", "a.jsonl", baseline="stf", judges=["score"], prompts="prepared")
    policy, file, baseline, judge, prompts = error.value.lines
    assert file == "a.jsonl: no such file of completions"
    names = [line.split("`")[1] for line in (policy, judge, prompts)]
    assert names == ["lroa", "score", "prepared"]
    assert "did you mean `sft`?" in baseline


@pytest.mark.parametrize(
    ("arguments", "baseline", "message"),
    [
        pytest.param(["n_prompts=3"], "sft", "no policy; name a run or a policy first", id="keys only"),
        pytest.param(["runs/only"], "sft", "no policy but the baseline", id="nothing to compare"),
        pytest.param(["runs/damaged"], "sft", "summary.json: damaged", id="damaged summary"),
    ],
)  # fmt: skip
def test_wrong_runs_are_errors(runs, arguments, baseline, message):
    for name, text in (("damaged", '{"stages": 3}'), ("only", '{"stages": []}')):
        (runs / name).mkdir()
        (runs / name / "summary.json").write_text(text)
    with pytest.raises(UserError, match=message):
        settings(runs, *arguments, baseline=baseline)


def test_policies_without_prepared_data_need_prompts(runs, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "?", "completion": "!"}\n')
    with pytest.raises(UserError, match="--prompts: missing"):
        settings(runs, str(file), baseline=str(file))


def test_keys_are_checked_as_in_a_recipe(runs):
    recipe = comparison_recipe(
        ["lora", "n_prompts=many", "temp=1"],
        baseline="sft",
        judges=["gold"],
        prompts=None,
        runs=runs,
    )
    assert any("`temperature`" in problem for problem in recipe.problems)
    assert any("n_prompts: expected a whole number" in problem for problem in recipe.problems)


@pytest.mark.parametrize(
    ("text", "judge"),
    [
        ("gold", "gold"),
        ("math", {"function": "math"}),
        ("rewards:short", {"function": "rewards:short"}),
        ("people.jsonl", {"annotations": "people.jsonl"}),
        ("{annotations: folder}", {"annotations": "folder"}),
        ("owner/reward-model", "owner/reward-model"),
    ],
)
def test_the_form_of_a_judge_decides_its_kind(tmp_path, text, judge):
    assert FinishedStages(tmp_path).judge(text) == judge


def test_a_misspelled_judge_is_named_as_one(runs):
    with pytest.raises(UserError, match="--judge: no judge `glod`; did you mean `gold`"):
        settings(runs, "lora", judges=["glod"])


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["rewrad", "preparre"], ["no finished policy `rewrad`", "no finished policy `preparre`"]),
        (["o/m", "o/d", "--dtype", "int8"], ["--dtype int8: expected float32 or bfloat16"]),
        (["o/m", "o/d", "--judge", "a.json"], ["--judge a.json: compares two completions"]),
        (["o/m", "o/d"], ["o/d: no such file or folder"]),
    ],
)
def test_wrong_arguments_of_eval_reward_are_reported(tmp_path, options, lines):
    with pytest.raises(UserError) as error:
        CliRunner().invoke(
            app, ["eval", "reward", *options, "--runs", str(tmp_path)], catch_exceptions=False
        )
    assert len(error.value.lines) == len(lines)
    assert all(map(str.__contains__, error.value.lines, lines))


@pytest.mark.slow
def test_eval_reward_prints_tables_or_json(tmp_path_factory, tmp_path):
    folders = ppo_fixtures.folders(tmp_path_factory.getbasetemp())
    arguments = ["eval", "reward", str(folders.adapter), str(folders.world.data)]
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    shown = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
    accuracy = json.loads(shown)["pairs"]["accuracy"]
    assert f"{100 * accuracy:.1f} %" in printed


def test_a_stage_called_like_a_command_is_named_after_compare():
    listed = CliRunner().invoke(app, ["eval", "--help"]).output
    assert "compare" in listed
    assert "annotations" in listed
    for arguments in (["eval", "dpo"], ["eval", "compare", "annotations"]):
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, "--baseline" in result.output) == (2, True)


@pytest.mark.slow
def test_the_command_evaluates_and_stores_the_result(runs):
    arguments = ["eval", "runs/tiny", "--baseline", "sft", "--judge", "gold"]
    keys = ["n_prompts=3", "max_new_tokens=4", "resamples=100"]
    result = CliRunner().invoke(app, [*arguments, *keys], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (folder,) = runs.glob("evaluate-*")
    metrics = artifacts.read_artifact(folder).metrics
    assert [each["n_prompts"] for each in metrics["comparisons"]] == [3, 3]
    assert (runs / "eval-lora-sft" / "summary.json").is_file()
    again = CliRunner().invoke(app, [*arguments, *keys], catch_exceptions=False)
    assert "1 stage, 1 reused" in again.output
    with pytest.raises(RecipeError, match="temperature"):
        CliRunner().invoke(app, [*arguments, "temp=1"], catch_exceptions=False)
