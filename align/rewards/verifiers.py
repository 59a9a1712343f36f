"""Built-in scores of completions: numbers, math, patterns, JSON schemas, lengths, words, sentiment.

Each is a reward function, which a recipe names by its short name (:mod:`align.config.functions`).
All but ``sentiment`` compare the completion with the answer of its prompt, by default the column
``answer`` (add it to ``keep_columns`` of the ``prepare`` stage), and return 1 where the completion
passes, else 0. They return None, which is a missing verdict of a judge and an error as a reward,
where the answer is not usable. Optional packages are imported by the functions that need them.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

Scores = list[float | None]
"""One score per completion; None without a usable reference answer."""

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+)"
    r"(?![\w/]|[.,]\d)"
)
_MARKED = (
    re.compile(r"####\s*(.+)"),
    re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*\{[^{}]*\}|\{[^{}]*\})?[^{}]*)\}"),
)
"""How the final answer is marked: GSM8K's ``#### 42``, and LaTeX's ``\\boxed{42}``."""
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")


_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
"""What encloses an expression in LaTeX."""
MOST_DIGITS = 1000
"""Characters of the longest number; Python refuses to convert one of more than 4,300 digits."""
SECONDS_PER_EXPRESSION = 5
"""Longest time to read or to compare an expression; one that takes longer does not pass."""


def number(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> Scores:
    r"""Whether the final number of a completion equals that of the reference answer, exactly.

    The final answer follows ``####``, or is in ``\boxed{}``; without a mark, it is the last number
    of the text. Numbers may have signs, decimals, thousands separators, a percent sign, and one
    fraction bar; ``1/2`` equals ``0.5``. Left out: algebra, units, words for numbers.

    >>> number([], ["so 3 * 14 = 42.", "#### 1,000"], ["42", "#### 1000"])
    [1.0, 1.0]
    >>> number([], [r"\boxed{\frac{1}{2}}", "41"], ["0.5", "42"])
    [1.0, 0.0]
    """
    expected = [None if each is None else final_number(str(each)) for each in answer]
    return [
        None if each is None else float(final_number(text) == each)
        for text, each in zip(completions, expected, strict=True)
    ]


def math(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> Scores:
    r"""Whether the final expression of a completion equals that of the answer, by math-verify.

    Numbers are compared to six decimals, expressions by algebra. The final expression follows
    ``####`` or is in ``\boxed{}``; without a mark, it is the last one in LaTeX, or the last number.
    An answer without LaTeX delimiters is read as LaTeX as a whole.

    >>> math([], [r"\boxed{(x-1)(x+1)}", "so x = 2"], ["x^2-1", "3"])
    [1.0, 0.0]
    """
    from math_verify import verify

    expected = [_expressions(_as_latex(str(each))) if each is not None else () for each in answer]
    seconds = _seconds_per_expression()
    return [
        float(verify([*gold], [*_expressions(text)], timeout_seconds=seconds)) if gold else None
        for text, gold in zip(completions, expected, strict=True)
    ]


@lru_cache(maxsize=4096)
def _expressions(text: str) -> tuple[Any, ...]:
    """The final expression of a text, and its source; empty if there is none."""
    from math_verify import parse

    marked = list(_MARKED[0].finditer(text))
    found = parse(marked[-1][1] if marked else text, parsing_timeout=_seconds_per_expression() or 0)
    return tuple(found) if any(not isinstance(each, str) for each in found) else ()


def _as_latex(answer: str) -> str:
    marked = list(_MARKED[0].finditer(answer))
    answer = marked[-1][1] if marked else answer
    return answer if _DELIMITED.search(answer) else f"${answer.strip()}$"


def _seconds_per_expression() -> int | None:
    """The limit of math-verify, which sets an alarm; only the main thread can."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return SECONDS_PER_EXPRESSION if in_main_thread else None


def final_number(text: str) -> Fraction | None:
    """The number that a text ends its reasoning with; None if there is none, or too long a one.

    >>> final_number("It costs $1,250.50 in all")
    Fraction(2501, 2)
    """
    marked = [match for pattern in _MARKED for match in pattern.finditer(text)]
    if marked:
        text = max(marked, key=lambda match: match.start())[1]
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text).replace("\\", " ").replace("$", " ")
    numbers = _NUMBER.findall(text)
    if not numbers or len(numbers[-1]) > MOST_DIGITS:
        return None
    top, _, bottom = numbers[-1].replace(",", "").replace(" ", "").partition("/")
    if bottom and not int(bottom):
        return None
    return Fraction(top) / (int(bottom) if bottom else 1)


def regex(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> Scores:
    """Whether a completion contains a match of the regular expression in ``answer``.

    >>> regex([], ["It is 1999.", "no year"], ["[0-9]{4}", "[0-9]{4}"])
    [1.0, 0.0]
    """
    patterns = [None if each is None else _compiled(str(each)) for each in answer]
    return [
        None if pattern is None else float(pattern.search(text) is not None)
        for text, pattern in zip(completions, patterns, strict=True)
    ]


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def contains(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> Scores:
    """Whether a completion contains the text in ``answer``, or all texts of a list.

    Letter case is ignored. A list may be written as JSON.

    >>> contains([], ["Paris, France", "Lyon"], ["paris", ["lyon", "rhone"]])
    [1.0, 0.0]
    """
    return [
        float(all(needle.casefold() in text.casefold() for needle in needles)) if needles else None
        for text, needles in zip(completions, map(_texts, answer), strict=True)
    ]


def _texts(answer: Any) -> list[str]:
    """The texts of an answer, whose list may be JSON, as the prepared data store it.

    None and a list with None have no text.
    """
    if isinstance(answer, str) and answer.lstrip().startswith("["):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError):
            return [answer]
    texts = answer if isinstance(answer, list | tuple) else [answer]
    return [] if None in texts else [str(each) for each in texts]


def length(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]) -> Scores:
    """Whether a completion has at least one word and at most as many as ``answer``.

    >>> length([], ["one two", "one two three"], [2, "2"])
    [1.0, 0.0]
    """
    limits = [None if each is None else _whole_number(str(each)) for each in answer]
    return [
        None if most is None else float(0 < len(text.split()) <= most)
        for text, most in zip(completions, limits, strict=True)
    ]


def _whole_number(text: str) -> int | None:
    value = final_number(text)
    return int(value) if value is not None and value.denominator == 1 else None


def json_schema(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]
) -> Scores:
    """Whether a completion is JSON that is valid under the schema in ``answer``.

    The schema is a mapping, or JSON as text; ``{}`` accepts all JSON. The JSON may be inside a
    Markdown fence. Schemas are checked with the package jsonschema, which reads no other file or
    address: a reference outside of the schema makes it unusable.

    >>> json_schema([], ['{"a": 1}', "a: 1"], ["{}", "{}"])
    [1.0, 0.0]
    """
    return [
        None if schema is None else _validity(text, schema)
        for text, schema in zip(completions, map(_schema, answer), strict=True)
    ]


def _schema(answer: Any) -> Any:
    """The schema of a row: a mapping or a truth value; None if it is no schema."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError):
            return None
    if not isinstance(answer, dict | bool):
        return None
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(answer)
    except SchemaError:
        return None
    return answer


def _validity(text: str, schema: Any) -> float | None:
    """1 for valid JSON, else 0; None if the schema refers to something that it does not contain."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return 0.0
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        return float(Draft202012Validator(schema, registry=Registry()).is_valid(value))
    except Unresolvable:
        return None
    except RecursionError:  # the JSON is nested too deep
        return 0.0


def sentiment(prompts: Sequence[Any], completions: Sequence[str]) -> Scores:
    """How positive a completion is, from -1 to 1: the compound score of VADER.

    VADER adds up the valence of words from a lexicon, with rules for negation, emphasis and
    punctuation; it reads English. Source: Hutto and Gilbert 2014, ICWSM.

    >>> sentiment([], ["The film is wonderful!", "The film is boring."])
    [0.6114, -0.3182]
    """
    analyzer = _sentiment_analyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]


@cache
def _sentiment_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
