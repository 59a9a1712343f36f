"""The answers of a language model that compares two completions, read as preferences.

An answer is a JSON object with ``reason`` and ``verdict``. What cannot be read without doubt is no
verdict: it is missing, and never counts as a loss.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from align.judges.base import Verdict

PARSER_VERSION = 1
"""Part of the key of cached verdicts. It is raised when the same answer is read differently."""
PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""The preference of each verdict: completion A is the first one."""
ANSWER_FORMAT = (
    'Answer with one JSON object and nothing else: {"reason": TEXT, "verdict": VERDICT}. '
    "TEXT gives the reason in at most three sentences. VERDICT is "
    '"A" if completion A is better, "B" if completion B is better, or "tie".'
)
"""The last paragraph of every prompt of a judge."""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        "verdict": {"type": "string", "enum": ["A", "B", "tie"]},
    },
    "required": ["reason", "verdict"],
    "additionalProperties": False,
}
NO_TEXT = "the answer has no text"
"""The reason of an empty answer, which says nothing about the completions."""
LONGEST_REASON = 2000
"""Characters of a reason that are kept."""
LONGEST_ANSWER = 100_000
"""Characters of an answer that is read. With a larger ``max_tokens``, servers could send more."""
_THOUGHTS = re.compile(r"\A(?!\s*\{).*</think(?:ing)?>", re.DOTALL)
_OBJECT = re.compile(r'\{\s*["}]')  # a brace in prose or in a formula begins no object


def response_format(structured_output: str) -> dict[str, Any] | None:
    """The field ``response_format`` of a request; None for a server that has no such field."""
    if structured_output == "json_schema":
        schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
        return {"type": "json_schema", "json_schema": schema}
    return {"type": "json_object"} if structured_output == "json_object" else None


def read_choice(choice: Mapping[str, Any], *, max_tokens: int) -> Verdict:
    """The verdict of one element of ``choices`` of an answer."""
    message = choice.get("message")
    message = message if isinstance(message, Mapping) else {}
    refusal, content = message.get("refusal"), message.get("content")
    if refusal:
        return no_verdict(f"the judge refused to answer: {_one_line(refusal)}")
    if choice.get("finish_reason") == "length":
        return no_verdict(f"the answer is longer than max_tokens ({max_tokens}); raise it")
    if choice.get("finish_reason") == "content_filter":
        return no_verdict("the server's content filter withheld the answer")
    if isinstance(content, list):  # parts, of which some servers return text as well
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str) or not content.strip():
        return no_verdict(NO_TEXT)
    return read_verdict(content)


def read_verdict(text: str) -> Verdict:
    """Read the text of an answer: one JSON object, with or without other text around it.

    Thoughts of a reasoning model before ``</think>`` are skipped. Several objects count if they
    have the same verdict. Without an object, the text may be the verdict alone.

    >>> read_verdict('{"reason": "A is wrong.", "verdict": "B"}').preference
    0.0
    >>> read_verdict("Both are fine.").preference
    nan
    """
    if len(text) > LONGEST_ANSWER:
        return no_verdict(f"the answer has {len(text):,} characters, more than {LONGEST_ANSWER:,}")
    text = _THOUGHTS.sub("", text)
    bare = PREFERENCES.get(text.strip().strip("\"'`*[]().").casefold())
    if bare is not None:
        return Verdict(bare)
    try:
        objects = [each for each in _json_objects(text) if "verdict" in each]
    except (ValueError, RecursionError) as error:
        return no_verdict(f"the answer is not JSON ({_one_line(error)}): {_excerpt(text)}")
    if not objects:
        return no_verdict(f"the answer has no verdict: {_excerpt(text)}")
    values = [each["verdict"] for each in objects]
    preferences = {_preference(value) for value in values}
    if len(preferences) > 1:
        return no_verdict(f"the answer has several verdicts: {_excerpt(text)}")
    preference = preferences.pop()
    if preference is None:
        return no_verdict(
            f'expected the verdict "A", "B" or "tie", got {_excerpt(repr(values[0]))}'
        )
    reason = objects[-1].get("reason")
    return Verdict(preference, str(reason)[:LONGEST_REASON] if reason is not None else "")


def no_verdict(reason: str) -> Verdict:
    """A verdict that cannot be used, with the reason."""
    return Verdict(math.nan, reason)


def _preference(value: Any) -> float | None:
    return PREFERENCES.get(value.strip().casefold()) if isinstance(value, str) else None


def _json_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text that are not part of another one.

    Raises:
        ValueError: There is none, or one is malformed. An object within a malformed one may be a
            quotation, so it is not read.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    objects, start = [], _OBJECT.search(text)
    while start is not None:
        found, end = decoder.raw_decode(text, start.start())
        objects.append(found)
        start = _OBJECT.search(text, end)
    if not objects:
        raise ValueError("no object")
    return objects


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:200]


def _excerpt(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 80 else f"{words[:79]}…")
