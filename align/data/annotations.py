"""Annotations: decisions about two completions of a prompt, in Align's or AlpacaEval's layout.

A row in Align's layout has the keys ``prompt`` (text, or a list of turns), ``first``, ``second``
and ``decision``: ``first``, ``second``, ``tie``, ``both_bad`` or ``skip``. Its other keys are
optional texts: ``annotator``, ``time`` (ISO 8601), ``comment``, ``first_policy`` and
``second_policy``. ``both_bad`` prefers neither completion, as ``tie``; ``skip`` is no decision. A
row with a true ``check`` is an attention check and no annotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from align.data import tool_calls
from align.data.json_list import json_type
from align.data.rows import ROLES, DroppedError, Message, Messages, Raw, prompt_id
from align.errors import did_you_mean, shown

ALIGN_KEYS = ("first", "second", "decision")
"""Keys by which a row in Align's layout is recognized."""
PairKey = tuple[str, frozenset[str]]
DECISIONS = {"first": 1.0, "second": 0.0, "tie": 0.5, "both_bad": 0.5, "skip": math.nan}
"""Preference for the first completion, by the decision in Align's layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """A decision about two completions of one prompt."""

    prompt: Messages
    first: str
    second: str
    preference: float
    """Probability that the first completion is the better one: 1, 0.5 for a tie, 0, or a value
    between them. NaN: there is no decision."""
    first_policy: str = ""
    """Name of the policy behind the first completion; empty if it is unknown."""
    second_policy: str = ""
    annotator: str = ""
    """Name of the person or judge; empty if it is unknown."""
    time: str = ""
    comment: str = ""

    @property
    def prompt_id(self) -> str:
        """Identity of the prompt, see :func:`align.data.rows.prompt_id`."""
        return prompt_id(self.prompt)

    def swapped(self) -> Annotation:
        """The same decision with the completions in the other order."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            preference=1.0 - self.preference,
            first_policy=self.second_policy,
            second_policy=self.first_policy,
        )


def pair_key(prompt: str, first: str, second: str) -> PairKey:
    """Identity of a pair: the id of its prompt, and both completions in any order."""
    return prompt, frozenset((first.strip(), second.strip()))


class InvalidRowError(ValueError):
    """A row of annotations has a wrong value; the message begins with its key."""


def from_align(row: Raw) -> Iterator[Annotation]:
    """The annotation in a row of Align's layout; none for an attention check.

    Raises:
        InvalidRowError: A value is missing or wrong.
    """
    decision = row.get("decision")
    if not isinstance(decision, str) or decision not in DECISIONS:
        similar = did_you_mean(str(decision), DECISIONS)
        raise InvalidRowError(
            f"`decision`: expected one of {', '.join(DECISIONS)}; got {shown(decision)}{similar}"
        )
    if row.get("check"):
        return
    names = ("first_policy", "second_policy", "annotator", "time", "comment")
    yield Annotation(
        prompt=as_prompt(row, "prompt"),
        first=as_completion(row, "first"),
        second=as_completion(row, "second"),
        preference=DECISIONS[decision],
        **{name: as_name(row, name) for name in names},
    )


def from_alpaca_eval(row: Raw) -> Iterator[Annotation]:
    """The annotation in a row of AlpacaEval's layout.

    ``preference`` is 1 where ``output_1`` is better, 2 where ``output_2`` is, or a value between
    them; 0 and 1.5 are ties, null is no decision. An output that is null is empty. A further
    ``input`` is the end of the prompt.

    Raises:
        InvalidRowError: A value is missing or wrong.
    """
    empty = {key: "" for key in ("output_1", "output_2") if row.get(key, "") is None}
    prompt = as_prompt(row, "instruction")
    if addition := as_name(row, "input"):
        prompt[-1]["content"] += f"\n\n{addition}"
    yield Annotation(
        prompt=prompt,
        first=as_completion(row | empty, "output_1"),
        second=as_completion(row | empty, "output_2"),
        preference=_alpaca_eval_preference(row),
        first_policy=as_name(row, "generator_1"),
        second_policy=as_name(row, "generator_2"),
        annotator=as_name(row, "annotator") or as_name(row, "annotator_index"),
    )


def _alpaca_eval_preference(row: Raw) -> float:
    if "preference" not in row:
        raise InvalidRowError("`preference`: missing; write null where there is no decision")
    value = row["preference"]
    if value is None:
        return math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            return math.nan
        if value == 0:
            return 0.5
        if 1 <= value <= 2:
            return 2.0 - value
    raise InvalidRowError(
        "`preference`: expected a number from 1 (output_1 is better) to 2 (output_2 is better), "
        f"0 for a tie, or null; got {shown(value)}"
    )


def as_prompt(row: Raw, key: str) -> Messages:
    """The prompt at a key: a text becomes one user turn, a list of turns stays as it is."""
    value = row.get(key)
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        try:
            tools = value[0].get("tools") or tool_calls.tools_text(row)
            turns = [_read_turn(turn, key) for turn in value]
        except DroppedError as error:
            raise InvalidRowError(f"`{key}`: {error} {error.detail}".rstrip()) from None
        return [{**turns[0], "tools": tools}, *turns[1:]] if tools else turns
    if isinstance(value, list):
        roles = ", ".join(ROLES)
        raise InvalidRowError(
            f"`{key}`: expected a text, or turns with `role` ({roles}) and a text in `content`"
        )
    return [{"role": "user", "content": _text(row, key)}]


def as_completion(row: Raw, key: str) -> str:
    """The completion at a key: a text, or a list of one assistant turn."""
    value = row.get(key)
    if isinstance(value, list):
        if len(value) != 1 or not _is_turn(value[0]) or value[0]["role"] != "assistant":
            raise InvalidRowError(f"`{key}`: expected a text, or a list of one assistant turn")
        if len(_read_turn(value[0], key)) > 2:
            raise InvalidRowError(f"`{key}`: tool calls and reasoning are no text to compare")
        return _unicode(value[0]["content"], key)
    return _text(row, key)


def as_name(row: Raw, key: str) -> str:
    """The optional text or number at a key as text; empty if it is missing."""
    value = row.get(key)
    if value is None or value != value:  # `!=`: NaN
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value).removesuffix(".0")
    raise InvalidRowError(f"`{key}`: expected a text, got {json_type(value)}")


def _text(row: Raw, key: str) -> str:
    if key not in row:
        raise InvalidRowError(f"`{key}`: missing{did_you_mean(key, row)}")
    value = row[key]
    if not isinstance(value, str):
        raise InvalidRowError(f"`{key}`: expected a text, got {json_type(value)}")
    return _unicode(value, key)


def _unicode(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, such as "\ud83d" in JSON
        raise InvalidRowError(f"`{key}`: not Unicode text, half of a surrogate pair") from None
    return text


def _read_turn(turn: Message, key: str) -> Message:
    """A turn with its text, its tool calls and its reasoning, as ``prepare`` reads it."""
    content = _unicode(turn["content"], key)
    return {"role": turn["role"], "content": content, **tool_calls.extra_fields(turn)}


def _is_turn(turn: object) -> bool:
    return (
        isinstance(turn, dict)
        and turn.get("role") in ROLES
        and isinstance(turn.get("content"), str)
    )
