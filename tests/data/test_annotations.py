"""Files of people's decisions: every layout gives the same annotations; errors name row and key."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from align.data.annotation_files import read_annotations
from align.errors import DataError

ALIGN = {"prompt": "2 + 2?", "first": "4", "second": "5", "decision": "first"}
ALPACA = {"instruction": "2 + 2?", "output_1": "4", "output_2": "5", "preference": 1}


def label_studio(selected, **annotation):
    result = {"type": "pairwise", "to_name": "answer1,answer2", "value": {"selected": selected}}
    return {
        "id": 1,
        "data": {"prompt": "2 + 2?", "answer1": "4", "answer2": "5"},
        "annotations": [{"result": [result], "completed_by": 3} | annotation],
    }


def argilla(value, status="submitted", **fields):
    fields = fields or {"prompt": "2 + 2?", "response-1": "4", "response-2": "5"}
    return {"fields": fields, "responses": {"best": [{"user_id": "u", "value": value}]}}


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = lines if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text)
    return path


def preferences(path, *rows):
    return [annotation.preference for annotation in read_annotations(write(path, list(rows)))]


RANKED = [{"value": "response-1", "rank": 1}, {"value": "response-2", "rank": 2}]
EQUAL = [{"value": "response-1", "rank": 1}, {"value": "response-2", "rank": 1}]
FLAT = {"prompt": "2 + 2?", "response-1": "4", "response-2": "5"}


@pytest.mark.parametrize(
    ("row", "preference"),
    [
        pytest.param(ALIGN, 1, id="Align: first"),
        pytest.param(ALIGN | {"decision": "second"}, 0, id="Align: second"),
        pytest.param(ALIGN | {"decision": "tie"}, 0.5, id="Align: tie"),
        pytest.param(ALIGN | {"decision": "both_bad"}, 0.5, id="Align: both bad"),
        pytest.param(ALIGN | {"decision": "skip"}, None, id="Align: no decision"),
        pytest.param(ALPACA, 1, id="AlpacaEval: 1 is output_1"),
        pytest.param(ALPACA | {"preference": 2.0}, 0, id="AlpacaEval: 2 is output_2"),
        pytest.param(ALPACA | {"preference": 1.25}, 0.75, id="AlpacaEval: between them"),
        pytest.param(ALPACA | {"preference": 0}, 0.5, id="AlpacaEval: 0 is a tie"),
        pytest.param(ALPACA | {"preference": 1.5}, 0.5, id="AlpacaEval: 1.5 is a tie"),
        pytest.param(ALPACA | {"preference": None}, None, id="AlpacaEval: null"),
        pytest.param(ALPACA | {"preference": math.nan}, None, id="AlpacaEval: NaN of pandas"),
        pytest.param(label_studio("left"), 1, id="Label Studio: left"),
        pytest.param(label_studio("right"), 0, id="Label Studio: right"),
        pytest.param(label_studio("none"), None, id="Label Studio: unselected"),
        pytest.param(label_studio("left", was_cancelled=True), None, id="Label Studio: skipped"),
        pytest.param(label_studio("left", result=[]), None, id="Label Studio: empty"),
        pytest.param(
            label_studio("", result=[{"type": "choices", "value": {"choices": ["Tie"]}}]),
            0.5,
            id="Label Studio: tie",
        ),
        pytest.param(argilla(RANKED), 1, id="Argilla 2: objects"),
        pytest.param(argilla(["response-2", "response-1"]), 0, id="Argilla 2: names"),
        pytest.param(argilla(EQUAL), 0.5, id="Argilla 2: equal ranks"),
        pytest.param(
            FLAT | {"best.responses": [["response-2", "response-1"]]}, 0, id="Argilla 2: flat"
        ),
        pytest.param(
            FLAT | {"best": [{"user_id": "u", "value": RANKED, "status": "submitted"}]},
            1,
            id="Argilla 1: table",
        ),
        pytest.param(
            {
                "fields": FLAT,
                "responses": [
                    {"user_id": "u", "status": "submitted", "values": {"best": {"value": RANKED}}}
                ],
            },
            1,
            id="Argilla 1: records",
        ),
        pytest.param(
            FLAT
            | {
                "best": [
                    {
                        "user_id": "u",
                        "value": {"rank": [2, 1], "value": ["response-1", "response-2"]},
                        "status": "submitted",
                    }
                ]
            },
            0,
            id="Argilla 1: lists",
        ),
    ],
)
def test_every_layout_gives_the_same_annotation(tmp_path, row, preference):
    (annotation,) = read_annotations(write(tmp_path / "a.json", [row]))
    assert annotation.prompt == [{"role": "user", "content": "2 + 2?"}]
    texts = {annotation.first, annotation.second}
    assert texts == {"4", "5"}
    # The preference for "4", in whichever order the completions are listed.
    stated = annotation if annotation.first == "4" else annotation.swapped()
    assert math.isnan(stated.preference) if preference is None else stated.preference == preference


def test_who_and_when_is_read(tmp_path):
    names = {
        "first_policy": "dpo",
        "second_policy": "sft",
        "annotator": "ana",
        "time": "2026-11-26",
    }
    (own,) = read_annotations(write(tmp_path / "own.jsonl", [ALIGN | names | {"comment": "why"}]))
    assert (own.first_policy, own.second_policy, own.annotator) == ("dpo", "sft", "ana")
    assert (own.time, own.comment) == ("2026-11-26", "why")
    swapped = own.swapped()
    assert (swapped.first, swapped.first_policy, swapped.preference) == ("5", "sft", 0)
    assert swapped.swapped() == own
    generators = {"generator_1": "base", "generator_2": "model", "annotator": "gpt"}
    (alpaca,) = read_annotations(write(tmp_path / "alpaca.json", [ALPACA | generators]))
    assert (alpaca.first_policy, alpaca.second_policy, alpaca.annotator) == ("base", "model", "gpt")
    person = {"completed_by": {"id": 3, "email": "ana@example.org"}, "created_at": "2026-11-26"}
    (task,) = read_annotations(write(tmp_path / "ls.json", [label_studio("left", **person)]))
    assert (task.annotator, task.time) == ("ana@example.org", "2026-11-26")


def test_a_conversation_is_a_prompt_and_one_turn_a_completion(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    row = ALIGN | {"prompt": turns, "first": [{"role": "assistant", "content": "4"}]}
    (annotation,) = read_annotations(write(tmp_path / "a.jsonl", [row]))
    assert (annotation.prompt, annotation.first) == (turns, "4")


def test_a_ranking_of_three_gives_a_decision_about_each_two(tmp_path):
    fields = {"prompt": "?", "a": "A", "b": "B", "c": "C"}
    annotations = read_annotations(write(tmp_path / "a.json", [argilla(["c", "a", "b"], **fields)]))
    assert [(each.first, each.second) for each in annotations] == [
        ("C", "A"),
        ("C", "B"),
        ("A", "B"),
    ]
    assert {each.preference for each in annotations} == {1.0}


def test_drafts_and_discarded_responses_are_no_decisions(tmp_path):
    flat = {"best.responses": [["response-1", "response-2"]] * 3}
    flat |= {"best.responses.status": ["draft", "discarded", "submitted"]}
    flat |= {"best.responses.users": ["x", "y", "z"]}
    annotations = read_annotations(write(tmp_path / "a.json", [FLAT | flat]))
    assert [each.annotator for each in annotations] == ["z"]


def test_texts_of_label_studio_are_found_by_usual_keys(tmp_path):
    row = label_studio("left")
    row["annotations"][0]["result"][0]["to_name"] = "txt-1,txt-2"
    row["data"] = {"question": "?", "text1": "A", "text2": "B"}
    (annotation,) = read_annotations(write(tmp_path / "a.json", [row]))
    assert (annotation.prompt[0]["content"], annotation.first, annotation.second) == ("?", "A", "B")


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path):
    write(tmp_path / "b.jsonl", [ALIGN | {"first": "b"}])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(ALIGN).encode()))
    (tmp_path / "notes.txt").write_text("not annotations")
    assert [each.first for each in read_annotations(tmp_path)] == ["4", "b"]


def test_the_input_of_an_instruction_and_numbers_of_annotators_are_read(tmp_path):
    rows = [ALPACA | {"input": "a, b", "annotator_index": n} for n in (12, 12.0)]
    rows += [ALPACA | {"input": "", "annotator": math.nan}]
    one, two, three = read_annotations(write(tmp_path / "a.json", rows))
    assert one.prompt == [{"role": "user", "content": "2 + 2?\n\na, b"}]
    assert (one.annotator, two.annotator, three.annotator) == ("12", "12", "")
    assert three.prompt_id != one.prompt_id


def test_an_output_that_is_null_is_empty(tmp_path):
    (annotation,) = read_annotations(write(tmp_path / "a.json", [ALPACA | {"output_2": None}]))
    assert annotation.second == ""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([ALPACA, ALPACA | {"preference": 3}], "row 2: `preference`: expected a number from 1 (output_1 is better) to 2 (output_2 is better), 0 for a tie, or null; got 3", id="preference"),
        pytest.param([ALPACA | {"preference": 0.5}], "row 1: `preference`: expected a number from 1", id="0.5"),
        pytest.param([ALPACA | {"preference": "2"}], "got the text '2'", id="preference as text"),
        pytest.param([ALPACA | {"preference": True}], "got true", id="preference as truth"),
        pytest.param([ALPACA | {"preference": math.inf}], "got inf", id="infinite preference"),
        pytest.param([{k: v for k, v in ALPACA.items() if k != "preference"}], "row 1: `preference`: missing", id="no preference"),
        pytest.param([ALPACA | {"output_2": "\ud83d"}], "row 1: `output_2`: not Unicode text", id="half of a surrogate pair"),
        pytest.param([ALIGN | {"prompt": [{"role": "user", "content": "\ud83d"}]}], "`prompt`: not Unicode text", id="half of a pair in a turn"),
        pytest.param([ALPACA | {"instruction": 3}], "row 1: `instruction`: expected a text, got a number", id="number as prompt"),
        pytest.param([ALIGN | {"decision": "frist"}], "row 1: `decision`: expected one of first, second, tie, both_bad, skip; got the text 'frist'; did you mean `first`?", id="decision"),
        pytest.param([ALIGN | {"decision": None}], "got nothing", id="no decision"),
        pytest.param([ALIGN | {"second": [{"role": "user", "content": "5"}]}], "`second`: expected a text, or a list of one assistant turn", id="a user's turn as completion"),
        pytest.param([ALIGN | {"prompt": [{"from": "human"}]}], "`prompt`: expected a text, or turns with `role`", id="turns of ShareGPT"),
        pytest.param([ALIGN | {"annotator": [1]}], "`annotator`: expected a text, got a list", id="annotator"),
        pytest.param([label_studio("middle")], "expected left or right, got the text 'middle'", id="selected"),
        pytest.param([{"data": {"prompt": "?", "a": "A"}, "annotations": [{"result": []}]}], "the two texts are not found in the keys `prompt`, `a`", id="texts of Label Studio"),
        pytest.param([{"data": {"text1": "A", "text2": "B"}, "annotations": [{"result": []}]}], "no prompt in the keys `text1`, `text2`", id="no prompt"),
        pytest.param([argilla(["a", "b"])], "the ranking names `a`, which is no field", id="names of the ranking"),
        pytest.param([argilla(["response-1", "response-1"])], "one rank for each name", id="a name twice"),
        pytest.param([argilla("response-1")], "expected a ranking", id="no ranking"),
        pytest.param([label_studio("left"), label_studio("left") | {"data": 3}], "row 2: `data`: expected an object, got a number", id="data of Label Studio"),
        pytest.param([{"fields": FLAT, "responses": [{"user_id": "u", "values": 3}]}], "`values`: expected an object, got a number", id="values of Argilla"),
        pytest.param([FLAT | {"best.responses": [["a", "b"]], "best.responses.users": ["u", "v"]}], "1 responses, 2 users and 1 statuses", id="users of Argilla"),
        pytest.param([FLAT | {"best.responses": 3}], "`best.responses`: expected a list, got a number", id="responses of Argilla"),
        pytest.param([{"instruction": "?", "output": "A"}], "unknown layout of annotations, with the keys `instruction`, `output`", id="layout"),
        pytest.param([{"annotation_id": 1, "lead_time": 2}], "JSON-MIN export of Label Studio; export it as JSON", id="JSON-MIN"),
        pytest.param([], "has no rows", id="empty list"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_with_its_row_and_key(tmp_path, rows, message):
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(DataError) as error:
        read_annotations(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_all_wrong_rows_are_reported_at_once(tmp_path):
    rows = [ALPACA | {"preference": 5}, ALPACA, ALPACA | {"output_1": 1}]
    with pytest.raises(DataError) as error:
        read_annotations(write(tmp_path / "a.json", rows))
    assert [line.split(": ")[1] for line in error.value.lines] == ["row 1", "row 3"]


@pytest.mark.parametrize("name", ["missing.json", "a.csv", "empty"])
def test_a_source_that_holds_no_annotations_is_refused(tmp_path, name):
    (tmp_path / "a.csv").write_text("prompt,first,second,decision\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name):
        read_annotations(tmp_path / name)
