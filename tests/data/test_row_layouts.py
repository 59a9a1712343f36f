"""Files with rows of several layouts are refused; stray rows are dropped with their columns."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.preference_data import (
    PAIR,
    assistant,
    prepared_whole,
    training_rows,
    user,
    write_jsonl,
)

from align.config.readers import Reader
from align.errors import DataError

Rows = list[dict[str, Any]]
REPAIR = "; divide it into one file per layout, and name these files in `mixture:`"


def alpaca(n: int, start: int = 0) -> Rows:
    return [{"instruction": f"Say {k}", "output": f"a {k}"} for k in range(start, start + n)]


def sharegpt(n: int) -> Rows:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]
    return [{"conversations": [turns[0], {**turns[1], "value": f"c {k}"}]} for k in range(n)]


def plain(n: int) -> Rows:
    return [{"prompt": f"p {k}", "completion": f"b {k}"} for k in range(n)]


def pairs(n: int) -> Rows:
    return [{**PAIR, "prompt": f"q {k}"} for k in range(n)]


def messages(n: int) -> Rows:
    return [{"messages": [user(f"m {k}"), assistant("d")]} for k in range(n)]


def transcripts(n: int) -> Rows:
    text = "\n\nHuman: h {}\n\nAssistant: {}"
    return [{"chosen": text.format(k, "a"), "rejected": text.format(k, "b")} for k in range(n)]


CONVERSATION = sharegpt(1)[0]["conversations"]
LABELED = {"conversations": CONVERSATION, "kto_tag": True}
MIXED: list[tuple[str, Rows, dict[str, Any], str]] = [
    ("the layouts of the walk", [*alpaca(1), *sharegpt(2), *messages(1), *plain(1)], {},
     "1 × demonstrations of Alpaca with `instruction`, `output` (row 1);"
     " 2 × demonstrations of ShareGPT with `conversations` (row 2);"
     " 1 × demonstrations with `messages` (row 4);"
     " 1 × demonstrations with `prompt`, `completion` (row 5)"),
    ("Alpaca and ShareGPT", [*alpaca(2), *sharegpt(1)], {},
     "2 × demonstrations of Alpaca with `instruction`, `output` (row 1);"
     " 1 × demonstrations of ShareGPT with `conversations` (row 3)"),
    ("a layout behind the head", [*pairs(990), *alpaca(10)], {},
     "990 × pairs with `prompt`, `chosen`, `rejected` (row 1);"
     " 10 × demonstrations of Alpaca with `instruction`, `output` (row 991)"),
    ("two kinds of ShareGPT", [{"conversations": CONVERSATION[:1], "chosen": assistant("a"),
                                "rejected": assistant("b")}, LABELED], {},
     "1 × pairs of ShareGPT with `conversations`, `chosen`, `rejected` (row 1);"
     " 1 × labeled completions of ShareGPT with `conversations`, `kto_tag` (row 2)"),
    ("labels behind the head", [*sharegpt(101), {**LABELED, "kto_tag": False}, LABELED], {},
     "101 × demonstrations of ShareGPT with `conversations` (row 1);"
     " 2 × labeled completions of ShareGPT with `conversations`, `kto_tag` (row 102)"),
    ("pairs and transcripts", [*pairs(3), *transcripts(1)], {},
     "3 × pairs with `prompt`, `chosen`, `rejected` (row 1);"
     " 1 × transcripts with `chosen`, `rejected` (row 4)"),
    ("transcripts and pairs", [*transcripts(1), *pairs(1)], {"reader": "hh"},
     "1 × rows of `reader: hh` (row 1); 1 × pairs with `prompt`, `chosen`, `rejected` (row 2)"),
    ("pairs and GSM8K", [*pairs(1), {"question": "1 + 1?", "answer": "#### 2"}], {},
     "1 × pairs with `prompt`, `chosen`, `rejected` (row 1);"
     " 1 × rows of `reader: gsm8k` with `question`, `answer` (row 2)"),
    ("GSM8K and plain rows", [{"question": "1 + 1?", "answer": "#### 2"}, *plain(2)],
     {"reader": "gsm8k"}, "1 × rows of `reader: gsm8k` (row 1);"
     " 2 × demonstrations with `prompt`, `completion` (row 2)"),
    ("mapped columns", [{"q": "Hi", "good": "a", "bad": "b"}, *messages(1)],
     {"columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
     "1 × pairs with `q`, `good`, `bad` (row 1); 1 × demonstrations with `messages` (row 2)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "keys", "counts"), [case[1:] for case in MIXED], ids=[case[0] for case in MIXED]
)
def test_a_file_of_several_layouts_is_an_error_with_the_first_row_of_each(
    rows: Rows, keys: dict[str, Any], counts: str, tmp_path: Path
):
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        prepared_whole(file, **keys)
    assert error.value.lines == (f"{file}: rows of several layouts: {counts}{REPAIR}",)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_files_that_give_all_rows_all_columns_are_mixed_by_their_values(
    suffix: str, tmp_path: Path
):
    file, columns = tmp_path / f"a.{suffix}", ("instruction", "output", "prompt", "completion")
    rows = [{name: row.get(name) for name in columns} for row in (*alpaca(2), *plain(1))]
    if suffix == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(DataError, match=r"2 × demonstrations of Alpaca with .* \(row 1\); 1 × dem"):
        prepared_whole(file)


def test_a_stray_row_is_dropped_with_its_layout_and_a_defective_one_with_its_columns(
    tmp_path: Path,
):
    rows = [*pairs(198), *alpaca(1), {"prompt": "x", "chosen": "y", "note": "z"}]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))
    assert data.dropped == {"pairs: missing value": 1, "pairs: row of another layout": 1}
    assert data.dropped_examples == {
        "pairs: missing value": "row 200: `rejected`; the row has `prompt`, `chosen`, `note`",
        "pairs: row of another layout": "row 199: demonstrations of Alpaca with `instruction`,"
        " `output`",
    }
    assert data.findings["not_read"] == {"column `note`": 1}  # not those of the other layout


BLANK = {"chosen": "", "rejected": ""}
H4 = {**PAIR, "messages": [user("Say a word."), assistant("Hello.")]}
SPARSE: list[tuple[str, Rows, str, int]] = [
    ("Alpaca with and without input", [*alpaca(1), {**alpaca(1)[0], "input": "1"},
                                       {**alpaca(1)[0], "input": ""}, alpaca(1, 3)[0]],
     "demonstrations", 1),  # the blank input is a duplicate
    ("a system turn in some rows", [*plain(2), {**plain(1)[0], "system": "Be brief."}],
     "demonstrations", 0),
    ("tools in some rows", [*plain(1), {**plain(1)[0], "tools": [{"name": "f"}]}],
     "demonstrations", 0),
    ("messages beside prompts and completions", [*plain(1), *messages(1)], "demonstrations", 0),
    ("prompts within the conversations", [*pairs(1), {
        "chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]}],
     "pairs", 0),
    ("pairs with a blank side beside messages", [*[H4] * 1, {**H4, "prompt": "Go", "rejected": ""},
                                                 {**H4, "prompt": "Go", "rejected": None}],
     "pairs", 2),
    ("labels that are null", [{**plain(1)[0], "label": True}, {**plain(2)[1], "label": None}],
     "unpaired", 1),
    ("labels in some rows", [*plain(1), {**plain(2)[1], "label": True}], "unpaired", 1),
    ("a column `label` with other values behind the head",
     [*plain(101), *({**row, "label": "math"} for row in plain(110)[101:])], "demonstrations", 0),
    ("blank pairs beside messages in all rows",
     [{**PAIR, "prompt": f"q {k}", **messages(1)[0], **(BLANK if k % 7 == 0 else {})}
      for k in range(30)], "pairs", 5),
    ("blank conversations beside Alpaca's columns",
     [{**a, "conversations": c["conversations"] if k % 7 else []}
      for k, (a, c) in enumerate(zip(alpaca(30), sharegpt(30), strict=True))],
     "demonstrations", 5),
    ("notes in some rows", [*pairs(2), {**PAIR, "source": "s", "id": 3}], "pairs", 0),
    ("ShareGPT with system and tools in some rows",
     [*sharegpt(2), {"conversations": CONVERSATION, "system": "s", "tools": "[]"}],
     "demonstrations", 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "kind", "n_dropped"), [case[1:] for case in SPARSE], ids=[case[0] for case in SPARSE]
)
def test_sparse_columns_are_one_layout(rows: Rows, kind: str, n_dropped: int, tmp_path: Path):
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(training_rows(data, kind)) == len(rows) - n_dropped
    assert sum(data.dropped.values()) == n_dropped
    assert not any("layout" in reason for reason in data.dropped)


def test_parquet_may_have_messages_beside_prompts_and_completions(tmp_path: Path):
    columns = ("messages", "prompt", "completion")
    rows = [{name: row.get(name) for name in columns} for row in (*messages(1), *plain(1))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = training_rows(prepared_whole(tmp_path / "a.parquet"), "demonstrations")
    assert [row["completion"] for row in read] == [[assistant("d")], [assistant("b 0")]]


def test_blank_pairs_of_csv_beside_completions_are_no_other_layout(tmp_path: Path):
    columns, file = ("prompt", "chosen", "rejected", "completion"), tmp_path / "a.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        for k, row in enumerate(pairs(40)):
            writer.writerow({**row, "completion": "c", **(BLANK if k % 10 == 0 else {})})
    data = prepared_whole(file)
    assert len(training_rows(data, "pairs")) == 36
    assert data.dropped == {"pairs: blank completion": 4}


def test_labels_with_names_of_the_recipe_make_another_layout(tmp_path: Path):
    rows = [{"prompt": "a", "completion": "b", "label": "up"}, *plain(101)]
    rows = [*rows[1:], *({**rows[0], "prompt": f"z {k}"} for k in range(3))]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert len(training_rows(prepared_whole(file), "demonstrations")) == 104
    with pytest.raises(DataError, match=r"3 × labeled completions with .*`label` \(row 102\)"):
        prepared_whole(file, labels={"up": True, "down": False})


def test_a_broken_transcript_is_no_other_layout(tmp_path: Path):
    good = transcripts(20)
    rows = [{"prompt": "topic", **row} for row in good]
    rows[3]["chosen"] = rows[5]["rejected"] = "junk"
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows), reader="hh")
    assert len(training_rows(data, "pairs")) == 18
    assert data.dropped == {"pairs: not an HH transcript": 2}


def test_an_input_of_alpaca_that_begins_behind_the_head_is_read(tmp_path: Path):
    rows = [*alpaca(101), {"instruction": "Add.", "input": "1 + 2", "output": "3"}]
    for columns in ({}, {"prompt": "instruction", "completion": "output"}):
        data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows), columns=columns)
        assert training_rows(data, "demonstrations")[-1]["prompt"] == [user("Add.\n\n1 + 2")]
        assert "not_read" not in data.findings


def test_rows_of_which_all_are_of_another_layout_name_the_reader(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", pairs(2))
    with pytest.raises(DataError) as error:
        prepared_whole(file, reader="hh")
    assert str(error.value) == (
        f"{file}: its rows are 2 × pairs with `prompt`, `chosen`, `rejected` (row 1);"
        " `reader: hh` does not read them; set `reader: columns`"
    )


TREE = {"message_id": "a", "parent_id": None, "text": "Hi", "role": "prompter"}
SHP = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 1}
PUBLIC: list[tuple[str, dict[str, Any], str]] = [
    ("hh", transcripts(1)[0], "the rows are transcripts"),
    ("hh", {"prompt": "\n\nHuman: h\n\nAssistant:", "chosen": " a", "rejected": " b"}, "transcripts"),
    ("hh", {"prompt": "Human: h\n\nAssistant:", "chosen": " a", "rejected": " b"}, "transcripts"),
    ("hh", {"chosen": "Human: h\n\nAssistant: a", "rejected": "Human: h\n\nAssistant: b"},
     "the rows are transcripts"),
    ("ultrafeedback", {"instruction": "i", "completions": [{"response": "r"}]}, "UltraFeedback's"),
    ("shp", {**SHP, "score_B": 2}, "those of Stanford Human Preferences"),
    ("tldr", {"info": {"post": "p"}, "summaries": [{"text": "t"}] * 2, "choice": 0}, "TL;DR comp"),
    ("oasst", TREE, "OpenAssistant's"),
    ("oasst", {"message_tree_id": "a", "prompt": {**TREE, "replies": []}}, "OpenAssistant's"),
    ("gsm8k", {"question": "q", "answer": "a\n#### 2"}, "GSM8K's"),
    ("gsm8k_solutions", {"question": "q", "ground_truth": "g",
                         "6b": {"solution": "s", "is_correct": True}}, "labeled solutions"),
    ("annotations", {"prompt": "p", "first": "a", "second": "b", "decision": "tie"}, "annotations"),
    ("annotations", {"instruction": "i", "output_1": "a", "output_2": "b"}, "annotations"),
    ("annotations", {"data": {"prompt": "p"}, "annotations": []}, "annotations"),
    ("annotations", {"fields": {}, "responses": {}}, "annotations"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "row", "name", "reader"),
    [(*case, reader) for case in PUBLIC for reader in ("columns", "shp", "oasst", "hh")
     if reader != case[0]],
)  # fmt: skip
def test_rows_of_a_public_data_set_name_its_reader(
    own: str, row: dict[str, Any], name: str, reader: str, tmp_path: Path
):
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as error:
        prepared_whole(file, reader=reader)
    (line,) = error.value.lines
    assert name in line
    assert line.startswith(f"{file}: the rows are ")
    assert line.endswith(f"; read them with `reader: {own}`")


def test_every_reader_of_a_public_data_set_is_named_by_its_rows():
    assert {case[0] for case in PUBLIC} == {*get_args(Reader)} - {"columns"}


def test_a_prompt_that_begins_with_a_speaker_is_no_transcript(tmp_path: Path):
    rows = [{**PAIR, "prompt": "Human: a being. Assistant: a helper. Say more."}]
    (row,) = training_rows(prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows)), "pairs")
    assert row["prompt"] == [user(rows[0]["prompt"])]


def test_a_prompt_beside_whole_transcripts_is_counted_as_not_read(tmp_path: Path):
    parted = {"q": "\n\nHuman: h\n\nAssistant:", "chosen": " a", "rejected": " b"}
    rows = [*({"q": "topic", **row} for row in transcripts(3)), parted]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    keys: dict[str, Any] = {"reader": "hh", "columns": {"prompt": "q"}}
    data = prepared_whole(file, **keys)
    assert len(training_rows(data, "pairs")) == 4
    assert data.findings["not_read"] == {"column `q`": 3}
    assert "not_read" not in prepared_whole(file, **keys, keep_columns=["q"]).findings


def test_questions_and_answers_of_another_source_are_mapped(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"columns: \{prompt: question, completion: answer\}"):
        prepared_whole(file)
    with pytest.raises(DataError, match=r"required by `reader: shp`.*; set `reader: columns`"):
        prepared_whole(write_jsonl(tmp_path / "b.jsonl", pairs(1)), reader="shp")
