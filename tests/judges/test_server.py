"""A language model behind an API as a judge, against scripted servers."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.judge_server import Request, judge_server

from align.config.judges import ServerJudge
from align.errors import UserError
from align.judges.base import Pair
from align.judges.chat_client import Redactor, retry_after_seconds
from align.judges.server import LanguageModelJudge
from align.judges.server_check import check_judge, count_requests

KEY = "sk-test-0123456789abcdefghij"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.judges.chat_client.FIRST_WAIT_SECONDS", 0.002)


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair(n: int = 0, first: str = "good", second: str = "bad", **columns: Any) -> Pair:
    prompt = messages("user", f"question {n};")
    return Pair(prompt, messages("assistant", first), messages("assistant", second), columns)


def pairs(count: int) -> list[Pair]:
    return [pair(n) for n in range(count)]


def config(base_url: str, **keys: Any) -> ServerJudge:
    rubric = keys.pop("rubric", None)
    api = {"base_url": base_url, "model": "judge-1", "max_retries": 2, **keys}
    return ServerJudge.model_validate({"api": api, "rubric": rubric})


def judge(base_url: str, folder: Path, **keys: Any) -> LanguageModelJudge:
    cache = folder / "verdicts.jsonl"
    return LanguageModelJudge(config(base_url, **keys), cache=cache)


def honest(request: Request) -> None:
    """Prefer the completion ``good``, wherever it is."""
    question = request.question
    request.prefer("A" if question.index("\ngood\n") < question.index("\nbad\n") else "B")


# Requests and verdicts


def test_verdicts_come_back_in_the_order_of_the_pairs(tmp_path):
    asked = [pair(n) if n % 3 else pair(n, first="bad", second="good") for n in range(20)]
    with judge_server(honest) as server:
        verdicts = judge(server.base_url, tmp_path).compare(asked)
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


@pytest.mark.parametrize(
    ("kind", "expected"), [("json_object", {"type": "json_object"}), ("none", None)]
)
def test_the_answer_may_be_requested_without_a_schema(tmp_path, kind, expected):
    with judge_server(honest) as server:
        judge(server.base_url, tmp_path, structured_output=kind).compare([pair()])
    assert server.bodies[0].get("response_format") == expected
    assert '{"reason": TEXT, "verdict": VERDICT}' in server.bodies[0]["messages"][-1]["content"]


def test_not_more_requests_run_at_the_same_time_than_allowed(tmp_path):
    three = threading.Barrier(3, timeout=10.0)

    def script(request: Request) -> None:
        if request.number > 0:  # the first one is sent alone
            three.wait()
        honest(request)

    with judge_server(script) as server:
        judge(server.base_url, tmp_path, concurrency=3).compare(pairs(10))
    assert server.at_once == 3


def test_prices_give_the_cost_of_all_tokens(tmp_path):
    with judge_server(honest) as server:
        prices = {"input_price": 3.0, "output_price": 50.0}
        asked = judge(server.base_url, tmp_path, **prices)
        asked.compare(pairs(4))
    # 4 * (10 tokens * 3 + 2 tokens * 50) / a million
    assert asked.usage.cost == pytest.approx(520e-6)
    assert (asked.usage.input_tokens, asked.usage.output_tokens) == (40, 8)


def test_repeated_verdicts_are_separate_requests_and_their_mean(tmp_path):
    with judge_server(lambda request: request.prefer("AAB"[request.number])) as server:
        (verdict,) = judge(server.base_url, tmp_path, n_verdicts=3, concurrency=1).compare([pair()])
        (again,) = judge(server.base_url, tmp_path, n_verdicts=3).compare([pair()])
    assert server.n_requests == 3
    assert verdict.votes == (1.0, 1.0, 0.0) and verdict.preference == pytest.approx(2 / 3)
    assert again == verdict


def test_a_missing_repeat_is_left_out_of_the_mean(tmp_path):
    with judge_server(lambda request: request.prefer("A?B"[request.number])) as server:
        (verdict,) = judge(server.base_url, tmp_path, n_verdicts=3, concurrency=1).compare([pair()])
    assert (verdict.preference, verdict.votes) == (0.5, (1.0, 0.0))


def test_it_works_inside_an_event_loop(tmp_path):
    async def cell() -> float:
        return judge(server.base_url, tmp_path).compare([pair()])[0].preference

    with judge_server(honest) as server:
        assert asyncio.run(cell()) == 1.0


# Failures


def test_a_failure_is_no_verdict_and_no_loss(tmp_path):
    def script(request: Request) -> None:
        if "question 3;" in request.question:
            request.error(500, "overloaded")
        else:
            honest(request)

    with judge_server(script) as server:
        verdicts = judge(server.base_url, tmp_path).compare(pairs(5))
        assert server.n_requests == 4 + 3
        assert [verdict.is_valid for verdict in verdicts] == [True, True, True, False, True]
        assert verdicts[3].reason == "HTTP 500: overloaded (attempt 3)"
        judge(server.base_url, tmp_path).compare(pairs(5))
    assert server.n_requests == 7 + 3  # only the failed one is sent again


def partial(request: Request) -> None:
    request.handler.send_response(200)
    request.handler.send_header("Content-Length", "1000")
    request.handler.end_headers()
    request.handler.wfile.write(b'{"choices": [')
    request.drop()


TRANSIENT = {
    "rate limit": lambda request: request.error(429),
    "rate limit with seconds": lambda request: request.error(429, Retry_After="0"),
    "rate limit with nonsense": lambda request: request.error(429, Retry_After="soon"),
    "rate limit with a date": lambda request: request.error(
        503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"
    ),
    "timeout of the server": lambda request: request.error(408),
    "internal error": lambda request: request.error(500),
    "bad gateway": lambda request: request.send(502, "<html>Bad gateway</html>"),
    "nothing new": lambda request: request.send(304, ""),
    "empty error": lambda request: request.send(503, ""),
    "dropped": lambda request: request.drop(),
    "dropped in the body": partial,
    "slow": lambda request: time.sleep(0.1),
    "not HTTP": lambda request: request.handler.wfile.write(b"\x00\x01nonsense\r\n\r\n"),
    "HTML": lambda request: request.send(200, "<html>Login</html>", Content_Type="text/html"),
    "broken JSON": lambda request: request.send(200, '{"choices": [{"mess'),
    "nested JSON": lambda request: request.send(200, "[" * 100_000),
    "empty": lambda request: request.send(200, ""),
    "no choices": lambda request: request.send(200, '{"choices": []}'),
    "null choices": lambda request: request.send(200, '{"choices": null}'),
    "a list": lambda request: request.send(200, "[1]"),
    "choice without message": lambda request: request.send(200, '{"choices": ["A"]}'),
    "an error with status 200": lambda request: request.send(200, '{"error": {"message": "x"}}'),
    "damaged gzip": lambda request: request.send(200, b"\x1f\x8bxxx", Content_Encoding="gzip"),
}


@pytest.mark.parametrize("failure", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_a_request_is_sent_again_after(tmp_path, failure):
    def script(request: Request) -> None:
        if request.number == 0:
            failure(request)
        else:
            honest(request)

    seconds = 0.05 if failure is TRANSIENT["slow"] else 10.0
    with judge_server(script) as server:
        asked = judge(server.base_url, tmp_path, timeout_seconds=seconds)
        (verdict,) = asked.compare([pair()])
    assert (verdict.preference, server.n_requests, asked.usage.requests) == (1.0, 2, 2)


@pytest.mark.parametrize(
    ("status", "repair"),
    [
        (401, "key_variable"),
        (402, "quota"),
        (403, "key_variable"),
        (404, "usually ends in /v1"),
        (405, "usually ends in /v1"),
        (418, "settings under `api`"),
    ],
)
def test_an_error_of_the_settings_is_one_line_after_one_request(tmp_path, status, repair):
    with (
        judge_server(lambda request: request.error(status, "no\nway")) as server,
        pytest.raises(UserError) as raised,
    ):
        judge(server.base_url, tmp_path).compare(pairs(9))
    assert server.n_requests == 1
    (line,) = raised.value.lines
    assert f"HTTP {status}: no way" in line and repair in line and "\n" not in line


def test_a_redirect_is_not_followed(tmp_path):
    with (
        judge_server(
            lambda request: request.send(307, "", Location="http://elsewhere/v2")
        ) as server,
        pytest.raises(UserError, match="redirects to 'http://elsewhere/v2'; correct `base_url`"),
    ):
        judge(server.base_url, tmp_path).compare(pairs(9))
    assert server.n_requests == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_server_that_refuses_the_first_three_requests_refuses_the_settings(tmp_path, status):
    with (
        judge_server(lambda request: request.error(status, "no way")) as server,
        pytest.raises(UserError, match=f"HTTP {status}: no way; answers .* `structured_output`"),
    ):
        judge(server.base_url, tmp_path).compare(pairs(9))
    assert server.n_requests == 3


@pytest.mark.parametrize("refused", [range(1, 14), range(2)], ids=["after an answer", "at first"])
def test_texts_that_are_refused_are_no_verdict_in_the_first_run_and_in_the_next(tmp_path, refused):
    def script(request: Request) -> None:
        if any(f"question {number};" in request.question for number in refused):
            request.error(400, "filtered")
        else:
            honest(request)

    with judge_server(script) as server:
        for n_requests in (16, 16 + len(refused)):
            verdicts = judge(server.base_url, tmp_path, concurrency=1).compare(pairs(16))
            assert [each.is_valid for each in verdicts] == [n not in refused for n in range(16)]
            assert server.n_requests == n_requests


def test_an_empty_answer_is_not_stored(tmp_path):
    def script(request: Request) -> None:
        if request.number == 0:
            request.answer("")
        else:
            honest(request)

    with judge_server(script) as server:
        for is_valid in (False, True):
            (verdict,) = judge(server.base_url, tmp_path).compare([pair()])
            assert verdict.is_valid is is_valid


def test_a_quota_that_is_used_up_is_no_rate_limit(tmp_path):
    body = json.dumps({"error": {"code": "insufficient_quota", "message": "pay"}})
    with (
        judge_server(lambda request: request.send(429, body)) as server,
        pytest.raises(UserError, match="no quota left"),
    ):
        judge(server.base_url, tmp_path).compare(pairs(9))
    assert server.n_requests == 1


@pytest.mark.parametrize("message", ["maximum context length is 4096", "x"])
def test_a_request_that_is_refused_where_others_are_answered_is_no_verdict(tmp_path, message):
    def script(request: Request) -> None:
        if "question 1;" in request.question:
            request.error(400, message)
        else:
            honest(request)

    with judge_server(script) as server:
        verdicts = judge(server.base_url, tmp_path).compare(pairs(3))
    assert [verdict.is_valid for verdict in verdicts] == [True, False, True]
    assert (verdicts[1].reason, server.n_requests) == (f"HTTP 400: {message}", 3)


def test_a_server_that_answers_nothing_ends_the_evaluation(tmp_path):
    with (
        judge_server(lambda request: request.error(500, "broken")) as server,
        pytest.raises(UserError, match="3 requests in a row failed, the last one: HTTP 500: bro"),
    ):
        judge(server.base_url, tmp_path, concurrency=1).compare(pairs(50))
    assert server.n_requests == 9


def test_a_server_that_stops_answering_ends_the_evaluation_and_loses_nothing(tmp_path):
    def script(request: Request) -> None:
        if request.number >= 10:
            request.drop()
        else:
            honest(request)

    with judge_server(script) as server:
        asked = judge(server.base_url, tmp_path, concurrency=1, max_retries=0)
        with pytest.raises(UserError, match="10 requests in a row failed"):
            asked.compare(pairs(25))
    with judge_server(honest) as server:  # at another address
        judge(server.base_url, tmp_path).compare(pairs(25))
    assert server.n_requests == 15


def test_failures_between_answers_do_not_end_the_evaluation(tmp_path):
    def script(request: Request) -> None:
        if request.number % 2:
            request.drop()
        else:
            honest(request)

    with judge_server(script) as server:
        asked = judge(server.base_url, tmp_path, concurrency=1, max_retries=0)
        verdicts = asked.compare(pairs(30))
    assert [verdict.is_valid for verdict in verdicts] == [True, False] * 15


def test_an_address_without_a_server_is_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="cannot connect") as raised:
        judge(url, tmp_path).compare(pairs(5))
    assert len(raised.value.lines) == 1


def drip(request: Request) -> None:
    """Send a valid answer, one byte every 20 ms."""
    request.handler.send_response(200)
    request.handler.end_headers()
    for byte in json.dumps({"choices": [{"message": {"content": "A" * 500}}]}).encode():
        request.handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def drip_headers(request: Request) -> None:
    """Send headers without end."""
    request.handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for n in range(100):
        request.handler.wfile.write(f"X-{n}: x\r\n".encode())
        time.sleep(0.02)


@pytest.mark.parametrize("script", [drip, drip_headers])
def test_the_time_of_a_complete_answer_is_bounded(tmp_path, script):
    with judge_server(script) as server:
        asked = judge(server.base_url, tmp_path, timeout_seconds=0.1, max_retries=1)
        started = time.monotonic()
        (verdict,) = asked.compare([pair()])
        assert time.monotonic() - started < 1.0
    assert verdict.reason == "no complete answer in 0.1 seconds (attempt 2)"


def bomb(request: Request) -> None:
    import gzip

    content = gzip.compress(bytes(8 * 2**20))
    request.send(200, content, Content_Encoding="gzip")


def stream(request: Request) -> None:
    request.handler.send_response(200)
    request.handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    request.handler.end_headers()
    for _ in range(100):
        request.handler.wfile.write(b'data: {"choices": [{"delta": {"content": "A"}}]}\n\n')
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (lambda request: request.send(200, bytes(5 * 2**20)), "larger than 4 MiB"),
        (bomb, "larger than 4 MiB"),
        (stream, "streams its answer"),
    ],
    ids=["huge", "gzip bomb", "stream"],
)
def test_answers_that_are_too_large_or_streamed_are_no_verdict(tmp_path, script, reason):
    with judge_server(script) as server:
        (verdict,) = judge(server.base_url, tmp_path).compare([pair()])
    assert not verdict.is_valid and reason in verdict.reason
    assert server.n_requests == 1


def test_a_rate_limit_delays_all_requests(tmp_path):
    def script(request: Request) -> None:
        if request.number == 1:
            request.error(429, Retry_After="0.2")
        else:
            time.sleep(0.05 * (request.number > 0))
            honest(request)

    with judge_server(script) as server:
        judge(server.base_url, tmp_path, concurrency=4).compare(pairs(20))
    limited = server.times[1]
    during = [at for at in server.times[2:] if 0.1 < at - limited < 0.2]
    assert (during, server.n_requests) == ([], 21)


def test_a_long_wait_that_the_server_asks_for_is_capped(tmp_path, monkeypatch):
    monkeypatch.setattr("align.judges.chat_client.LONGEST_WAIT_SECONDS", 0.05)

    def script(request: Request) -> None:
        if request.number == 0:
            request.error(429, Retry_After="86400")
        else:
            honest(request)

    with judge_server(script) as server:
        assert judge(server.base_url, tmp_path).compare([pair()])[0].is_valid
    assert 0.05 <= server.times[1] - server.times[0] < 1.0


def test_an_answer_of_another_model_is_a_warning(tmp_path, caplog):
    def script(request: Request) -> None:
        answer = {"choices": [{"message": {"content": '{"verdict": "A"}'}}], "model": "other-7b"}
        request.send(200, json.dumps(answer))

    with judge_server(script) as server:
        judge(server.base_url, tmp_path).compare(pairs(3))
    assert [record.getMessage() for record in caplog.records] == [
        f"{server.base_url}/chat/completions: the server answers as model `other-7b`, not `judge-1`"
    ]


def test_no_reason_has_text_that_a_file_cannot_hold(tmp_path):
    def script(request: Request) -> None:
        if request.number == 0:
            request.prefer("A", "half a pair: \ud800")
        else:
            request.answer("no verdict \udfff")

    with judge_server(script) as server:
        verdicts = judge(server.base_url, tmp_path, concurrency=1).compare(pairs(2))
    assert verdicts[0].reason == "half a pair: ?"
    for verdict in verdicts:
        verdict.reason.encode()


@pytest.mark.parametrize("tokens", [-1, 0, 1.5, "10", None, True, 10**400, [1]])
def test_tokens_that_are_no_count_are_not_counted(tmp_path, tokens):
    def script(request: Request) -> None:
        usage = {"prompt_tokens": tokens, "completion_tokens": 7}
        answer = {"choices": [{"message": {"content": "A"}}], "usage": usage}
        request.send(200, json.dumps(answer))

    with judge_server(script) as server:
        asked = judge(server.base_url, tmp_path, input_price=1.0, output_price=1.0)
        assert asked.compare([pair()])[0].is_valid
    assert asked.usage.input_tokens <= 1 and asked.usage.output_tokens == 7
    assert asked.usage.cost == pytest.approx(7e-6, abs=1e-6)


def test_proxy_settings_that_cannot_be_used_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://proxy")
    with pytest.raises(UserError, match="environment variables") as raised:
        judge("http://127.0.0.1:1/v1", tmp_path).compare([pair()])
    assert len(raised.value.lines) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("inf", math.inf),
        ("nan", None),
        ("", None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert retry_after_seconds(header) == seconds


def test_retry_after_counts_from_now():
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    seconds = retry_after_seconds(in_a_minute)
    assert seconds is not None and 57 < seconds <= 60


# The API key


ECHOES = {
    "error": lambda request: request.error(400, f"Incorrect API key {KEY}"),
    "part": lambda request: request.error(401, f"Incorrect API key {KEY[:-9]}…"),
    "page": lambda request: request.send(403, f"invalid token {KEY} at gate"),
    "redirect": lambda request: request.send(302, "", Location=f"http://x/{KEY}?token={KEY}"),
    "body": lambda request: request.send(200, f"your key is {KEY}"),
    "text": lambda request: request.answer(f"no verdict for {KEY}"),
    "verdict": lambda request: request.prefer(KEY),
    "reason": lambda request: request.prefer("A", f"You are {KEY[2:]}."),
    "refusal": lambda request: request.answer("", refusal=f"not with {KEY}"),
    "model": lambda request: request.send(
        200, json.dumps({"model": KEY, "choices": [{"message": {"content": "A"}}]})
    ),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES.keys())
def test_the_key_is_in_requests_and_nowhere_else(tmp_path, monkeypatch, caplog, echo):
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    shown = []
    with judge_server(echo) as server:
        asked = judge(server.base_url, tmp_path, key_variable="JUDGE_KEY", max_retries=0)
        try:
            shown += map(str, asked.compare(pairs(2)))
        except UserError as error:
            shown += error.lines
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    shown += [caplog.text, repr(asked), str(vars(asked).get("_server"))]
    shown += [path.read_text() for path in tmp_path.iterdir()]
    pieces = [KEY[i : i + 8] for i in range(len(KEY) - 7)]
    assert [piece for piece in pieces for text in shown if piece in text] == []
    assert any("***" in text for text in shown) or echo is ECHOES["redirect"]


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [
        (KEY, f"a {KEY} b {KEY}", "a *** b ***"),
        (KEY, f"a {KEY[3:15]}… b", "a ***… b"),
        (KEY, f"a {KEY[:7]} b", f"a {KEY[:7]} b"),
        ("short", "a short b", "a *** b"),
        (None, "a b", "a b"),
    ],
)
def test_a_key_is_removed_as_a_whole_and_in_long_parts(key, text, shown):
    assert Redactor(key).remove(text) == shown


@pytest.mark.parametrize("value", [None, "", "  ", "a b", "schlüssel", "a\nb"])
def test_a_variable_without_a_key_is_an_error_before_any_request(tmp_path, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match="environment variable JUDGE_KEY") as raised:
        judge("http://127.0.0.1:1", tmp_path, key_variable="JUDGE_KEY")
    assert value is None or not value.strip() or value not in str(raised.value)


# The cache


def test_no_question_is_sent_twice(tmp_path):
    with judge_server(honest) as server:
        judge(server.base_url, tmp_path).compare([pair(0), pair(1), pair(0)])
        assert server.n_requests == 2
        again = judge(server.base_url, tmp_path)
        assert [v.preference for v in again.compare([pair(1), pair(2)])] == [1.0, 1.0]
        assert server.n_requests == 3
    assert (again.usage.requests, again.usage.cached) == (1, 1)
    assert (again.usage.input_tokens, again.usage.output_tokens) == (10, 2)
    assert (again.usage.cached_input_tokens, again.usage.cached_output_tokens) == (10, 2)
    assert again.usage.cost is None


def test_verdicts_from_the_cache_cost_nothing(tmp_path):
    prices = {"input_price": 3.0, "output_price": 50.0}
    with judge_server(honest) as server:
        judge(server.base_url, tmp_path, **prices).compare(pairs(3))
        again = judge(server.base_url, tmp_path, **prices)
        again.compare(pairs(4))
        again.compare(pairs(4))
    assert again.usage.cached == 3
    assert again.usage.cost == pytest.approx(130e-6), "one verdict of 10 and 2 tokens"


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({"model": "judge-2"}, 1),
        ({"temperature": 0.5}, 1),
        ({"max_tokens": 100}, 1),
        ({"structured_output": "none"}, 1),
        ({"extra_body": {"seed": 1}}, 1),
        ({"n_verdicts": 2}, 1),
        ({"concurrency": 2, "timeout_seconds": 9.0, "max_retries": 7, "input_price": 1.0,
          "output_price": 1.0}, 0),
    ],
)  # fmt: skip
def test_what_a_verdict_depends_on_is_asked_again(tmp_path, keys, sent):
    with judge_server(honest) as server:
        judge(server.base_url, tmp_path).compare([pair()])
        judge(server.base_url, tmp_path, **keys).compare([pair()])
    assert server.n_requests == 1 + sent


def test_the_orders_of_a_pair_are_two_questions(tmp_path):
    with judge_server(lambda request: request.prefer("A")) as server:
        both = [pair(), pair(first="bad", second="good")]
        verdicts = judge(server.base_url, tmp_path).compare(both)
    assert [verdict.preference for verdict in verdicts] == [1.0, 1.0]
    assert server.n_requests == 2


# Before a run


def test_the_check_lists_models_and_sends_no_completion(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judge_server(honest) as server:
        server.models = ["judge-1"]
        assert list(check_judge(config(server.base_url, key_variable="JUDGE_KEY"))) == []
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        server.models = ["judge-10"]
        (warning,) = check_judge(config(server.base_url))
        assert "lists no model `judge-1`; did you mean `judge-10`?" in warning
        server.models = None
        for server.list_status in (404, 403):  # 403: a key that must not list models
            assert list(check_judge(config(server.base_url))) == []
        server.list_status = 401
        with pytest.raises(UserError, match="/models: HTTP 401"):
            list(check_judge(config(server.base_url)))
    assert server.n_requests == 0


def test_the_check_reports_all_errors_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    template = tmp_path / "judge.jinja"
    template.write_text("{{ first }} or {{ secund }}?")
    keys = {"key_variable": "JUDGE_KEY", "prompt": str(template), "rubric": str(tmp_path / "x")}
    with pytest.raises(UserError) as raised:
        list(check_judge(config("http://127.0.0.1:1/v1", **keys)))
    assert [line.partition(":")[0] for line in raised.value.lines] == [
        "rubric", "api.prompt", "api.prompt", "api.prompt", "api.key_variable",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no server answers"):
        list(check_judge(config("http://127.0.0.1:1/v1")))


def test_requests_are_counted_before_a_run(tmp_path):
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text("criteria: [{name: a, question: a}, {name: b, question: b}]")
    assert count_requests(config("http://x"), 100) == 200
    # 100 pairs * 2 orders * 2 criteria * 3 verdicts
    assert count_requests(config("http://x", rubric=str(rubric), n_verdicts=3), 100) == 1200
