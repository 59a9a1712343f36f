"""A judge behind an API, and servers that answer at random."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.judge_server import Request, completion, judge_server

from align.config.judges import ServerJudge
from align.judges.base import Pair
from align.judges.server import LanguageModelJudge

KEYS = ["choices", "message", "content", "verdict", "usage", "error", "model", "finish_reason"]
STATUSES = [200, 201, 203, 206, 299, 304, 408, 425, 429, 500, 501, 502, 503, 504, 511, 599]
HEADERS: dict[str, list[str]] = {
    "Retry_After": ["0", "x", "-1", "1e9", "nan", "", "Wed, 21 Oct 2015 07:28:00 GMT"],
    "Content_Type": ["application/json; charset=utf-16", "text/html", "", "\x7f"],
    "Content_Encoding": ["identity", "gzip", "deflate", "br", "gzip, gzip", "x"],
}
HEADS = [
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n{",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.1 999 X\r\n\r\n",
    b"HTTP/0.9 abc\r\n\r\n",
]


def junk(rng: random.Random) -> Any:
    """Any JSON."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice([None, True, 0, -1, 1e308, "", "A", "\ud800", [], {}])
    if kind < 0.6:
        return [junk(rng) for _ in range(rng.randint(0, 3))]
    return {rng.choice(KEYS): junk(rng) for _ in range(rng.randint(0, 4))}


def damaged(value: Any, rng: random.Random) -> Any:
    """An answer with some of its values replaced."""
    if rng.random() < 0.15:
        return junk(rng)
    if isinstance(value, dict):
        return {key: damaged(each, rng) for key, each in value.items()}
    return [damaged(each, rng) for each in value] if isinstance(value, list) else value


def answer(request: Request, rng: random.Random) -> None:
    """Answer as a random server."""
    verdict = json.dumps({"reason": "r", "verdict": rng.choice(["A", "B", "tie"])})
    match rng.randrange(7) if request.number else None:  # an answer shows that the settings work
        case 0:
            request.send(200, json.dumps(damaged(completion(verdict), rng)))
        case 1:
            headers = {name: rng.choice(values) for name, values in HEADERS.items()}
            request.send(rng.choice(STATUSES), rng.randbytes(rng.randint(0, 80)), **headers)
        case 2:
            request.send(200, json.dumps(junk(rng)).encode(rng.choice(["utf-8", "utf-16"])))
        case 3:
            request.handler.wfile.write(rng.choice([*HEADS, rng.randbytes(99)]))
            request.drop()
        case _:
            request.answer(verdict)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_server_answers_is_a_verdict_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr("align.judges.chat_client.FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr("align.judges.chat_client.LONGEST_WAIT_SECONDS", 0.01)
    rng = random.Random(seed)
    turns = [[{"role": "assistant", "content": text}] for text in ("good", "\ud800bad")]
    pairs = [Pair([{"role": "user", "content": f"{n}"}], *turns, {}) for n in range(20)]
    with judge_server(lambda request: answer(request, rng)) as server:
        api = {"base_url": server.base_url, "model": "m", "timeout_seconds": 0.1, "max_retries": 1}
        config = ServerJudge.model_validate({"api": api})
        verdicts = LanguageModelJudge(config, cache=tmp_path / "x.jsonl").compare(pairs)
    assert len(verdicts) == 20 and any(verdict.is_valid for verdict in verdicts)
    for verdict in verdicts:
        verdict.reason.encode()
        assert verdict.preference in (0.0, 0.5, 1.0) or math.isnan(verdict.preference)
        assert verdict.is_valid or (verdict.reason and "\n" not in verdict.reason)
