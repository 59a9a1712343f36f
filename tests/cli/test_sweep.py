"""Tests of sweeps and of named runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import main
from align.cli.sweep import points
from align.errors import RecipeError

RECIPE = """
stages:
  prepare: {source: embedded, max_rows: 40}
  sft: {model: {hidden_size: 16, num_hidden_layers: 1}, trainer: {max_steps: 1}}
"""


def test_points_are_all_combinations():
    found = [point.overrides for point in points(["a.x=1,2", 'a.y=[p,q],"r,s",{t: 1, u: 2}'])]
    assert found == [
        (f"a.x={x}", f"a.y={y}") for x in (1, 2) for y in ("[p,q]", '"r,s"', "{t: 1, u: 2}")
    ]


def test_names_of_runs_are_names_of_folders():
    names = [point.run_name("dpo") for point in points(["dpo.trainer.loss_type=[a, b],hinge"])]
    assert names == ["dpo-dpo.trainer.loss_type=_a_b_", "dpo-dpo.trainer.loss_type=hinge"]
    assert all("/" not in point.run_name("r") for point in points(["a.model=x/y,z"]))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("dpo.beta", "expected KEY=VALUE,VALUE"),
        ("=1,2", "expected KEY=VALUE,VALUE"),
        ("dpo.beta=1,,2", "expected KEY=VALUE,VALUE"),
        ("dpo.beta=1,1", "has a value twice"),
        (f"a.b={','.join(map(str, range(101)))}", "101 runs, more than 100"),
    ],
)
def test_what_is_no_sweep_is_refused(sweep, message):
    with pytest.raises(RecipeError, match=message):
        points([sweep])


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """The arguments of the runs that would be launched; each of them succeeds."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    calls: list[list[str]] = []
    monkeypatch.setattr(main, "launch", lambda arguments: calls.append(arguments[1:]) or 0)
    monkeypatch.setattr(
        "align.report.page.render.write_comparison", lambda folders, file: [*folders, file]
    )
    return calls


def run(*arguments: str):
    result = CliRunner().invoke(main.app, ["run", "recipe.yaml", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_sweep_runs_every_point_under_its_name_and_compares_them(launched):
    output = run("sft.seed=3", "--sweep", "sft.trainer.max_steps=1,2").stdout
    names = [f"recipe-sft.trainer.max_steps={k}" for k in (1, 2)]
    assert launched == [
        [
            "recipe.yaml",
            "sft.seed=3",
            f"sft.trainer.max_steps={k}",
            "--runs",
            "runs",
            "--name",
            name,
        ]
        for k, name in zip((1, 2), names, strict=True)
    ]
    assert output.startswith("comparison: ")
    assert all(f"runs/{name}" in output for name in names)
    assert "runs/recipe-comparison.html" in output


def test_errors_of_all_points_are_found_before_the_first_run(launched):
    with pytest.raises(RecipeError, match="max_steps"):
        run("--sweep", "sft.trainer.max_steps=1,many")
    assert launched == []


def test_a_sweep_ends_with_the_code_of_the_run_that_failed(launched, monkeypatch):
    monkeypatch.setattr(main, "launch", lambda arguments: launched.append(arguments) or 130)
    assert run("--sweep", "sft.seed=1,2").exit_code == 130
    assert len(launched) == 1


def test_a_run_may_have_a_name(launched):
    run("--name", "seed1", "sft.seed=1")
    assert launched == [["recipe.yaml", "sft.seed=1", "--runs", "runs", "--name", "seed1"]]
    run()
    assert launched[1] == ["recipe.yaml", "--runs", "runs"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "dpo-0123456789ab", "a b"])
def test_what_is_no_name_of_a_run_is_refused(launched, name):
    result = run("--name", name)
    assert result.exit_code == 2
    assert launched == []
