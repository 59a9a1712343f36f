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


def label_studio_task(selected):
    """A task with all fields of the JSON export, annotated in Label Studio's page."""
    time = "2026-11-27T09:00:00.000000Z"
    result = {"value": {"selected": selected}, "id": "k3", "from_name": "comparison",
              "to_name": "comparison", "type": "pairwise", "origin": "manual"}  # fmt: skip
    reason = {"value": {"text": ["shorter"]}, "id": "k4", "from_name": "why", "to_name": "prompt",
              "type": "textarea", "origin": "manual"}  # fmt: skip
    annotation = {
        "id": 7, "completed_by": 1, "result": [reason, result], "was_cancelled": False,
        "ground_truth": False, "created_at": time, "updated_at": time, "draft_created_at": None,
        "lead_time": 4.2, "prediction": {}, "result_count": 2, "unique_id": "c0ffee",
        "import_id": None, "last_action": None, "bulk_created": False, "task": 1, "project": 1,
        "updated_by": 1, "parent_prediction": None, "parent_annotation": None,
        "last_created_by": None,
    }  # fmt: skip
    return {
        "id": 1, "annotations": [annotation], "file_upload": "tasks.json", "drafts": [],
        "predictions": [], "data": {"prompt": "2 + 2?", "answer1": "4", "answer2": "5"}, "meta": {},
        "created_at": time, "updated_at": time, "inner_id": 1, "total_annotations": 1,
        "cancelled_annotations": 0, "total_predictions": 0, "comment_count": 0,
        "unresolved_comment_count": 0, "last_comment_updated_at": None, "project": 1,
        "updated_by": 1, "comment_authors": [],
    }  # fmt: skip


def chosen(*choices):
    result = {"type": "choices", "from_name": "c", "to_name": "prompt"}
    return label_studio("", result=[result | {"value": {"choices": list(choices)}}])


def argilla(value, **fields):
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
        pytest.param(label_studio_task("right"), 0, id="Label Studio 1.23: whole task"),
        pytest.param(label_studio("none"), None, id="Label Studio: unselected"),
        pytest.param(label_studio("left", was_cancelled=True), None, id="Label Studio: skipped"),
        pytest.param(label_studio("left", result=[]), None, id="Label Studio: empty"),
        pytest.param(chosen("Tie"), 0.5, id="Label Studio: tie"),
        pytest.param(chosen("Left"), 1, id="Label Studio: choice of a side"),
        pytest.param(chosen("answer2", "short"), 0, id="Label Studio: choice of a key"),
        pytest.param(chosen("short"), None, id="Label Studio: another choice"),
        pytest.param(argilla(RANKED), 1, id="Argilla 2: objects"),
        pytest.param(argilla(["response-2", "response-1"]), 0, id="Argilla 2: names"),
        pytest.param(argilla(EQUAL), 0.5, id="Argilla 2: equal ranks"),
        pytest.param(argilla("response-2"), 0, id="Argilla 2: label"),
        pytest.param(argilla("Tie"), 0.5, id="Argilla 2: label of a tie"),
        pytest.param(argilla("b", prompt="2 + 2?", a="4", b="5"), 0, id="Argilla 2: other names"),
        pytest.param(FLAT | {"best.responses": ["response-1"]}, 1, id="Argilla 2: flat label"),
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
    # In the order of the fields, so that the first completion of all records is of one policy.
    assert [(each.first, each.second, each.preference) for each in annotations] == [
        ("A", "B", 1.0),
        ("A", "C", 0.0),
        ("B", "C", 0.0),
    ]


def test_drafts_and_discarded_responses_are_no_decisions(tmp_path):
    flat = {"best.responses": [["response-1", "response-2"]] * 3}
    flat |= {"best.responses.status": ["draft", "discarded", "submitted"]}
    flat |= {"best.responses.users": ["x", "y", "z"]}
    annotations = read_annotations(write(tmp_path / "a.json", [FLAT | flat]))
    assert [each.annotator for each in annotations] == ["z"]


def argilla_client(number, value, comment):
    """A record as `to_json` of Argilla's client 2.8 writes it, and one of `to_datasets`."""
    users = [f"649307c1-{number:04}"]
    fields = {"prompt": f"{number}?", "response-1": f"a{number}", "response-2": f"b{number}"}
    answers = {"best": [value], "comment": [comment], "quality": [4], "tags": [["short", "true"]]}
    nested = {
        "id": f"r{number}",
        "fields": fields,
        "metadata": {"source": "x"},
        "suggestions": {"best": {"value": ["response-2", "response-1"], "score": None, "agent": "m"}},
        "responses": {
            name: [{"value": each, "user_id": users[0]} for each in values]
            for name, values in answers.items()
        },
        "vectors": {},
        "status": "completed",
        "_server_id": None,
    }  # fmt: skip
    flat = {"id": f"r{number}", "status": "completed", "_server_id": None, **fields, "source": "x"}
    for name, values in answers.items():
        flat |= {f"{name}.responses": values, f"{name}.responses.users": users}
        flat |= {f"{name}.responses.status": ["submitted"]}
    flat |= {"best.suggestion": ["response-2", "response-1"], "best.suggestion.score": None}
    return nested, flat


@pytest.mark.parametrize("place", [0, 1], ids=["nested", "flat"])
def test_records_of_argilla_with_other_questions_are_read(tmp_path, place):
    orders = (["response-1", "response-2"], ["response-2", "response-1"])
    rows = [argilla_client(n, orders[n == 3], f"because {n}")[place] for n in range(12)]
    annotations = read_annotations(write(tmp_path / "a.jsonl", rows))
    assert [(each.first, each.preference) for each in annotations] == [
        (f"a{n}", float(n != 3)) for n in range(12)
    ]
    assert {each.annotator for each in annotations} == {f"649307c1-{n:04}" for n in range(12)}


def test_rankings_that_lost_their_ranks_are_refused(tmp_path):
    # Argilla's page stores the values in the order of the question; its client drops the ranks.
    rows = [argilla_client(n, ["response-1", "response-2"], "")[1] for n in range(10)]
    with pytest.raises(DataError) as error:
        read_annotations(write(tmp_path / "a.jsonl", rows))
    assert "all 10 rankings have the order response-1, response-2 and no ranks" in str(error.value)
    assert len(read_annotations(write(tmp_path / "b.jsonl", rows[:9]))) == 9
    with_ranks = [argilla_client(n, RANKED, "")[0] for n in range(10)]
    assert len(read_annotations(write(tmp_path / "c.jsonl", with_ranks))) == 10


@pytest.mark.parametrize("keys", [("text1", "text2"), ("pairText1", "pairText2")])
def test_texts_of_label_studio_are_found_by_usual_keys(tmp_path, keys):
    # Its template `Pairwise classification` shows `$pairText1` in the tag `text1`.
    row = label_studio("left")
    row["annotations"][0]["result"][0]["to_name"] = "txt-1,txt-2"
    row["data"] = {"question": "?", keys[0]: "A", keys[1]: "B"}
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
        pytest.param([argilla(["response-1", "b"])], "the ranking names `b`, which is no field", id="names of the ranking"),
        pytest.param([argilla([{"value": "a", "rank": 1}, {"value": "b", "rank": 2}])], "the ranking names `a`, which is no field", id="names and ranks"),
        pytest.param([argilla(["a", "b"])], "no answer is a decision; expected a ranking of fields, or the label `tie` or the name of a field, got a list", id="no name of a field"),
        pytest.param([argilla(4)], "no answer is a decision", id="a rating alone"),
        pytest.param([argilla("a", prompt="?", a="A", b="B", c="C")], "`a` is better than which other field is unknown; fields: `prompt`, `a`, `b`, `c`", id="label among three"),
        pytest.param([chosen("Left", "right")], "`annotations.result.value.choices`: expected one decision", id="two choices"),
        pytest.param([argilla(["response-1", "response-1"])], "one rank for each name", id="a name twice"),
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
