"""Types and identities of rows.

A prompt is an optional system turn, then user and assistant turns, ending in a user turn or in the
results of tools; a completion is one assistant turn. Two prompts with the same normalized turns and
the same tools have the same ``prompt_id``, which decides duplicates and splits.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Message = dict[str, Any]
"""One turn of a conversation: ``{"role": ..., "content": ...}``, and of :data:`EXTRA_FIELDS` those
that it has."""
Messages = list[Message]
"""The turns of a conversation, in order."""
Row = dict[str, Any]
"""A checked row: ``prompt`` and completions as :data:`Messages`, ``prompt_id``, and further
columns."""
Raw = dict[str, Any]
"""A row as the source has it, unchecked."""

ROLES = ("system", "user", "assistant", "tool")
UNTRAINED = "untrained"
"""Field of an earlier turn of the assistant that the source excludes from training: true."""
UNUSUAL = "unusual"
"""Column of a checked row with what is unusual in it, as nouns; it is counted and not stored."""
EXTRA_FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name", UNTRAINED, "tools")
"""Fields of a turn beside role and content (:mod:`align.data.tool_calls`).

Only the first turn of a prompt has ``tools``: the tools of the conversation, as JSON text. Tables
have them in a column of their own.
"""
KINDS = ("pairs", "unpaired", "demonstrations")
"""Kinds of rows that a source can contain."""


class DroppedError(ValueError):
    """A raw row cannot be used.

    ``reason`` is what the data card counts; ``detail`` is what this row contains. ``place`` is the
    place of the row, such as ``row 7``, if a reader that groups rows knows it.
    """

    def __init__(self, reason: str, detail: str = "", *, place: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.place = reason, detail, place

    def within(self, part: str) -> DroppedError:
        """The same error with the part of the row that it is about, such as a turn."""
        detail = f"{part}: {self.detail}" if self.detail else part
        return DroppedError(self.reason, detail, place=self.place)


def normalize_text(text: str) -> str:
    r"""Fold differences that do not distinguish prompts: letter case, character width, white space.

    >>> normalize_text("  Write ONE\nsentence. ")
    'write one sentence.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_id(prompt: Messages) -> str:
    """Hash of the normalized turns of a prompt, as 16 hexadecimal digits."""
    turns = (
        f"{turn['role']}\x1f{normalize_text(turn['content'])}{_extra(turn)}"
        for turn in with_numbered_calls(prompt)
    )
    return hashlib.blake2b("\x1e".join(turns).encode(), digest_size=8).hexdigest()


def _extra(turn: Message) -> str:
    """The further fields of a turn that a model reads, as text; empty if it has none."""
    fields = {name: turn[name] for name in EXTRA_FIELDS if turn.get(name) and name != UNTRAINED}
    return f"\x1f{json.dumps(fields)}" if fields else ""


def with_numbered_calls(turns: Messages) -> Messages:
    """The turns with numbers, from 0, in place of the ids of their calls, which are random.

    >>> call, result = {"tool_calls": [{"id": "x7"}]}, {"tool_call_id": "x7"}
    >>> with_numbered_calls([call, result])
    [{'tool_calls': [{'id': '0'}]}, {'tool_call_id': '0'}]
    """
    numbers: dict[str, str] = {}

    def numbered(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
        if not fields.get(name):
            return dict(fields)
        return {**fields, name: numbers.setdefault(fields[name], str(len(numbers)))}

    changed = []
    for turn in turns:
        if calls_of(turn):
            turn = {**turn, "tool_calls": [numbered(call, "id") for call in calls_of(turn)]}
        changed.append(numbered(turn, "tool_call_id") if "tool_call_id" in turn else turn)
    return changed


def turn_text(turn: Message) -> str:
    """All that a turn says: its reasoning, its text and its tool calls.

    Of a turn with text only, it is that text.
    """
    if len(turn) == 2:
        return str(turn["content"])
    parts = [turn.get("reasoning_content"), turn["content"], *map(call_text, calls_of(turn))]
    return "\n".join(part for part in parts if part)


def calls_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a turn."""
    return turn.get("tool_calls") or []


def call_text(call: Mapping[str, Any]) -> str:
    """A tool call as one line of JSON."""
    function = call["function"]
    return f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}'


def used_fields(messages: Iterable[Message]) -> Iterator[str]:
    """Names of the fields beside role and content that messages have."""
    return (name for turn in messages if len(turn) > 2 for name in EXTRA_FIELDS if turn.get(name))


def conversation_id(row: Row) -> str:
    """Hash of the beginning of a row's prompt: all turns up to and including the first user turn.

    Of a prompt with one user turn, it is the ``prompt_id``.
    """
    prompt: Messages = row["prompt"]
    first = next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), len(prompt))
    is_whole = first + 1 >= len(prompt)
    conversation: str = row["prompt_id"] if is_whole else prompt_id(prompt[: first + 1])
    return conversation
