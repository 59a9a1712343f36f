"""Sessions of `align annotate`: which pair is next, what is written, what is read again."""

from __future__ import annotations

import json
import math

import pytest

from align.cli.annotate import find_files
from align.data.annotation_files import read_annotations
from align.errors import UserError
from align.evaluation.annotation import server
from align.evaluation.annotation.agreement import agreement_line, annotator_lines
from align.evaluation.annotation.decision_file import DecisionFile
from align.evaluation.annotation.pairs import Pair, draw, read_pairs
from align.evaluation.annotation.session import HELD_SECONDS, Session, check_name

PAIRS = [Pair([{"role": "user", "content": f"{i}?"}], f"good {i}", f"bad {i}") for i in range(20)]


@pytest.fixture
def file(tmp_path):
    file = DecisionFile(tmp_path / "decisions.jsonl")
    yield file
    file.close()


def choose(task, better="first"):
    """The choice on the page that prefers a completion."""
    return "left" if task.first_is_left == (better == "first") else "right"


def decide_all(session, annotator, better="first"):
    tasks = []
    while (task := session.next_task(annotator)) is not None:
        tasks.append(task)
        assert session.decide(annotator, task.number, choose(task, better))
    return tasks


def test_the_decision_is_about_the_completion_and_not_about_the_side(file):
    session = Session(PAIRS, file, check_every=0)
    tasks = decide_all(session, "ana")
    assert {task.first_is_left for task in tasks} == {True, False}
    assert {row["decision"] for row in file.rows} == {"first"}
    assert all(row["left"] == ("first" if t.first_is_left else "second")
               for row, t in zip(file.rows, tasks, strict=True))  # fmt: skip
    shown = [task.sides[0] if task.first_is_left else task.sides[1] for task in tasks]
    assert shown == [row["first"] for row in file.rows]


def test_a_pair_is_decided_by_one_annotator_and_a_shared_pair_by_all(file):
    session = Session(PAIRS, file, overlap=0.25, check_every=0)
    people = {name: {t.pair.key for t in decide_all(session, name)} for name in ("ana", "bob")}
    assert len(people["ana"] & people["bob"]) == 5  # 0.25 * 20
    assert people["ana"] | people["bob"] == {pair.key for pair in PAIRS}
    assert session.progress("ana")[1:] == (20, 20)


def test_a_pair_on_another_page_is_not_shown_until_it_was_left_there(file):
    now = [0.0]
    session = Session(PAIRS[:1], file, overlap=0, check_every=0, clock=lambda: now[0])
    assert session.next_task("ana") is not None
    assert session.next_task("bob") is None
    now[0] = HELD_SECONDS + 1.0
    assert session.next_task("bob") is not None


def test_a_decision_counts_once_and_only_for_the_pair_that_is_shown(file):
    session = Session(PAIRS, file)
    task = session.next_task("ana")
    assert session.next_task("ana") == task  # a second window
    assert session.decide("ana", task.number, "tie", " why ")
    assert not session.decide("ana", task.number, "left")
    assert not session.decide("bob", 0, "left")
    assert [(row["decision"], row["comment"]) for row in file.rows] == [("tie", "why")]


def test_a_skipped_pair_is_open_for_others(file):
    session = Session(PAIRS[:2], file, overlap=0, check_every=0)
    for _ in range(2):
        session.decide("ana", session.next_task("ana").number, "skip")
    assert session.next_task("ana") is None
    assert session.progress("ana").finished == 0
    assert len(decide_all(session, "bob")) == 2


def test_one_decision_in_each_block_is_an_attention_check_and_no_annotation(file, tmp_path):
    session = Session(PAIRS, file, check_every=5)
    tasks = decide_all(session, "ana")
    blocks = [tasks[i : i + 5] for i in range(0, len(tasks) - 4, 5)]
    assert all(sum(task.is_check for task in block) == 1 for block in blocks)
    for task in (task for task in tasks if task.is_check):
        own, other = task.pair.first, task.pair.second
        number = task.pair.prompt[0]["content"][:-1]
        assert own == f"good {number}" and other != f"bad {number}"
    person = session.annotators["ana"]
    assert person.n_passed == person.n_checks >= 4
    assert len(read_annotations(file.path)) == len(PAIRS)
    decide_all(session, "bob", "second")
    assert session.annotators["bob"].n_passed == 0
    assert f"attention checks {person.n_checks} of {person.n_checks}" in annotator_lines(
        session.annotators)[0]  # fmt: skip


def test_a_session_that_is_started_again_continues(tmp_path):
    def order(interrupted):
        path, keys = tmp_path / f"{interrupted}.jsonl", []
        file = DecisionFile(path)
        session = Session(PAIRS, file)
        while (task := session.next_task("ana")) is not None:
            keys.append((task.pair, task.first_is_left, task.is_check))
            session.decide("ana", task.number, "left")
            if len(keys) == interrupted:
                file.close()
                file = DecisionFile(path)
                session = Session(PAIRS, file)
        file.close()
        return keys

    assert order(-1) == order(7)


def test_agreement_is_measured_over_shared_pairs(file):
    session = Session(PAIRS, file, overlap=1, check_every=0)
    assert agreement_line(session.preferences()) == "Agreement: no pair has two decisions yet."
    for name in ("ana", "bob"):
        for i in range(20):
            task = session.next_task(name)
            session.decide(name, task.number, choose(task, ("first", "second")[i % 2]))
    line = agreement_line(session.preferences())
    assert line.startswith("Agreement: α 1.00 (") and line.endswith("over 20 shared pairs.")


def test_a_line_that_was_cut_off_is_removed_and_others_stay(tmp_path):
    path = tmp_path / "d.jsonl"
    row = {"prompt": "2?", "first": "a", "second": "b", "decision": "tie"}
    whole = json.dumps(row).encode()
    for rest, removed in ((b'{"prompt": "3?", "fir', 21), (whole, 0), (b"", 0)):
        path.write_bytes(whole + b"\n" + rest)
        file = DecisionFile(path)
        assert file.n_removed_bytes == removed
        assert len(file.rows) == 1 + (rest == whole)
        file.append(row)
        file.close()
        assert len(read_annotations(path)) == 2 + (rest == whole)


def test_wrong_files_are_one_line_each(tmp_path):
    path = tmp_path / "d.jsonl"
    held = DecisionFile(path)
    with pytest.raises(UserError, match="another `align annotate` writes it"):
        DecisionFile(path)
    held.close()
    path.write_text('{"prompt": "2?", "first": "a", "second": "b", "decision": "both"}\n')
    with pytest.raises(UserError, match="row 1: `decision`: expected one of"):
        DecisionFile(path)
    with pytest.raises(UserError, match=r"name a file \*.jsonl"):
        DecisionFile(tmp_path / "d.csv")
    (tmp_path / "x.jsonl").write_text('{"question": "2?", "choosen": "a"}\n')
    with pytest.raises(UserError, match="no pairs of completions in the columns"):
        read_pairs([tmp_path / "x.jsonl"])
    (tmp_path / "e.jsonl").write_text('{"prompt": "2?", "chosen": "a", "rejected": "a"}\n')
    with pytest.raises(UserError, match="no pair of different completions; the completions of all"):
        read_pairs([tmp_path / "e.jsonl"])
    with pytest.raises(UserError, match="no such file or folder"):
        find_files("none/here", tmp_path, "train")


def test_pairs_are_read_once_each_and_drawn_by_a_seed(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(9)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"chosen": "b",
                                                                                 "rejected": "a"}]))  # fmt: skip
    pairs = read_pairs([path])
    assert (len(pairs.pairs), pairs.n_repeated) == (9, 1)
    chosen = draw(list(pairs.pairs.values()), 4, 0)
    assert len({pair.key for pair in chosen}) == 4
    assert (
        chosen == draw(list(pairs.pairs.values()), 4, 0) != draw(list(pairs.pairs.values()), 4, 1)
    )


def test_other_machines_need_a_password(monkeypatch):
    for host in ("0.0.0.0", "192.168.0.1", "::"):
        with pytest.raises(UserError, match="set ALIGN_ANNOTATE_PASSWORD to a password"):
            server.check_address(host, 0, None)
    with pytest.raises(UserError, match="expected 8 characters or more"):
        server.check_address("127.0.0.1", 0, "short")
    server.check_address("127.0.0.1", 0, None)
    server.check_address("0.0.0.0", 0, "long enough")


@pytest.mark.parametrize("name", ["", "  ", "a" * 61, "a\x1b[31m", "‮x"])
def test_names_that_do_not_print_are_refused(name):
    with pytest.raises(UserError):
        check_name(name)
    assert check_name("  Ana  María ") == "Ana María"


def test_a_preference_in_the_other_order_is_the_same_decision(tmp_path):
    path = tmp_path / "d.jsonl"
    pair = PAIRS[0]
    rows = [
        {"prompt": pair.prompt, "first": pair.second, "second": pair.first, "decision": "first",
         "annotator": "ana"},
        {"prompt": "another?", "first": "a", "second": "b", "decision": "tie", "annotator": "ana"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = DecisionFile(path)
    session = Session(PAIRS[:2], file, check_every=0, overlap=0)
    values = [value for row in session.preferences() for value in row]
    assert sorted(v for v in values if not math.isnan(v)) == [0.0]
    file.close()
