"""A real server, ``transformers serve``: an exported adapter, and a stage with full weights.

The exported adapter is also the judge behind an API.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models
from typer.testing import CliRunner

import align
from align.cli.main import app
from align.config.judges import ServerJudge
from align.errors import UserError
from align.judges.base import Pair
from align.judges.server import LanguageModelJudge
from align.judges.server_check import check_judge
from align.judges.verdicts import NO_TEXT

SERVING = ("fastapi", "uvicorn", "openai")
# imports nothing here: they take seconds, also where slow tests are deselected
installed = all(importlib.util.find_spec(name) is not None for name in SERVING)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed, reason="pip install transformers[serving]"),
]

SECONDS_TO_START = 120


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.world(tmp_path_factory.getbasetemp()).lora


@pytest.fixture(scope="module")
def model(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter merged into its base; the server reads no adapters."""
    folder = tmp_path_factory.mktemp("export") / "merged"
    exported = CliRunner().invoke(app, ["export", str(adapter), str(folder)])
    assert exported.exit_code == 0
    return folder


@pytest.fixture(scope="module")
def base_url(model: Path) -> Iterator[str]:
    with served(model) as address:
        yield address


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of a server of the model, which ends with this block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", model, "--host", "127.0.0.1", "--port", port]
    command += ["--device", "cpu", "--dtype", "float32"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(10 * SECONDS_TO_START):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    assert process.poll() is None
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def config(base_url: str, model: Path, **keys: Any) -> ServerJudge:
    api = {"base_url": base_url, "model": str(model), "max_tokens": 8, **keys}
    return ServerJudge.model_validate({"api": api})


def pairs(count: int) -> list[Pair]:
    turns = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    return [Pair([{"role": "user", "content": f"Is {n} even?"}], *turns, {}) for n in range(count)]


def test_a_tiny_model_is_asked_and_gives_no_verdict(tmp_path, base_url, model):
    settings = config(base_url, model, structured_output="none")
    list(check_judge(settings))
    judge = LanguageModelJudge(settings, cache=tmp_path / "verdicts.jsonl")
    verdicts = judge.compare(pairs(4))
    assert [verdict.is_valid for verdict in verdicts] == [False] * 4
    assert all(verdict.reason for verdict in verdicts)
    assert judge.usage.requests == 4
    assert judge.usage.input_tokens > 400 and 0 < judge.usage.output_tokens <= 32
    again = LanguageModelJudge(settings, cache=tmp_path / "verdicts.jsonl")
    assert not any(verdict.is_valid for verdict in again.compare(pairs(4)))
    # An empty answer is requested again.
    assert again.usage.requests == sum(verdict.reason == NO_TEXT for verdict in verdicts)


def test_a_model_that_the_server_does_not_have_is_one_line(tmp_path, base_url):
    judge = LanguageModelJudge(config(base_url, Path("no/judge")), cache=tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"HTTP 400.*no/judge.*correct .* `model`") as raised:
        judge.compare(pairs(2))
    assert len(raised.value.lines) == 1 and judge.usage.requests == 2


def test_an_exported_adapter_is_served_and_answers_as_align_does(base_url, adapter, model):
    assert_same_answer(base_url, model, adapter)


def test_the_folder_of_a_stage_with_full_weights_is_served_as_it_is(tmp_path_factory):
    folder = tiny_models.world(tmp_path_factory.getbasetemp()).sft
    before = sorted(path.name for path in folder.iterdir())
    with served(folder) as address:
        assert_same_answer(address, folder, folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def assert_same_answer(base_url: str, model: Path, policy: Path) -> None:
    """The server's greedy answer of a model is the one of the policy in Align."""
    prompt = "Sort: d c b a"
    expected = align.load_policy(policy).generate([prompt], temperature=0.0, max_new_tokens=8)
    messages = [{"role": "user", "content": prompt}]
    body = {"model": str(model), "messages": messages, "max_tokens": 8, "temperature": 0.0}
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["content"].strip() == expected[0][0].strip() != ""
