"""Annotations exported from Label Studio and Argilla.

Of Label Studio, the export called JSON is read: tasks with ``data`` and ``annotations``. Of
Argilla, records of version 2, nested or flattened, and feedback records of version 1. A ranking of
several completions gives a decision about each two of them. Left out: suggestions, predictions and
drafts, which are no decisions, and answers to other questions. The nested records of Argilla 2 do
not say which responses are drafts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from align.data.annotations import Annotation, InvalidRowError, as_completion, as_name, as_prompt
from align.data.json_list import json_type
from align.data.rows import Raw
from align.errors import DataError, shown

PROMPT_KEYS = ("prompt", "instruction", "question", "query", "input")
_SIDES = (  # keys of the two texts in templates of Label Studio, and usual ones
    *(("answer1", "answer2"), ("pairText1", "pairText2"), ("text1", "text2")),
    *(("response1", "response2"), ("response_1", "response_2"), ("response-1", "response-2")),
    *(("completion1", "completion2"), ("output_1", "output_2"), ("first", "second")),
)
TIE = "tie"
MIN_RANKINGS = 10
"""From this many rankings without ranks on, they must not all have the same order."""
_SELECTED = {"left": 1.0, "right": 0.0, "none": math.nan}
_SUFFIX = ".responses"


def from_label_studio(row: Raw) -> Iterator[Annotation]:
    """The annotations of a task; a skipped annotation, or one without a choice, has no decision.

    A tie is the choice ``tie`` of a `Choices` tag, because the `Pairwise` tag has none. Without
    `Pairwise`, its choices ``left`` and ``right``, or the keys of the two texts, are decisions.

    Raises:
        InvalidRowError: A value is missing or wrong.
    """
    data = _object(row, "data")
    for annotation in _objects(row, "annotations"):
        results = _objects(annotation, "result")
        pairwise = [result for result in results if result.get("type") == "pairwise"]
        choices = [result for result in results if result.get("type") == "choices"]
        first, second = _sides(data, pairwise)
        yield Annotation(
            prompt=as_prompt(data, _prompt_key(data)),
            first=as_completion(data, first),
            second=as_completion(data, second),
            preference=_label_studio_preference(annotation, pairwise, choices, (first, second)),
            annotator=_completed_by(annotation),
            time=as_name(annotation, "created_at"),
        )


def _sides(data: Raw, pairwise: Sequence[Raw]) -> tuple[str, str]:
    """Keys of the left and the right text: the names that the tag compares, or usual ones.

    The page of Label Studio writes the name of the `Pairwise` tag as ``to_name``, not its objects.
    """
    named = [tuple(str(result.get("to_name", "")).split(",")) for result in pairwise[:1]]
    for sides in (*named, *_SIDES):
        if len(sides) == 2 and all(side in data for side in sides):
            return sides[0], sides[1]
    usual = " or ".join(f"`{first}`, `{second}`" for first, second in _SIDES[:3])
    raise InvalidRowError(
        f"`data`: the two texts are not found in the keys {_listed(data)}; name them {usual}, the "
        "left one first"
    )


def _label_studio_preference(
    annotation: Raw, pairwise: Sequence[Raw], choices: Sequence[Raw], sides: tuple[str, str]
) -> float:
    if annotation.get("was_cancelled"):
        return math.nan
    decisions = {"left": 1.0, "right": 0.0, sides[0].lower(): 1.0, sides[1].lower(): 0.0, TIE: 0.5}
    words = [choice for result in choices for choice in _list(_object(result, "value"), "choices")]
    chosen = {str(word).strip().lower() for word in words} & decisions.keys()
    if TIE in chosen:
        return 0.5
    if not pairwise:
        preferences = {decisions[word] for word in chosen}
        if len(preferences) > 1:
            raise InvalidRowError(
                f"`annotations.result.value.choices`: expected one decision, got {shown(words)}"
            )
        return preferences.pop() if preferences else math.nan
    selected = _object(pairwise[0], "value").get("selected", "none")
    if not isinstance(selected, str) or selected not in _SELECTED:
        raise InvalidRowError(
            f"`annotations.result.value.selected`: expected left or right, got {shown(selected)}"
        )
    return _SELECTED[selected]


def _completed_by(annotation: Raw) -> str:
    """Name of the annotator: a number, or an object with an e-mail address."""
    person = annotation.get("completed_by")
    if isinstance(person, dict):
        return as_name(person, "email") or as_name(person, "id")
    return as_name(annotation, "completed_by")


def is_argilla_table(row: Raw) -> bool:
    """Whether a row is a flattened record of Argilla, with one column per field and question."""
    return bool(_question_columns(row)) or {"external_id", "metadata"} <= row.keys()


@dataclass(slots=True)
class ArgillaAnswers:
    """What the records of a file have in common, which no single record shows."""

    orders: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """How many rankings without ranks list their values in each order."""
    n_decisions: int = 0
    other: Any = None
    """The first answer that names no field."""

    def check(self, source: str) -> None:
        """Check that there are decisions, and that rankings are not all in the order of a form.

        Argilla's page stores the values of a ranking in the order of the question, each with its
        rank; its Python client 2 leaves the ranks out, and with them the decisions.

        Raises:
            DataError: The file has answers and no decision, or its rankings lost their ranks.
        """
        if self.other is not None and not self.n_decisions:
            raise DataError(
                f"{source}: no answer is a decision; expected a ranking of fields, or the label "
                f"`{TIE}` or the name of a field, got {shown(self.other)}; name the values of the "
                "question as the fields of the completions"
            )
        if len(self.orders) == 1 and (n_rankings := self.orders.total()) >= MIN_RANKINGS:
            (order,) = self.orders
            raise DataError(
                f"{source}: all {n_rankings} rankings have the order {', '.join(order)} and no "
                "ranks, which Argilla's Python client leaves out (its issue 5712); export the "
                "records with its REST API, or ask for a label that names a field"
            )


def from_argilla(row: Raw, answers: ArgillaAnswers) -> Iterator[Annotation]:
    """The annotations of a record: one per response and each two ranked completions.

    A label decides if it is the name of a field, or ``tie``, and the other completion is known.
    What no single record shows is counted in ``answers``.

    Raises:
        InvalidRowError: A value is missing or wrong.
    """
    nested = isinstance(row.get("fields"), dict)
    fields = row["fields"] if nested else row
    sides = _argilla_sides(fields, only_texts=nested)
    for user, value in _argilla_responses(row):
        ranks = _label_ranks(value, fields, sides) if isinstance(value, str) else _ranks(value)
        if not ranks or not (has_ranks(value) or ranks.keys() & fields.keys()):
            answers.other = value if answers.other is None else answers.other
            continue
        unknown = [name for name in ranks if name not in fields]
        if unknown:
            raise InvalidRowError(
                f"`responses`: the ranking names `{unknown[0]}`, which is no field; fields: "
                f"{_listed(fields)}; name the values of the ranking as the fields of the completions"
            )
        answers.n_decisions += 1
        if not isinstance(value, str) and not has_ranks(value):
            answers.orders[tuple(ranks)] += 1
        # In the order of the fields: the best one first would make every first completion win.
        for first, second in combinations((name for name in fields if name in ranks), 2):
            difference = ranks[second] - ranks[first]  # rank 1 is the best
            yield Annotation(
                prompt=as_prompt(fields, _prompt_key(fields)),
                first=as_completion(fields, first),
                second=as_completion(fields, second),
                preference=0.5 if difference == 0 else float(difference > 0),
                annotator=user,
            )


def has_ranks(value: Any) -> bool:
    """Whether a ranking states ranks, rather than listing names."""
    if isinstance(value, dict):
        return "rank" in value
    return isinstance(value, list) and any(isinstance(v, dict) and "rank" in v for v in value)


def _argilla_sides(fields: Raw, *, only_texts: bool) -> tuple[str, str] | None:
    """Names of the two completions: usual ones, or all fields besides the prompt."""
    usual = next((sides for sides in _SIDES if all(side in fields for side in sides)), None)
    others = [name for name in fields if name not in PROMPT_KEYS]
    if usual is None and only_texts and len(others) == 2:
        return others[0], others[1]
    return usual


def _label_ranks(label: str, fields: Raw, sides: tuple[str, str] | None) -> Mapping[str, int]:
    """Ranks of both completions by a label; none if it says nothing about them."""
    if sides is not None and label.strip().lower() == TIE:
        return dict.fromkeys(sides, 1)
    if sides is not None and label in sides:
        return {side: 1 if side == label else 2 for side in sides}
    if label in fields and label not in PROMPT_KEYS:
        raise InvalidRowError(
            f"`responses`: `{label}` is better than which other field is unknown; fields: "
            f"{_listed(fields)}; name two of them `response-1`, `response-2`"
        )
    return {}


def _argilla_responses(row: Raw) -> Iterator[tuple[str, Any]]:
    """User and ranking of every submitted response."""
    for response in _response_list(row):
        value = response.get("value")
        if response.get("status", "submitted") == "submitted" and value is not None:
            yield as_name(response, "user_id"), value


def _response_list(row: Raw) -> Iterator[Raw]:
    """The responses of a record as objects with ``user_id``, ``status`` and ``value``."""
    responses = row.get("responses")
    if isinstance(responses, dict):  # version 2: lists by question
        for question in responses:
            yield from _objects(responses, question)
    elif isinstance(responses, list):  # version 1: `values` by question
        for response in _objects(row, "responses"):
            answers = _object(response, "values") if response.get("values") else {}
            for question in answers:
                yield {**response, "value": _object(answers, question).get("value")}
    for column in _question_columns(row):
        if not column.endswith(_SUFFIX):
            yield from _objects(row, column)
            continue
        values = _list(row, column)
        users = _list(row, f"{column}.users") or [None] * len(values)
        statuses = _list(row, f"{column}.status") or [None] * len(values)
        if not len(values) == len(users) == len(statuses):
            raise InvalidRowError(
                f"`{column}`: {len(values)} responses, {len(users)} users and {len(statuses)} "
                "statuses; expected as many of each"
            )
        for user, status, value in zip(users, statuses, values, strict=True):
            yield {"user_id": user, "status": status or "submitted", "value": value}


def _question_columns(row: Raw) -> list[str]:
    """Columns of a flattened record that hold responses."""
    return [
        column
        for column, value in row.items()
        if column.endswith(_SUFFIX)
        or (
            isinstance(value, list)
            and value
            and all(isinstance(each, dict) and {"user_id", "value"} <= set(each) for each in value)
        )
    ]


def _ranks(value: Any) -> Mapping[str, int]:
    """Rank of each name of a ranking; none if the value is an answer to another question.

    A ranking is a list of names, of objects with ``value`` and ``rank``, or two lists.
    """
    if isinstance(value, dict) and isinstance(value.get("rank"), list):
        names, ranks = value.get("value") or [], value["rank"]
    elif isinstance(value, list) and value and all(_is_ranked(each) for each in value):
        names = [each["value"] for each in value]
        ranks = [each.get("rank", place) for place, each in enumerate(value, 1)]
    elif isinstance(value, list) and all(isinstance(each, str) for each in value):
        names, ranks = value, list(range(1, len(value) + 1))
    else:
        return {}
    right = all(isinstance(name, str) for name in names) and all(type(r) is int for r in ranks)
    if not right or len(names) != len(ranks) or len(set(names)) != len(names):
        raise InvalidRowError("`responses`: expected a ranking with one rank for each name")
    return dict(zip(names, ranks, strict=True))


def _is_ranked(each: Any) -> bool:
    return isinstance(each, dict) and "value" in each


def _prompt_key(fields: Raw) -> str:
    for key in PROMPT_KEYS:
        if key in fields:
            return key
    raise InvalidRowError(
        f"no prompt in the keys {_listed(fields)}; name its key `prompt`, or one of "
        f"{', '.join(PROMPT_KEYS[1:])}"
    )


def _object(row: Raw, key: str) -> Raw:
    value = row.get(key)
    if not isinstance(value, dict):
        raise InvalidRowError(f"`{key}`: expected an object, got {json_type(value)}")
    return value


def _list(row: Raw, key: str) -> list[Any]:
    """The list at a key; empty if it is missing."""
    value = row.get(key)
    if not isinstance(value, list | None):
        raise InvalidRowError(f"`{key}`: expected a list, got {json_type(value)}")
    return value or []


def _objects(row: Raw, key: str) -> list[Raw]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InvalidRowError(f"`{key}`: expected a list of objects, got {json_type(value)}")
    return value


def _listed(row: Raw) -> str:
    return ", ".join(f"`{key}`" for key in list(row)[:8]) or "(none)"
