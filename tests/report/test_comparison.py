"""Tests of the page that compares several runs."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from helpers.finished_runs import comparison, stage, write_summary
from typer.testing import CliRunner

from align.cli.main import app
from align.errors import UserError
from align.functional.intervals import bootstrap_interval
from align.report.page import comparison as page
from align.report.page.contents import read_run


def make_run(runs, name, beta, outcomes):
    """A run with a shared sft stage and its dpo and evaluate stages."""
    sft = runs / "sft-0000000000aa"
    if not sft.is_dir():
        stage(runs, "sft").rename(sft)
    dpo = stage(runs, "dpo", recipe={"beta": beta, "trainer": {"max_steps": 3}},
                inputs={"model": {"folder": str(sft), "digest": "0" * 64}})  # fmt: skip
    rows = [{"step": k, "loss": beta / k} for k in (1, 2, 3)]
    (dpo / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rate = sum(outcomes) / len(outcomes)
    metrics = {"comparisons": [comparison("dpo", win_rate=rate)]}
    evaluate = stage(runs, "evaluate", metrics=metrics)
    table = [
        {
            "prompt": f"prompt {k}", "judge": "gold", "policy": "dpo", "baseline": "sft",
            "policy_completion": "a", "baseline_completion": "b", "outcome": outcome,
        }
        for k, outcome in enumerate(outcomes)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(table), evaluate / "comparisons.parquet")
    folders = []
    for folder in (dpo, evaluate):
        folders.append(folder.rename(runs / f"{folder.name[:-1]}{name[-1]}"))
    return write_summary(runs, name, sft, *folders)


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path, "run-a", 0.1, [0.0, 1.0, 0.5, 0.0, 1.0])
    make_run(tmp_path, "run-b", 0.3, [1.0, 1.0, 0.5, 1.0])
    return tmp_path


def test_settings_that_differ(runs):
    found = page.differing_settings([read_run(runs / "run-a"), read_run(runs / "run-b")])
    assert found == [("dpo.beta", [None, 0.3])]  # 0.1 is the default


def test_differences_are_those_of_the_prompts_that_both_runs_have(runs):
    first, second = read_run(runs / "run-a"), read_run(runs / "run-b")
    (difference,) = page.paired_differences([first, second])
    assert (difference.run, difference.first, difference.policy) == ("run-b", "run-a", "dpo")
    assert difference.n_prompts == 4
    assert difference.value == pytest.approx((1 + 0 + 0 + 1) / 4)
    interval = bootstrap_interval(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert (difference.low, difference.high) == pytest.approx(tuple(interval))
    (reverse,) = page.paired_differences([second, first])
    assert reverse.value == -difference.value


def test_curves_of_stages_that_differ_are_drawn_together(runs):
    ((name, panels),) = page.joined_curves([read_run(runs / "run-a"), read_run(runs / "run-b")])
    assert name == "dpo"
    (panel,) = panels
    assert panel.title == "loss"
    assert panel.lines["run-a"][0] == (1.0, 0.1)
    assert panel.lines["run-b"][0] == (1.0, 0.3)


def test_the_command_writes_the_page(runs):
    result = CliRunner().invoke(app, ["report", "--compare", "run-a", "run-b", "--runs", str(runs)])
    assert result.stdout == f"{runs / 'comparison.html'}\n"
    text = (runs / "comparison.html").read_text()
    for part in ("dpo.beta", "50.0", "87.5", "loss of dpo, by step", "2 runs"):
        assert part in text
    for arguments, message in {
        ("--compare", "run-a", "run-a"): "--compare: expected at least two runs",
        ("run-a", "--out", "x.html"): "--out names the page of --compare",
    }.items():
        with pytest.raises(UserError, match=message):
            raise CliRunner().invoke(app, ["report", *arguments, "--runs", str(runs)]).exception
