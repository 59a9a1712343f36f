"""Built-in verifiers: exact answers, in the forms in which models write them."""

from __future__ import annotations

from fractions import Fraction
from math import isnan

import pytest

from align.config.judges import VERIFIERS
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


def test_math_is_exact():
    texts = ["0.1", "1/3", "0.3333333333333333", "42.0", "forty-two"]
    assert verifiers.math([], texts, ["1/10", "1/3", "1/3", 42, "42"]) == [1, 1, 0, 1, 0]


def test_schemas_are_checked():
    schema = '{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}'
    texts = ['{"a": 1}', '```json\n{"a": 1}\n```', '{"a": "1"}', "{}", "[1", '{"a": 1} indeed']
    assert verifiers.json_schema([], texts, [schema] * 6) == [1, 1, 0, 0, 0, 0]


def test_lists_of_texts_may_be_json_as_prepared_data_store_them():
    texts = ["Lyon on the Rhone", "Lyon", "see [1] there", "7"]
    answers = ['["lyon", "rhone"]', '["lyon", "rhone"]', "[1", 7]
    assert verifiers.contains([], texts, answers) == [1, 0, 1, 1]


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_is_a_reward_function(name: str):
    address = f"align.rewards.verifiers:{name}"
    function = functions.load_function(address)
    prompts = [[{"role": "user", "content": "?"}]]
    answer = {"json_schema": "{}", "length": 3}.get(name, "7")
    (score,) = functions.call(address, function, prompts, ["7"], {"answer": [answer]})
    assert score == 1.0


@pytest.mark.parametrize(
    ("name", "text", "usable", "unusable"),
    [
        ("math", "None 5", "5", (None, "no number", "1/0")),
        ("regex", "None", "No", (None, "(")),
        ("contains", "None", "none", (None, [], ["none", None])),
        ("length", "one", "1", (None, "many", 1.5)),
        ("json_schema", "{}", {}, (None, "{", '{"type": "none"}', 3, "null")),
    ],
)
def test_a_verifier_has_no_score_without_a_usable_answer(
    name: str, text: str, usable: object, unusable: tuple[object, ...]
):
    address = f"align.rewards.verifiers:{name}"
    function = functions.load_function(address)
    n = 1 + len(unusable)
    columns = {"answer": [usable, *unusable]}
    prompts: list[list[Message]] = [[] for _ in range(n)]
    scores = functions.judge(address, function, prompts, [text] * n, columns)
    assert scores[0] == 1.0
    assert all(isnan(score) for score in scores[1:])
    with pytest.raises(UserError, match=r"is None; .*needs a usable reference answer in every row"):
        functions.call(address, function, prompts, [text] * n, columns)
