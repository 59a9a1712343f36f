"""The answers of a language model, read as verdicts."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.judges.verdicts import PREFERENCES, SCHEMA, read_choice, read_verdict, response_format


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        ('{"reason": "x", "verdict": "A"}', 1.0),
        ('{"verdict": "B", "reason": "x"}', 0.0),
        ('{"verdict": "tie"}', 0.5),
        (' \n{"verdict": " Tie "}\n', 0.5),
        ('{"verdict": "a"}', 1.0),
        ('{"reason": null, "verdict": "B", "confidence": 0.3}', 0.0),
        ('```json\n{"reason": "x", "verdict": "B"}\n```', 0.0),
        ('My verdict on {A} and {B}:\n{"verdict": "A"}\nI hope this helps.', 1.0),
        ('{"verdict": "A"}, in short: {"verdict": "A"}', 1.0),
        ('<think>{"verdict": "B"}? No.</think>\n{"verdict": "A"}', 1.0),
        ('First {"verdict": "B"}.</think>{"verdict": "A"}', 1.0),
        ('{"reason": "A writes </think> and {\\"verdict\\": \\"B\\"}", "verdict": "A"}', 1.0),
        ("A", 1.0),
        (" [[B]]\n", 0.0),
        ('"tie".', 0.5),
    ],
)
def test_a_clear_answer_is_a_verdict(text, preference):
    assert read_verdict(text).preference == preference


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("A is better than B.", "not JSON"),
        ("AB", "not JSON"),
        ('{"verdict": "A"', "not JSON"),
        ('{"reason": "it says "{"verdict": "B"}"", "verdict": "A"}', "not JSON"),
        ('{"verdict": "A", "verdict": "B"}', "a key twice"),
        ('{"verdict": "A"} or {"verdict": "B"}', "several verdicts"),
        ('{"verdict": "A"} or {"verdict": "C"}', "several verdicts"),
        ('{"verdict": "C"}', "got \"'C'\""),
        ('{"verdict": NaN}', "nan"),
        ('{"verdict": 1}', "1"),
        ('{"verdict": true}', "True"),
        ('{"verdict": ["A"]}', "['A']"),
        ('{"verdict": null}', "None"),
        ('{"answer": "A"}', "has no verdict"),
        ('{"result": {"verdict": "A"}}', "has no verdict"),
        ('["verdict", "A"]', "not JSON"),
        ('{"a":' * 100_00, "not JSON"),
        ("A" * 200_000, "more than 100,000"),
    ],
)  # fmt: skip
def test_an_unclear_answer_is_no_verdict_and_says_why(text, reason):
    verdict = read_verdict(text)
    assert math.isnan(verdict.preference)
    assert reason in verdict.reason and "\n" not in verdict.reason and len(verdict.reason) < 300


@given(st.text(alphabet='{}[]":, \\\nABtieverdct0'))
def test_any_text_is_a_verdict_or_none(text):
    preference = read_verdict(text).preference
    assert math.isnan(preference) or preference in (0.0, 0.5, 1.0)


@given(st.text(alphabet='{}[]":\\\n\0A<>/think\u2028\ud800'), st.sampled_from(["A", "B", "tie"]))
def test_every_reason_keeps_the_verdict(reason, verdict):
    text = json.dumps({"reason": reason, "verdict": verdict})
    prefix = "" if "</think>" in reason else "Here it is: "  # what precedes it are thoughts
    read = read_verdict(prefix + text)
    assert (read.preference, read.reason) == (PREFERENCES[verdict.casefold()], reason[:2000])


GOOD = '{"verdict": "A"}'


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({}, "has no text"),
        ({"message": None}, "has no text"),
        ({"message": "A"}, "has no text"),
        ({"message": {"content": None, "tool_calls": []}}, "has no text"),
        ({"message": {"content": "  "}}, "has no text"),
        ({"message": {"content": 1}}, "has no text"),
        ({"message": {"content": [1, {"text": None}]}}, "has no text"),
        ({"message": {"content": GOOD, "refusal": "I\nwill not"}}, "refused to answer: I will not"),
        ({"message": {"content": GOOD}, "finish_reason": "length"}, "max_tokens (99)"),
        ({"message": {"content": GOOD}, "finish_reason": "content_filter"}, "content filter"),
    ],
)
def test_a_choice_without_a_complete_text_is_no_verdict(choice, reason):
    verdict = read_choice(choice, max_tokens=99)
    assert not verdict.is_valid and reason in verdict.reason


def test_a_text_in_parts_is_read():
    parts = [{"type": "text", "text": '{"verdict": '}, {"type": "text", "text": '"B"}'}]
    assert read_choice({"message": {"content": parts}}, max_tokens=9).preference == 0.0


def test_the_schema_describes_what_is_read():
    jsonschema = pytest.importorskip("jsonschema")
    schema = response_format("json_schema")["json_schema"]["schema"]
    assert schema is SCHEMA
    for verdict in schema["properties"]["verdict"]["enum"]:
        answer = {"reason": "x", "verdict": verdict}
        jsonschema.validate(answer, schema)
        assert read_verdict(json.dumps(answer)).is_valid
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"reason": "x", "verdict": "C"}, schema)
