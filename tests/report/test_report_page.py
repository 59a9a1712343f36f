"""Tests of the report of a run: its contents, what it escapes, and the page in a browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from helpers import chromium
from helpers.finished_runs import comparison, stage, write_summary
from rich.console import Console
from typer.testing import CliRunner

from align.cli import next_steps
from align.cli.main import app
from align.errors import ArtifactError
from align.pipeline.runner import FinishedStage, RunSummary
from align.report.page import contents, figures
from align.report.page.render import write_report

EVIL = '</script><script>document.title="evil"</script><b onclick="x">'
VOID = {"meta", "link", "input", "path", "rect", "use", "br", "stop", "circle", "line"}


@pytest.fixture
def run(tmp_path):
    """The folder of a run of prepare, sft, dpo and evaluate, whose texts try to leave the page."""
    runs = tmp_path / "runs"
    prepare = stage(runs, "prepare")
    (prepare / "README.md").write_text(f"# Data {EVIL}")
    source = {"demonstrations": {"folder": f"runs/{prepare.name}", "digest": "0" * 64}}
    sft = stage(runs, "sft", inputs=source, headline={"loss": 1.25},
                recipe={"seed": 3, "trainer": {"max_steps": 5}, "prefix_sharing": True})  # fmt: skip
    lines = [{"step": k, "loss": 2.0 / k, "seed": ""} for k in (1, 2, 3)]
    (sft / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dpo = stage(runs, "dpo", inputs={"model": {"folder": str(sft), "digest": "0" * 64}},
                remarks=[f"a remark {EVIL}"])  # fmt: skip
    lines = [{"step": k, "logps/chosen": -40.0 * k, "logps/rejected": -9} for k in (1, 2, 3)]
    (dpo / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tables = [
        {"title": f"win rates {EVIL}", "columns": ["policy", "win rate"], "rows": [["dpo", "62.0"]],
         "note": "in %"},
        {"title": "a prompt", "columns": ["dpo<", "sft<"], "rows": [["left out", "of the page"]],
         "note": ""},
    ]  # fmt: skip
    metrics = {"comparisons": [comparison("dpo"), comparison("sft again")]}
    evaluate = stage(runs, "evaluate", metrics=metrics, tables=tables,
                     inputs={"policies.0": {"folder": str(dpo), "digest": "0" * 64}})  # fmt: skip
    rows = [
        {
            "prompt": "p",
            "messages": [{"role": "user", "content": f"prompt number {k} {EVIL}"}],
            "judge": "gold",
            "policy": "dpo",
            "baseline": "sft",
            "policy_completion": "word " * (k + 1),
            "baseline_completion": f"an answer {EVIL}" if k else "",
            "outcome": (1.0, 0.0, 0.5, None)[k % 4],
            "reason": "shorter",
            "policy_score": 0.25,
            "baseline_score": None,
        }
        for k in range(12)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), evaluate / "comparisons.parquet")
    folders = (prepare, sft, dpo, evaluate)
    return write_summary(runs, "recipe", *folders, overrides=["sft.seed=3"], reused=[prepare])


class Tree(HTMLParser):
    """Checks that elements are closed in order, and collects attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data


def test_the_page_shows_chain_results_curves_settings_and_samples(run):
    page = Tree(write_report(run).read_text())
    for text in (
        "104 min in this run",
        "reused (75 s)",
        "win rates ",
        "62.0",
        "loss",
        "the log-probability of the chosen completions fell from -40.0 to -120.0",
        "max_steps",
        "prompt number 3",
        "2.50 GB peak",
        "align run recipe.yaml sft.seed=3",
        "python",
    ):
        assert text in page.text, text
    assert "left out" not in page.text
    assert "prefix_sharing" not in page.text  # a default
    labels = [value for _, key, value in page.attributes if key == "data-label"]
    assert labels[:4] == ["dpo wins", "sft wins", "tie", "no verdict"]
    pictures = [value for tag, key, value in page.attributes if (tag, key) == ("svg", "aria-label")]
    assert "Win rates with 95 % intervals" in pictures
    assert "loss of sft, by step" in pictures
    assert "logps of dpo, by step" in pictures


def test_data_cannot_leave_the_page_and_the_page_loads_nothing(run):
    text = write_report(run).read_text()
    page = Tree(text)
    assert not [each for each in page.attributes if each[1].startswith("on")]
    assert text.count("<script") == 1
    loading = {"src", "href", "xlink:href", "data", "action"}
    links = {value for _, key, value in page.attributes if key in loading}
    assert {link for link in links if link and link[0] != "#"} == {"data:,"}
    assert "url(" not in re.sub(r"url\(#", "", text)


def test_completions_of_a_sample_stage_are_shown_by_prompt(tmp_path):
    sample = stage(tmp_path, "sample")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {k // 2}"}],
            "completion": [{"role": "assistant", "content": f"answer {k} {EVIL}"}],
            "prompt_id": str(k // 2),
            "finished": k != 3,
        }
        for k in range(4)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), sample / "completions-test.parquet")
    page = Tree(write_report(write_summary(tmp_path, "recipe", sample)).read_text())
    labels = [value for _, key, value in page.attributes if key == "data-label"]
    assert labels == ["finished", "cut off"]
    assert page.text.count("question 1") == 1
    for text in ("answer 0", "answer 3", "completion 2", "1 of 2 without an end token"):
        assert text in page.text


def test_the_same_run_gives_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_stage_whose_folder_was_removed_is_named(run):
    shutil.rmtree(next(run.parent.glob("sft-*")))
    (next(run.parent.glob("dpo-*")) / "artifact.json").write_text("{")
    page = Tree(write_report(run).read_text())
    assert "Not shown, because their folders were removed or changed:" in page.text
    assert contents.read_run(run).missing == ("sft-000000000003", "dpo-000000000003")


def test_texts_of_any_kind_are_on_the_page(run):
    sft = next(run.parent.glob("sft-*"))
    text = "one\u2028line, half a pair: \ud83d, $\\nosuch$, 日本"
    row = {"step": 1, "prompt": "p", "completion": text.replace("\ud83d", "X")}
    half = json.dumps({"step": 2, "prompt": "p", "completion": text})
    lines = json.dumps(row, ensure_ascii=False) + "\n" + half + "\n"
    (sft / "samples.jsonl").write_text(lines, encoding="utf-8")
    (sft / "metrics.jsonl").write_text(json.dumps({"step": 1, "$\\nosuch$ 日本": 1.0}))
    page = write_report(run).read_text(encoding="utf-8")
    assert "one\u2028line, half a pair: X, $\\nosuch$, 日本" in page
    assert "half a pair: ?, $" in page
    assert ">$\\nosuch$ 日本<" in page  # the title of the curve


def test_scores_that_are_logged_in_other_steps_than_the_kl_are_not_drawn(run):
    sft = next(run.parent.glob("sft-*"))
    lines = [{"step": 1, "kl": 1.0, "score": 2.0}, {"step": 2, "gold": 0.5}]
    (sft / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stage = contents.read_run(run).stages[1]
    assert ">score<" in figures.kl_and_score(stage)
    assert ">gold<" not in figures.kl_and_score(stage)
    (sft / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, [{"step": 1, "kl": 1.0}, lines[1]]))
    )
    assert figures.kl_and_score(contents.read_run(run).stages[1]) == ""


def test_a_damaged_table_of_comparisons_is_an_error_of_one_line(run):
    (next(run.parent.glob("evaluate-*")) / "comparisons.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(ArtifactError, match=r"comparisons.parquet: cannot be read .*--force") as e:
        write_report(run)
    assert len(e.value.lines) == 1


def test_the_command_that_repeats_a_run_is_quoted_for_a_shell(run):
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"recipe": "my recipes/a.yaml", "overrides": ["sft.trainer={max_steps: 1}"]}
    (run / "summary.json").write_text(json.dumps(summary))
    command = shlex.split(contents.read_run(run).command)
    assert command == ["align", "run", "my recipes/a.yaml", "sft.trainer={max_steps: 1}",
                       "--runs", str(run.parent)]  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary | {"recipe": "eval-dpo-sft"}))
    assert "This run has no recipe file" in Tree(write_report(run).read_text()).text


@pytest.mark.parametrize("content", ["{", '{"stages": [1]}', "[]", '{"stages": []}'])
def test_a_damaged_summary_is_an_error_of_one_line(run, content):
    (run / "summary.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"summary.json: cannot be read .*; run its recipe"):
        write_report(run)


def test_the_command_finds_a_run_by_folder_name_and_recipe(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("stages:\n  prepare: {source: embedded}\n")
    for name in ("recipe", str(run), "recipe.yaml"):
        result = CliRunner().invoke(app, ["report", name])
        assert result.stdout.strip().endswith("runs/recipe/report.html")
    for name, message in {
        "recipx": r"recipx: neither a run in runs nor a recipe; did you mean `recipe`\?",
        "~nosuchuser": r"~nosuchuser: neither a run in runs nor a recipe",
        "dpo": r"runs/dpo: no finished run of dpo; `align run dpo` finishes it",
    }.items():
        with pytest.raises(ArtifactError, match=message):
            raise CliRunner().invoke(app, ["report", name]).exception
    with pytest.raises(ArtifactError, match=r"recipx: neither .*; no run is finished there"):
        raise CliRunner().invoke(app, ["report", "recipx", "--runs", "none"]).exception


def finished(*kinds: str) -> RunSummary:
    stages = [
        FinishedStage(name=kind, stage=kind, digest="", folder=Path(kind), status="ran",
                      seconds=1.0, metrics={}, tables=())
        for kind in kinds
    ]  # fmt: skip
    return RunSummary("recipe.yaml", 1.0, tuple(stages))


def test_the_next_commands_use_the_last_policy():
    runs = Path("runs")
    trained = list(next_steps.next_commands(finished("prepare", "sft", "dpo"), runs))
    assert trained == [
        "align chat dpo",
        "align eval dpo --baseline sft --judge JUDGE",
        "align export dpo dpo-merged",
    ]
    evaluated = list(next_steps.next_commands(finished("sft", "dpo", "evaluate"), Path("other")))
    assert evaluated == ["align chat dpo --runs other", "align export dpo dpo-merged --runs other"]
    assert list(next_steps.next_commands(finished("control"), runs)) == ["align play control"]
    assert list(next_steps.next_commands(finished("prepare"), runs)) == []


def test_the_next_commands_load_a_policy_as_it_was_trained(tmp_path):
    folder = stage(tmp_path, "dpo", recipe={"quantization": "nf4"})
    run = finished("sft", "dpo")
    run = replace(run, stages=(run.stages[0], replace(run.stages[1], folder=folder)))
    assert list(next_steps.next_commands(run, Path("runs"))) == [
        "align chat dpo --quantization nf4",
        "align eval dpo --baseline sft --judge JUDGE --quantization nf4",
        "align export dpo dpo-merged",
    ]


def test_a_report_that_fails_does_not_fail_the_run(run, capsys):
    (run / "summary.json").unlink()
    console = Console(width=200)
    next_steps.show_next_steps(finished("sft"), run.parent, run.name, console)
    output = capsys.readouterr().out
    assert "warning: no report: ArtifactError: " in output
    assert "next: align chat sft" in output


@pytest.mark.slow
def test_the_page_works_in_a_browser(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    page = write_report(run).read_text()
    probe = """
<script>
const section = document.querySelector(".samples");
const shown = () => section.querySelectorAll(".sample:not([hidden])").length;
const counts = [shown()];
const search = section.querySelector("input");
search.value = "number 3"; search.dispatchEvent(new Event("input")); counts.push(shown());
search.value = ""; search.dispatchEvent(new Event("input"));
const select = section.querySelector("select");
select.value = "dpo wins"; select.dispatchEvent(new Event("change")); counts.push(shown());
const wide = document.documentElement.scrollWidth > window.innerWidth;
document.title = JSON.stringify([counts, wide, section.querySelector("output").textContent]);
</script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800",
               "--enable-logging=stderr", "--dump-dom", file.as_uri()]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    title = re.search(r"<title>(.*?)</title>", result.stdout)
    assert title is not None
    counts, wide, output = json.loads(title[1])
    assert counts == [12, 1, 3]
    assert output == "3 shown"
    assert not wide
    assert "CONSOLE" not in result.stderr


@pytest.mark.slow
def test_the_page_fits_a_phone(run, tmp_path):
    pytest.importorskip("websockets")
    page = write_report(run).read_text()
    assert page.count(">not in a checkout<") == 1
    file = tmp_path / "page.html"
    file.write_text(page.replace(">not in a checkout<", f">{'80747f859f' * 4}<"))
    with chromium.browser(tmp_path / "profile") as browser:
        tab = browser.new_tab()
        tab.set_view(390, 800)
        tab.open(file.as_uri())
        tab.wait("document.querySelector('.samples') !== null")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert not tab.messages
