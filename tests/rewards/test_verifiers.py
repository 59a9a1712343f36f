"""Built-in verifiers: exact answers, in the forms in which models write them."""

from __future__ import annotations

import json
import threading
from fractions import Fraction
from math import isnan

import pytest

from align.config.functions import BUILT_IN, ScoreFunction
from align.errors import UserError
from align.models.tokenization import Message
from align.rewards import functions, verifiers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        pytest.param("She has 5 + 7 = 12 apples.", Fraction(12), id="the last number"),
        pytest.param("12 apples\n#### 1,234", Fraction(1234), id="GSM8K with a separator"),
        pytest.param("#### 3\nwait\n#### 4", Fraction(4), id="the last mark"),
        pytest.param(r"Thus \boxed{-0.5}, not 7.", Fraction(-1, 2), id="boxed"),
        pytest.param(r"\boxed{\frac{3}{4}}", Fraction(3, 4), id="LaTeX fraction"),
        pytest.param("It is 6/8 of it.", Fraction(3, 4), id="fraction"),
        pytest.param("It costs $1,250.50.", Fraction(2501, 2), id="currency, end of sentence"),
        pytest.param("about 50%", Fraction(50), id="percent"),
        pytest.param("a 10-20 range", Fraction(20), id="a range is no minus sign"),
        pytest.param("nothing", None, id="no number"),
        pytest.param("#### none, though 7", Fraction(7), id="number behind the mark"),
        pytest.param("1/0", None, id="no such number"),
        pytest.param("version 1.2.3 of v5x", None, id="not numbers"),
    ],
)
def test_the_final_number_of_a_text(text: str, number: Fraction | None):
    assert verifiers.final_number(text) == number


def test_numbers_are_exact():
    texts = ["0.1", "1/3", "0.3333333333333333", "42.0", "forty-two"]
    assert verifiers.number([], texts, ["1/10", "1/3", "1/3", 42, "42"]) == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "answer", "passes"),
    [
        pytest.param("5+7=12\n#### 12", "so 12\n#### 12", 1, id="GSM8K"),
        pytest.param("3, or rather\n#### 4", "#### 3", 0, id="only the marked part"),
        pytest.param(r"\boxed{\frac{2}{4}}", "0.5", 1, id="fraction"),
        pytest.param("0.3333333333", r"\frac{1}{3}", 1, id="six decimals"),
        pytest.param("0.33", r"\frac{1}{3}", 0, id="two decimals"),
        pytest.param(r"$\sqrt{8}$", r"2\sqrt{2}", 1, id="roots"),
        pytest.param("$(x-1)(x+1)$", "x^2-1", 1, id="algebra"),
        pytest.param("$x = 3$", "3", 1, id="solved for a variable"),
        pytest.param(r"$\{2, 1\}$", r"\{1, 2\}", 1, id="a set has no order"),
        pytest.param("$(1, 2)$", "(2, 1)", 0, id="a tuple has one"),
        pytest.param("x^2-1", "x^2-1", 0, id="an expression without delimiters in a text"),
        pytest.param("", "3", 0, id="nothing"),
    ],
)
def test_math_is_equality_of_expressions(text: str, answer: str, passes: float):
    pytest.importorskip("math_verify")
    assert verifiers.math([], [text], [answer]) == [passes]


def test_math_works_outside_of_the_main_thread():
    pytest.importorskip("math_verify")
    results: list[object] = []
    thread = threading.Thread(
        target=lambda: results.append(verifiers.math([], ["$7$", "8"], ["7", "7.5"]))
    )
    thread.start()
    thread.join()
    assert results == [[1.0, 0.0]]


def test_sentiment_is_the_compound_score_of_vader():
    pytest.importorskip("vaderSentiment")
    # The valences 1.9 of "good" and 3.1 of "great" in the lexicon, s / sqrt(s^2 + 15), 4 decimals;
    # "not" turns a valence into -0.74 of it.
    texts = ["good", "great", "good great", "not good", "", "table"]
    sums = [1.9, 3.1, 5.0, -0.74 * 1.9, 0.0, 0.0]
    expected = [round(s / (s * s + 15) ** 0.5, 4) for s in sums]
    assert verifiers.sentiment([], texts) == expected


def test_schemas_are_checked():
    schema = '{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}'
    texts = ['{"a": 1}', '```json\n{"a": 1}\n```', '{"a": "1"}', "{}", "[1", '{"a": 1} indeed']
    assert verifiers.json_schema([], texts, [schema] * 6) == [1, 1, 0, 0, 0, 0]


def test_a_schema_reads_nothing_else_and_deep_json_is_not_valid(tmp_path, monkeypatch):
    (tmp_path / "schema.json").write_text("{}")
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("was opened"))
    for reference in (f"file://{tmp_path}/schema.json", "http://127.0.0.1:9/x", "#/nosuch"):
        assert verifiers.json_schema([], ["1"], [json.dumps({"$ref": reference})]) == [None]
    nested = {"type": "array", "items": {"$ref": "#"}}
    texts = ["[[]]", "[" * 900 + "]" * 900, "[" * 9000 + "]" * 9000]
    assert verifiers.json_schema([], texts, [json.dumps(nested)] * 3) == [1, 0, 0]


def test_a_completion_that_repeats_a_digit_does_not_pass():
    # Python converts at most 4,300 digits; a policy that repeats itself writes more.
    assert verifiers.number([], ["#### " + "7" * 5000, "7" * 5000], ["7", "8"]) == [0, 0]
    assert verifiers.number([], ["1/" + "7" * 5000], ["7"]) == [0]
    assert verifiers.number([], ["7"], ["7" * 5000]) == [None]
    assert verifiers.contains([], ["a"], ["[" * 100_000]) == [0]


def test_lists_of_texts_may_be_json_as_prepared_data_store_them():
    texts = ["Lyon on the Rhone", "Lyon", "see [1] there", "7"]
    answers = ['["lyon", "rhone"]', '["lyon", "rhone"]', "[1", 7]
    assert verifiers.contains([], texts, answers) == [1, 0, 1, 1]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_verifier_is_a_reward_function(name: str):
    config = ScoreFunction(function=name)
    if config.package:
        pytest.importorskip(config.package[0])
    function = functions.load_function(config.address)
    prompts = [[{"role": "user", "content": "?"}]]
    answer = {"json_schema": "{}", "length": 3}.get(name, "7")
    (score,) = functions.call(config, function, prompts, ["7"], {"answer": [answer]})
    assert score == (0.0 if name == "sentiment" else 1.0)


@pytest.mark.parametrize(
    ("name", "text", "usable", "unusable"),
    [
        ("number", "None 5", "5", (None, "no number", "1/0")),
        ("math", "5", "5", (None, "", "$$")),
        ("regex", "None", "No", (None, "(")),
        ("contains", "None", "none", (None, [], ["none", None])),
        ("length", "one", "1", (None, "many", 1.5)),
        ("json_schema", "{}", {}, (None, "{", '{"type": "none"}', 3, "null")),
    ],
)
def test_a_verifier_has_no_score_without_a_usable_answer(
    name: str, text: str, usable: object, unusable: tuple[object, ...]
):
    config = ScoreFunction(function=name)
    if config.package:
        pytest.importorskip(config.package[0])
    function = functions.load_function(config.address)
    n = 1 + len(unusable)
    columns = {"answer": [usable, *unusable]}
    prompts: list[list[Message]] = [[] for _ in range(n)]
    scores = functions.judge(config, function, prompts, [text] * n, columns)
    assert scores[0] == 1.0
    assert all(isnan(score) for score in scores[1:])
    with pytest.raises(UserError, match=r"is None; .*needs a usable reference answer in every row"):
        functions.call(config, function, prompts, [text] * n, columns)
