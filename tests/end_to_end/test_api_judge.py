"""Recipes with a judge behind an API, from the check to the win rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.judge_server import Request, judge_server

from align.cli import plan

KEY = "sk-test-0123456789abcdefghij"


def write_recipe(base_url: str, **keys: Any) -> list[str]:
    """A recipe that compares a file of completions with the data set's own, and its data."""
    prompts = [f"Question {n} about topic {n * 7 % 13}?" for n in range(100)]
    pairs = [{"prompt": p, "chosen": f"bad {p}", "rejected": "no"} for p in prompts]
    own = [{"prompt": p, "completion": f"good {p}"} for p in prompts]
    for name, rows in (("pairs", pairs), ("own", own)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    api = {"base_url": base_url, "model": "judge-1", "key_variable": "JUDGE_KEY", **keys}
    evaluate = {"policies": ["own.jsonl"], "baseline": "reference", "judge": {"api": api}}
    stages = {"prepare": {"source": "pairs.jsonl", "test_fraction": 0.3}, "evaluate": evaluate}
    Path("recipe.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return prompts


def prefer_good(request: Request) -> None:
    """Prefer the completion that begins with ``good``, after some failures."""
    if request.number % 9 == 4:
        return request.error(429, Retry_After="0")
    if request.number % 9 == 7:
        return request.drop()
    good, bad = (request.question.index(f"\n{word} Question") for word in ("good", "bad"))
    return request.prefer("A" if good < bad else "B")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.judges.chat_client.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.mark.slow
@pytest.mark.usefixtures("waits")
def test_an_evaluation_counts_its_requests_and_sends_none_again(
    launch: Callable[..., Any], capfd: pytest.CaptureFixture[str]
):
    with judge_server(prefer_good) as server:
        server.models = ["judge-1"]
        write_recipe(server.base_url)
        plan.check(Path("recipe.yaml"))
        plan.plan(Path("recipe.yaml"))
        assert server.n_requests == 0
        planned = capfd.readouterr().out
        first = launch("recipe.yaml")
        assert first.code == 0, first.err
        (artifact,) = Path("runs").glob("evaluate-*/artifact.json")
        metrics = json.loads(artifact.read_text())["metrics"]
        (row,) = metrics["comparisons"]
        verdicts = Path("runs/verdicts.jsonl").read_text().splitlines()
        assert f"at most {len(verdicts)} requests to judge-1" in " ".join(planned.split())
        assert (row["win_rate"], row["consistency"], row["invalid"]) == (1.0, 1.0, 0)
        assert 2 * row["n_prompts"] == len(verdicts) < server.n_requests
        sent = server.n_requests
        assert launch("recipe.yaml", "evaluate.resamples=1000").code == 0
        assert server.n_requests == sent
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.usefixtures("waits")
def test_a_refused_key_is_one_line_and_exit_code_2(launch: Callable[..., Any]):
    with judge_server(lambda request: request.error(401, f"wrong key {KEY}")) as server:
        write_recipe(server.base_url)
        finished = launch("recipe.yaml")
    assert (finished.code, server.n_requests) == (2, 1)
    (line,) = (line for line in finished.err.splitlines() if "HTTP 401" in line)
    assert "recipe.yaml:" in line and "environment variable JUDGE_KEY" in line
    assert KEY not in finished.out + finished.err and "Traceback" not in finished.err


@pytest.mark.slow
def test_the_check_names_the_key_of_a_server_that_does_not_answer(
    launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    write_recipe("http://127.0.0.1:1/v1")
    finished = launch("recipe.yaml")
    assert finished.code == 2
    assert "evaluate.judge.api.key_variable: the environment variable JUDGE_KEY is not set" in (
        finished.err
    )
    monkeypatch.setenv("JUDGE_KEY", KEY)
    finished = launch("recipe.yaml")
    assert finished.code == 2 and "evaluate.judge: http://127.0.0.1:1/v1: no server" in finished.err
    assert not list(Path("runs").glob("*"))
