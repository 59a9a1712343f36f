"""`reader: annotations`: what most annotators prefer, as preference pairs."""

from __future__ import annotations

import json

import pytest

from align.config.data import Prepare
from align.data.prepare import prepare
from align.errors import DataError


def row(number, decision, swap=False, **others):
    texts = {"first": f"a{number}", "second": f"b{number}"}
    if swap:
        texts = {"first": texts["second"], "second": texts["first"]}
    return {"prompt": f"{number}?", **texts, "decision": decision, **others}


def read(path, rows, **settings):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return prepare(Prepare(source=str(path), test_fraction=0.0, **settings))


def test_the_majority_of_a_pair_is_chosen_and_the_rest_is_counted(tmp_path):
    rows = [
        *(row(1, "first"), row(1, "second"), row(1, "second", swap=True)),  # votes for a: 1, 0, 1
        *(row(2, "second"), row(2, "skip")),
        *(row(3, "first"), row(3, "first", swap=True)),  # one vote each
        *(row(4, "both_bad"), row(5, "skip"), row(6, "perhaps")),
        row(2, "first", check=True),
    ]
    prepared = read(tmp_path / "d.jsonl", rows, reader="annotations")
    table = prepared.tables()["pairs"]["train"]
    pairs = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in table]
    assert sorted(pairs) == [("a1", "b1"), ("b2", "a2")]
    counts = {"tie": 2, "no decision": 1, "invalid annotation": 1}
    assert prepared.dropped == {f"pairs: {reason}": n for reason, n in counts.items()}


def test_any_number_of_rows_makes_the_pairs_that_max_rows_counts(tmp_path):
    rows = [row(number, "first", annotator=name) for name in "xyz" for number in range(5)]
    prepared = read(tmp_path / "d.jsonl", rows, reader="annotations", max_rows=3)
    assert len(prepared.tables()["pairs"]["train"]) == 3


def test_a_layout_of_another_project_is_read(tmp_path):
    rows = [{"instruction": "?", "output_1": "a", "output_2": "b", "preference": 2}]
    (pair,) = read(tmp_path / "d.jsonl", rows, reader="annotations").tables()["pairs"]["train"]
    assert pair["chosen"][0]["content"] == "b"


def test_annotations_without_their_reader_name_it(tmp_path):
    with pytest.raises(DataError, match="read them with `reader: annotations`"):
        read(tmp_path / "d.jsonl", [row(1, "first")])
    with pytest.raises(DataError, match="unknown layout of annotations"):
        read(tmp_path / "e.jsonl", [{"prompt": "?", "chosen": "a"}], reader="annotations")
