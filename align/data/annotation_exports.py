"""Annotations exported from Label Studio (pairwise) and Argilla (ranking).

Of Label Studio, the export called JSON is read: tasks with ``data`` and ``annotations``. Of
Argilla, records of version 2, nested or flattened, and feedback records of version 1. A ranking of
several completions gives a decision about each two of them. Left out: suggestions, predictions and
drafts, which are no decisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from align.data.annotations import Annotation, InvalidRowError, as_completion, as_name, as_prompt
from align.data.json_list import json_type
from align.data.rows import Raw
from align.errors import shown

PROMPT_KEYS = ("prompt", "instruction", "question", "query", "input")
_SIDES = (  # keys of the two texts in templates of Label Studio
    *(("answer1", "answer2"), ("text1", "text2"), ("response1", "response2")),
    *(("completion1", "completion2"), ("output_1", "output_2"), ("first", "second")),
)
_SELECTED = {"left": 1.0, "right": 0.0, "none": math.nan}
_SUFFIX = ".responses"


def from_label_studio(row: Raw) -> Iterator[Annotation]:
    """The annotations of a task; a skipped annotation, or one without a choice, has no decision.

    A tie is the choice ``tie`` of a `Choices` tag, because the `Pairwise` tag has none.

    Raises:
        InvalidRowError: A value is missing or wrong.
    """
    data = _object(row, "data")
    for annotation in _objects(row, "annotations"):
        results = _objects(annotation, "result")
        pairwise = [result for result in results if result.get("type") == "pairwise"]
        ties = [result for result in results if result.get("type") == "choices"]
        first, second = _sides(data, pairwise)
        yield Annotation(
            prompt=as_prompt(data, _prompt_key(data)),
            first=as_completion(data, first),
            second=as_completion(data, second),
            preference=_label_studio_preference(annotation, pairwise, ties),
            annotator=_completed_by(annotation),
            time=as_name(annotation, "created_at"),
        )


def _sides(data: Raw, pairwise: Sequence[Raw]) -> tuple[str, str]:
    """Keys of the left and the right text: the names that the tag compares, or usual ones."""
    named = [tuple(str(result.get("to_name", "")).split(",")) for result in pairwise[:1]]
    for sides in (*named, *_SIDES):
        if len(sides) == 2 and all(side in data for side in sides):
            return sides[0], sides[1]
    usual = " or ".join(f"`{first}`, `{second}`" for first, second in _SIDES[:3])
    raise InvalidRowError(
        f"`data`: the two texts are not found in the keys {_listed(data)}; name them {usual}, or "
        "as the `Text` tags that `Pairwise` compares"
    )


def _label_studio_preference(
    annotation: Raw, pairwise: Sequence[Raw], choices: Sequence[Raw]
) -> float:
    if annotation.get("was_cancelled"):
        return math.nan
    words = [choice for result in choices for choice in _list(_object(result, "value"), "choices")]
    if any(str(word).strip().lower() == "tie" for word in words):
        return 0.5
    if not pairwise:
        return math.nan
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


def from_argilla(row: Raw) -> Iterator[Annotation]:
    """The annotations of a record: one per response and each two ranked completions.

    Raises:
        InvalidRowError: A value is missing or wrong.
    """
    fields = row["fields"] if isinstance(row.get("fields"), dict) else row
    for user, value in _argilla_responses(row):
        ranks = _ranks(value)
        unknown = [name for name in ranks if name not in fields]
        if unknown:
            raise InvalidRowError(
                f"`responses`: the ranking names `{unknown[0]}`, which is no field; fields: "
                f"{_listed(fields)}; name the values of the ranking as the fields of the completions"
            )
        for first, second in combinations(ranks, 2):
            difference = ranks[second] - ranks[first]  # rank 1 is the best
            yield Annotation(
                prompt=as_prompt(fields, _prompt_key(fields)),
                first=as_completion(fields, first),
                second=as_completion(fields, second),
                preference=0.5 if difference == 0 else float(difference > 0),
                annotator=user,
            )


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
    """Rank of each name of a ranking, which is a list of names, of objects, or two lists."""
    if isinstance(value, dict) and isinstance(value.get("rank"), list):
        names, ranks = value.get("value") or [], value["rank"]
    elif isinstance(value, list) and all(isinstance(each, dict) for each in value):
        names = [each.get("value") for each in value]
        ranks = [each.get("rank", place) for place, each in enumerate(value, 1)]
    elif isinstance(value, list):
        names, ranks = value, list(range(1, len(value) + 1))
    else:
        raise InvalidRowError(f"`responses`: expected a ranking, got {shown(value)}")
    right = all(isinstance(name, str) for name in names) and all(type(r) is int for r in ranks)
    if not right or len(names) != len(ranks) or len(set(names)) != len(names):
        raise InvalidRowError("`responses`: expected a ranking with one rank for each name")
    return dict(zip(names, ranks, strict=True))


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
