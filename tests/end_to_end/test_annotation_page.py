"""`align annotate` in a browser: keys, a kill, two people at once, hostile text, a log-in."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import chromium
from helpers.chromium import Tab

import align
from align.data.annotation_files import read_annotations

# imports nothing here: Gradio takes seconds, also where slow tests are deselected
installed = importlib.util.find_spec("gradio") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed, reason="the extra [annotate] is not installed"),
]

NUMBER = "document.querySelector('#number textarea, #number input').value"
SIDES = "[...document.querySelectorAll('.side .text')].map(e => e.innerText)"
NAME = "document.querySelector('#name input, #name textarea')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def page(folder: Path, *options: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of `align annotate pairs.jsonl` in a folder, and its process."""
    command = [sys.executable, "-m", "align.cli.main", "annotate", "pairs.jsonl"]
    command += ["--port", str(free_port()), *options]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(align.__file__).parents[1]), **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = next((line for line in process.stdout if line.startswith("http")), None)
        assert address, (folder / "log").read_text()
        yield address.split()[0], process
    finally:
        process.kill()
        process.communicate()
        log.close()


def write_pairs(folder: Path, pairs: list[tuple[str, str, str]]) -> None:
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def begin(tab: Tab, address: str, name: str) -> None:
    tab.open(address)
    tab.wait(f"{NAME} !== null")
    end = time.monotonic() + 60
    while not tab.evaluate("document.querySelectorAll('.side').length"):
        assert time.monotonic() < end
        # The field is there before the page listens to it.
        tab.evaluate(f"{NAME}.focus(); {NAME}.select()")
        tab.write(name)
        tab.press("Enter")
        time.sleep(1)
    wait_for_pair(tab)


def wait_for_pair(tab: Tab) -> None:
    tab.wait("document.querySelectorAll('.side').length == 2")
    tab.wait("document.querySelector('button#left') !== null")  # gradio adds them after the pair
    tab.wait("document.activeElement === document.body")  # keys are decisions again


def press(tab: Tab, key: str) -> None:
    """Press the key of a decision, and wait for the next pair."""
    before = tab.evaluate(NUMBER)
    tab.press(key)
    tab.wait(f"{NUMBER} != {json.dumps(before)}")


def decisions(folder: Path) -> list[dict]:
    text = (folder / "pairs-annotations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def prefer_good(tab: Tab) -> None:
    left, _ = tab.evaluate(SIDES)
    press(tab, "1" if left.startswith("good") else "2")


def test_twenty_decisions_by_keyboard_and_a_kill_become_pairs_and_win_rates(
    browser: chromium.Browser, tmp_path: Path
):
    write_pairs(tmp_path, [(f"Question {i}?", f"good {i}", f"bad {i}") for i in range(20)])
    tab = browser.new_tab()
    with page(tmp_path, "--check-every", "0") as (address, process):
        begin(tab, address, "Ana")
        tab.press("c")
        tab.write("hard to say 1 2 b")  # keys within a comment decide nothing
        tab.press("Escape")
        press(tab, "0")
        for _ in range(8):
            prefer_good(tab)
        last = tab.evaluate(SIDES)
        os.kill(process.pid, signal.SIGKILL)
    assert len(decisions(tmp_path)) == 9
    assert (decisions(tmp_path)[0]["decision"], decisions(tmp_path)[0]["comment"]) == (
        "tie", "hard to say 1 2 b",
    )  # fmt: skip
    with page(tmp_path, "--check-every", "0") as (address, process):
        begin(tab, address, "Ana")
        assert tab.evaluate(SIDES) == last
        for _ in range(9):
            prefer_good(tab)
        press(tab, "b")
        tab.press("s")
        tab.wait("document.querySelector('#done') !== null")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    # The page loses its connection to a server that ends, and nothing else goes wrong.
    assert not [message for message in tab.messages if "net::ERR_" not in message]
    hosts = {url.split("/")[2].partition(":")[0] for url in tab.requests if url.startswith("http")}
    assert hosts == {"127.0.0.1"}
    rows = decisions(tmp_path)
    assert [row["decision"] for row in rows].count("first") == 17
    assert [row["decision"] for row in rows[-2:]] == ["both_bad", "skip"]
    assert len(read_annotations(tmp_path / "pairs-annotations.jsonl")) == 20
    for name in ("good", "bad"):
        answers = [{"prompt": f"Question {i}?", "completion": f"{name} {i}"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    annotations = str(tmp_path / "pairs-annotations.jsonl")
    recipe = {"stages": {
        "pairs": {"stage": "prepare", "source": annotations, "reader": "annotations",
                  "test_fraction": 0},
        "prepare": {"source": str(tmp_path / "pairs.jsonl"), "test_fraction": 0.9},
        "evaluate": {"policies": [str(tmp_path / "good.jsonl")],
                     "baseline": str(tmp_path / "bad.jsonl"),
                     "judge": {"annotations": annotations}},
    }}  # fmt: skip
    results = align.run(recipe, tmp_path / "runs")
    assert results["pairs"].metrics["pairs"]["train"] == 17
    (comparison,) = results["evaluate"].metrics.comparisons
    assert comparison.win_rate > 0.85


def test_a_key_before_its_button_is_there_decides(browser: chromium.Browser, tmp_path: Path):
    # Under load, gradio shows the pair some 0.1 s before the buttons.
    write_pairs(tmp_path, [("a?", "b", "c"), ("d?", "e", "f")])
    tab = browser.new_tab()
    with page(tmp_path, "--check-every", "0") as (address, _):
        tab.open(address)
        tab.wait(f"{NAME} !== null")
        tab.press("2")  # before a pair is there, a key decides nothing
        begin(tab, address, "Ana")
        tab.evaluate("place = document.querySelector('#choices'); around = place.parentNode;"
                     "around.removeChild(place); 0")  # fmt: skip
        tab.press("1")
        assert not (tmp_path / "pairs-annotations.jsonl").read_text()
        tab.evaluate("around.appendChild(place); 0")
        tab.wait(f"{NUMBER} == '1'")
        tab.press("c")
        tab.write("fast")
        tab.press("Escape")
        tab.press("0")
        tab.wait("document.querySelector('#done') !== null")
    assert [row["decision"] for row in decisions(tmp_path)] in (["first", "tie"], ["second", "tie"])
    assert [row["comment"] for row in decisions(tmp_path)] == ["", "fast"]


HOSTILE = [
    '<img src=x onerror="document.title=1"></div><script>document.title=1</script>',
    "{{7*7}} ${document.title=1} `x` \\n {value}",
    "\x1b]0;title\x07\x1b[31mred ‮reversed",
    "long " * 20_000,
]


def test_two_people_at_once_and_text_that_would_be_markup(
    browser: chromium.Browser, tmp_path: Path
):
    write_pairs(tmp_path, [(f"{i}? {text[:200]}", text, f"plain {i}")
                           for i, text in enumerate(HOSTILE)])  # fmt: skip
    with page(tmp_path, "--check-every", "0", "--overlap", "1") as (address, _):
        ana, bob = browser.new_tab(), browser.new_tab()
        begin(ana, address, "Ana")
        begin(bob, address, "Bob <b>")
        shown = set()
        for _ in HOSTILE:
            for tab in (ana, bob):
                sides = tab.evaluate(SIDES)
                assert [side for side in sides if side.startswith("plain ")]
                shown |= {side.strip() for side in sides}
                number = tab.evaluate(NUMBER)
                tab.press("1")
                tab.wait(f"document.querySelector('#done') !== null || {NUMBER} != '{number}'")
        assert HOSTILE[0] in shown
        assert HOSTILE[1] in shown
        assert HOSTILE[3].strip() in shown
        assert not any("\x1b" in text for text in shown)
        for tab in (ana, bob):
            assert tab.evaluate("document.title") == "Compare completions"
            assert not tab.messages
        status = bob.evaluate("document.querySelector('#status').innerText")
        assert "4 of 4 pairs finished" in status
        assert "over 4 shared pairs" in status
    rows = decisions(tmp_path)
    assert sorted(row["annotator"] for row in rows) == ["Ana"] * 4 + ["Bob <b>"] * 4
    assert {row["first"] for row in rows} == set(HOSTILE)


def test_a_page_with_a_password_asks_for_name_and_password(
    browser: chromium.Browser, tmp_path: Path
):
    write_pairs(tmp_path, [("a?", "b", "c"), ("d?", "e", "f")])
    with page(tmp_path, ALIGN_ANNOTATE_PASSWORD="correct horse") as (address, _):
        tab = browser.new_tab()
        tab.open(address)
        tab.wait("document.querySelectorAll('input').length == 2")
        fields = "document.querySelectorAll('input')"

        def log_in(password: str, result: str) -> None:
            """Enter the password until the page, which may not listen yet, has a result."""
            end = time.monotonic() + chromium.SECONDS
            while not tab.evaluate(result):
                assert time.monotonic() < end, f"never true: {result}"
                for place, text in enumerate(("Ana", password)):
                    tab.evaluate(f"{fields}[{place}]?.focus(); {fields}[{place}]?.select()")
                    tab.write(text)
                tab.press("Enter")
                time.sleep(1)

        log_in("wrong horse", "document.body.innerText.includes('ncorrect')")
        assert tab.evaluate(f"{fields}.length") == 2
        log_in("correct horse", f"{fields}.length != 2")
        wait_for_pair(tab)
        press(tab, "1")
    (row,) = decisions(tmp_path)
    assert row["annotator"] == "Ana"
