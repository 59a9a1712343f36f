"""Verdicts of a judge on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.judge_server import Request, judge_server

from align.errors import ArtifactError
from align.judges.server_cache import StoredVerdict, VerdictCache, question_key

VERDICT = StoredVerdict(1.0, "Schöner", 10, 2)


def filled(path: Path, count: int = 3) -> VerdictCache:
    cache = VerdictCache(path)
    for n in range(count):
        cache.write(f"key {n}", StoredVerdict(n / 10, f"reason {n}", n, 1))
    return cache


def test_what_is_written_is_read_by_another_process(tmp_path):
    cache = VerdictCache(tmp_path / "runs" / "verdicts.jsonl")
    assert cache.read() == {}
    cache.write("a", VERDICT)
    cache.write("b", StoredVerdict(None, "unclear\u2028\n", 0, 0))
    other = VerdictCache(cache.path)
    assert other.read() == {"a": VERDICT, "b": StoredVerdict(None, "unclear\u2028\n", 0, 0)}
    cache.write("c", VERDICT)
    assert other.read().keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda line: line.replace(b"0.1", b"0.9"), id="another preference"),
        pytest.param(lambda line: line.replace(b"key 1", b"key 7"), id="another question"),
        pytest.param(lambda line: line[: len(line) // 2] + b"\n", id="cut off"),
        pytest.param(lambda line: b"\0" * len(line) + b"\n", id="zeros"),
        pytest.param(lambda line: b"\xff\xfe\n", id="not text"),
        pytest.param(lambda line: b"[1]\n", id="a list"),
        pytest.param(lambda line: b"null\n", id="null"),
        pytest.param(lambda line: b"[" * 100_000 + b"\n", id="nested"),
        pytest.param(lambda line: line.replace(b'"reason"', b'"cause"'), id="another field"),
    ],
)
def test_a_damaged_line_is_not_believed(tmp_path, caplog, damage):
    path = filled(tmp_path / "verdicts.jsonl").path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage(lines[1]) + lines[2])
    assert VerdictCache(path).read().keys() == {"key 0", "key 2"}
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 1 damaged line is skipped; its verdict is requested again"
    ]


def test_the_line_of_a_killed_process_spoils_no_other(tmp_path):
    path = filled(tmp_path / "verdicts.jsonl").path
    path.write_bytes(path.read_bytes()[:-9])
    cache = VerdictCache(path)
    assert cache.read().keys() == {"key 0", "key 1"}
    cache.write("key 2", VERDICT)
    assert VerdictCache(path).read()["key 2"] == VERDICT
    assert cache.read().keys() == {"key 0", "key 1", "key 2"}


def test_several_writers_share_a_file(tmp_path):
    path = tmp_path / "verdicts.jsonl"

    def write(writer: int) -> None:
        cache = VerdictCache(path)  # its own file descriptions, as in another process
        for n in range(50):
            cache.write(f"{writer} {n}", StoredVerdict(1.0, "x" * 5000, writer, n))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(VerdictCache(path).read()) == 200
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link", "parent is a file"])
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, kind):
    path = tmp_path / "verdicts.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to(tmp_path / "none" / "here")
    else:
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "verdicts.jsonl"
    cache = VerdictCache(path)
    with pytest.raises(ArtifactError, match="cannot be used"):
        cache.read()
        cache.write("a", VERDICT)


def test_the_key_depends_on_the_content_and_not_on_its_order():
    assert question_key({"a": 1, "b": 2}) == question_key({"b": 2, "a": 1})
    assert question_key({"a": 1}) != question_key({"a": 2})


EVALUATION = """
import sys
from pathlib import Path
from align.config.judges import ServerJudge
from align.judges.base import Pair
from align.judges.server import LanguageModelJudge

config = ServerJudge.model_validate({"api": {"base_url": sys.argv[1], "model": "m"}})
turns = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
pairs = [Pair([{"role": "user", "content": f"{n}"}], *turns, {}) for n in range(60)]
judge = LanguageModelJudge(config, cache=Path(sys.argv[2]))
print([verdict.preference for verdict in judge.compare(pairs)] == [1.0] * 60)
"""


@pytest.mark.slow
def test_a_killed_evaluation_sends_only_what_was_not_answered(tmp_path):
    arrived = threading.Event()

    def script(request: Request) -> None:
        if request.number == 30:
            arrived.set()
            threading.Event().wait(0.2)
        request.prefer("A")

    with judge_server(script) as server:
        command = [sys.executable, "-c", EVALUATION, server.base_url, tmp_path / "verdicts.jsonl"]
        with subprocess.Popen(command) as process:
            assert arrived.wait(60)
            os.kill(process.pid, signal.SIGKILL)
        stored = len(VerdictCache(tmp_path / "verdicts.jsonl").read())
        n_sent = server.n_requests
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout.strip(), server.n_requests) == ("True", n_sent + 60 - stored)
    assert 30 - 8 <= stored <= n_sent


@pytest.mark.slow
def test_two_evaluations_at_once_share_the_cache(tmp_path):
    with judge_server(lambda request: request.prefer("A")) as server:
        command = [sys.executable, "-c", EVALUATION, server.base_url, tmp_path / "verdicts.jsonl"]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate(timeout=60)[0].strip() for process in both] == ["True"] * 2
    assert len(VerdictCache(tmp_path / "verdicts.jsonl").read()) == 60
