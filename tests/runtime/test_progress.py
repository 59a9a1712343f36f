"""Tests of metrics.jsonl and of the display."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from align.runtime.progress import Display, LiveDisplay, Logger, NullDisplay, truncate_jsonl


def plain_display() -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, width=80)), out


def test_truncate_jsonl_drops_later_and_incomplete_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "a": 1}\n{"step": 3, "a": 2}\n{"step": 2, "a": 3}\n{"step": 2, "a"'
    )
    truncate_jsonl(file, 2)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"step": 1, "a": 1}, {"step": 2, "a": 3}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    truncate_jsonl(file, -1)
    assert file.read_text() == ""


def test_truncate_jsonl_creates_no_file(tmp_path):
    truncate_jsonl(tmp_path / "samples.jsonl", 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damaged", [b"[1]", b"null", b"\xff\xfe", b'{"step": "1"}', b'{"loss": 1}', b"[" * 100_000, b""]
)
def test_damaged_lines_are_dropped_with_a_warning(tmp_path, caplog, damaged):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n')
    truncate_jsonl(file, 2)
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert caplog.messages == [f"{file}: 1 damaged lines removed"]


def test_line_separators_of_unicode_within_a_sample_are_kept(tmp_path):
    file = tmp_path / "samples.jsonl"
    line = json.dumps({"step": 1, "completion": "a\u2028b\x85c"}, ensure_ascii=False) + "\n"
    file.write_text(line, encoding="utf-8")
    truncate_jsonl(file, 1)
    assert file.read_text(encoding="utf-8") == line


def test_a_rewound_logger_appends_after_the_step(tmp_path):
    logger = Logger("dpo", tmp_path, plain_display()[0], main=True)
    for step in (1, 2, 3):
        logger.log(step, {"loss": 1 / step})
    logger.rewind(1)
    logger.log(2, {"loss": 0.25})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.25}]


def test_only_the_main_process_writes_metrics(tmp_path):
    display, out = plain_display()
    logger = Logger("dpo", tmp_path, display, main=False)
    logger.log(1, {"loss": 0.5})
    logger.step(1, 2, {"loss": 0.5})
    logger.rewind(0)
    assert (list(tmp_path.iterdir()), out.getvalue()) == ([], "")


def test_plain_lines_come_every_few_seconds_and_at_the_end(tmp_path):
    display, out = plain_display()
    display.start("dpo", tmp_path, "running")
    logger = Logger("dpo", tmp_path, display, main=True)
    for step in range(1, 101):
        logger.step(step, 100, {"loss": 0.5})
    lines = out.getvalue().splitlines()
    assert lines[0] == f"dpo: running → {tmp_path}"
    assert [line.split("  ")[0] for line in lines[1:]] == ["dpo: step 1/100", "dpo: step 100/100"]
    assert lines[-1].endswith("loss 0.5")


@pytest.mark.parametrize("kind", [Display, LiveDisplay])
def test_a_display_shows_warnings_of_the_align_logger(kind, tmp_path):
    out = io.StringIO()
    logger = logging.getLogger("align.models.prefix_sharing")
    with kind(Console(file=out, width=80)):
        logger.warning("%d rows dropped", 3)
        logger.info("not shown at the default level")
    assert "warning: 3 rows dropped" in out.getvalue().splitlines()
    assert "not shown" not in out.getvalue()
    before = out.getvalue()
    logger.warning("after the display has closed")
    assert out.getvalue() == before


def test_other_ranks_show_nothing(capfd):
    with NullDisplay() as display:
        logging.getLogger("align").warning("every rank logs this")
        display.info("and this")
    assert capfd.readouterr() == ("", "")


def test_plain_lines_estimate_the_time_that_is_left(tmp_path, monkeypatch):
    display, out = plain_display()
    clock = iter([0.0, 60.0, 80.0, 100.0, 400.0, 410.0, 500.0])
    monkeypatch.setattr("align.runtime.progress.time.monotonic", lambda: next(clock))
    display.start("dpo", tmp_path, "resuming")  # at 0 s
    display.step(
        "dpo", 10, 20, {}
    )  # at 60 s: the pace is not known; 10 steps are of an earlier run
    display.step("dpo", 12, 20, {})  # 2 steps in 20 s: 80 s for 8 steps
    display.step("dpo", 14, 20, {})  # 4 steps in 40 s: 60 s for 6 steps
    display.step("dpo", 15, 20, {})  # 5 steps in 340 s: 340 s for 5 steps
    display.step("dpo", 1, 3, {}, unit="pairs")  # another unit has another pace
    display.step("dpo", 3, 3, {}, unit="pairs")
    assert [line.partition(": ")[2] for line in out.getvalue().splitlines()[1:]] == [
        "step 10/20  60 s",
        "step 12/20  80 s, about 80 s left",
        "step 14/20  100 s, about 60 s left",
        "step 15/20  400 s, about 6 min left",
        "pairs 1/3  410 s",
        "pairs 3/3  500 s",
    ]
