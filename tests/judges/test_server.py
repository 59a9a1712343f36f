"""A language model behind an API as a judge, against scripted servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.judge_server import Request, judge_server

from align.config.judges import ServerJudge
from align.errors import UserError
from align.judges.base import Pair
from align.judges.server import LanguageModelJudge

FIRST_WAIT = 0.002
KEY = "sk-test-0123456789abcdefghij"


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair(n: int = 0, first: str = "good", second: str = "bad", **columns: Any) -> Pair:
    prompt = messages("user", f"question {n}")
    return Pair(prompt, messages("assistant", first), messages("assistant", second), columns)


def judge(base_url: str, folder: Path, **keys: Any) -> LanguageModelJudge:
    rubric = keys.pop("rubric", None)
    api = {"base_url": base_url, "model": "judge-1", "max_retries": 2, **keys}
    config = ServerJudge.model_validate({"api": api, "rubric": rubric})
    return LanguageModelJudge(config, cache=folder / "verdicts.jsonl", first_wait=FIRST_WAIT)


def honest(request: Request) -> None:
    """Prefer the completion ``good``, wherever it is."""
    question = request.question
    request.prefer("A" if question.index("\ngood\n") < question.index("\nbad\n") else "B")


def test_verdicts_come_back_in_the_order_of_the_pairs(tmp_path):
    pairs = [pair(n) if n % 3 else pair(n, first="bad", second="good") for n in range(20)]
    with judge_server(honest) as server:
        verdicts = judge(server.base_url, tmp_path).compare(pairs)
    assert [verdict.preference for verdict in verdicts] == [float(n % 3 > 0) for n in range(20)]
    assert {verdict.reason for verdict in verdicts} == {"because"}


def test_the_request_has_the_settings_and_the_schema_of_the_answer(tmp_path):
    with judge_server(honest) as server:
        keys = {"temperature": 0.3, "max_tokens": 77, "extra_body": {"seed": 4, "top_p": None}}
        judge(server.base_url, tmp_path, **keys).compare([pair()])
    (body,) = server.bodies
    assert body["model"] == "judge-1" and body["stream"] is False
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.3, 77, 4)
    assert "top_p" not in body
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["verdict"]["enum"] == ["A", "B", "tie"]
    assert "Authorization" not in server.headers[0]


def test_no_question_is_sent_twice(tmp_path):
    with judge_server(honest) as server:
        judge(server.base_url, tmp_path).compare([pair(0), pair(1), pair(0)])
        assert server.n_requests == 2
        again = judge(server.base_url, tmp_path)
        assert [v.preference for v in again.compare([pair(1), pair(2)])] == [1.0, 1.0]
        assert server.n_requests == 3
    assert (again.usage.requests, again.usage.cached) == (1, 1)
    assert (again.usage.input_tokens, again.usage.output_tokens) == (20, 4)


def test_an_error_of_the_settings_is_one_line_after_one_request(tmp_path):
    with judge_server(lambda request: request.error(401, "bad key")) as server:
        with pytest.raises(UserError) as raised:
            judge(server.base_url, tmp_path).compare([pair(n) for n in range(9)])
    assert server.n_requests == 1
    assert len(raised.value.lines) == 1 and "HTTP 401: bad key" in str(raised.value)


def test_a_failure_is_no_verdict_and_no_loss(tmp_path):
    def script(request: Request) -> None:
        if "question 3" in request.question:
            request.error(500, "overloaded")
        else:
            honest(request)

    with judge_server(script) as server:
        verdicts = judge(server.base_url, tmp_path).compare([pair(n) for n in range(5)])
    assert [verdict.is_valid for verdict in verdicts] == [True, True, True, False, True]
    assert verdicts[3].reason == "HTTP 500: overloaded (attempt 3)"
    assert server.n_requests == 4 + 3
    stored = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(stored) == 4
