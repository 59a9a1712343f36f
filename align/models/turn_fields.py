"""Tools, tool calls and reasoning of turns: as templates read them, and whether one wrote them.

Tables store the arguments of a call and the tools of a conversation as JSON text
(:mod:`align.data.tool_calls`). Templates read objects. A template that leaves out a turn, or a part
of one, would train another text than that of the source, so a stage refuses the row. The name of a
function is in the tools too, and the value of an argument often in the question: the template is
therefore rendered once more with a mark behind each part. Left out: numbers and nested arguments,
whose notation differs between templates.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that templates have for the reasoning of a turn; the first is the stored one."""
UNTRAINED = "untrained"
"""Field of an earlier turn of the assistant that is excluded from training."""
THINK = "</think>"
_OPENING = "<think>"
_MARK = r"Part\d+x"
Message = Mapping[str, Any]


def for_template(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Messages with the objects, and with the name of the reasoning, that a template reads."""
    name = next((n for n in REASONING if re.search(rf"[.'\"]{n}\b", template)), REASONING[0])
    return [_for_template(message, name) for message in messages]


def _for_template(message: Message, reasoning: str) -> dict[str, Any]:
    fields = {k: v for k, v in message.items() if v is not None and k not in ("tools", UNTRAINED)}
    if REASONING[0] in fields:
        fields[reasoning] = fields.pop(REASONING[0])
    if "tool_calls" in fields:
        fields["tool_calls"] = [_call(call) for call in fields["tool_calls"]]
    return fields


class Arguments(dict[str, Any]):
    """Arguments of a call: an object that is JSON where a template writes it as text."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, text: str) -> str:
        return f"{self}{text}"

    def __radd__(self, text: str) -> str:
        return f"{text}{self}"


def _call(call: Message) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = Arguments(json.loads(function["arguments"]))
    return {k: v for k, v in call.items() if v is not None} | {"function": function}


def texts(message: Message) -> Iterator[str]:
    """All texts of a message: its content, its fields and those of its tool calls."""
    if len(message) == 2:
        return iter([message.get("content") or ""])
    return (text for key, value in message.items() if key != "role" for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def with_texts(message: Message, change: Callable[[str], str]) -> dict[str, Any]:
    """A message with ``change`` applied to each of its texts."""
    return {k: v if k == "role" else _with_texts(v, change) for k, v in message.items()}


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_texts(item, change) for key, item in value.items()}
    return [_with_texts(item, change) for item in value] if isinstance(value, list) else value


def tools_of(messages: Sequence[Message]) -> list[Any] | None:
    """The tools of a conversation, which its first turn has as JSON text."""
    text = messages[0].get("tools") if messages else None
    return json.loads(text) if text else None


def has_more_than_text(message: Message) -> bool:
    """Whether a turn has tool calls or reasoning, or is the result of a tool."""
    return bool(
        message.get("role") == "tool" or message.get("tool_calls") or message.get(REASONING[0])
    )


def shape(message: Message) -> tuple[Any, ...]:
    """What of a turn decides whether a template writes all of it, apart from its texts."""
    reasons = message["role"] == "assistant" and _OPENING in str(message.get("content") or "")
    if len(message) == 2:
        return (message["role"], reasons)
    calls = message.get("tool_calls") or ()
    names = [name for name in message if message[name] and name != "content"]
    return (message["role"], reasons, *sorted(names), len(calls), bool(message.get("content")))


def has_reasoning(messages: Sequence[Message]) -> bool:
    """Whether any turn has reasoning apart from its text."""
    return any(message.get(REASONING[0]) for message in messages)


def marked(
    messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[list[Message], list[Any] | None]:
    """A conversation and its tools with a mark, which is nowhere else, in each part of a turn.

    Parts are names of tools and calls, arguments, results, and texts. A mark ends its part, so that
    a part of which the template writes only the beginning lacks it.
    """
    numbers = itertools.count()

    def mark(text: str) -> str:
        return f"{text}Part{next(numbers)}x" if text.strip() else text

    def mark_call(call: Message) -> dict[str, Any]:
        function = call["function"]
        arguments = {
            mark(key): mark(value) if isinstance(value, str) else value
            for key, value in json.loads(function["arguments"]).items()
        }
        text = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {"name": mark(function["name"]), "arguments": text}}

    def mark_turn(message: Message) -> Message:
        fields: dict[str, Any] = {
            key: mark(message[key]) for key in ("content", REASONING[0]) if message.get(key)
        }
        if calls := message.get("tool_calls"):
            fields["tool_calls"] = [mark_call(call) for call in calls]
        return {**message, **fields}

    def mark_tool(tool: Message) -> dict[str, Any]:
        if "function" in tool:
            return {**tool, "function": mark_tool(tool["function"])}
        return {**tool, "name": mark(str(tool.get("name")))}

    return [*map(mark_turn, messages)], [*map(mark_tool, tools)] if tools else None


def without_marks(text: str) -> str:
    """A text of :func:`marked` as it was."""
    return re.sub(_MARK, "", text)


def not_written(
    text: str, messages: Sequence[Message], tools: Sequence[Any] | None, turns: Container[int]
) -> Iterator[str]:
    """The parts of turns that the text of a conversation lacks, in words.

    ``turns`` has the indices of those that must be written. Earlier turns may lack their reasoning:
    templates leave it out on purpose.
    """
    forms = _Text(text)
    for tool in tools or ():
        name = str(tool.get("function", tool).get("name"))
        if name not in forms:
            yield f"the tool `{name}`"
    for number, message in enumerate(messages, start=1):
        if number - 1 in turns:
            is_last = number == len(messages)
            turn = f"of turn {number} ({message['role']})"
            yield from (f"{part} {turn}" for part in _missing(forms, message, is_last))


def _missing(text: _Text, message: Message, is_last: bool) -> Iterator[str]:
    reasoning, content = message.get(REASONING[0]), str(message.get("content") or "")
    if reasoning and is_last and reasoning not in text:
        yield f"`{REASONING[0]}`"
    mark = re.search(f"{_MARK}$", content)  # templates remove commands, such as /no_think
    if (mark.group() if mark else content.rpartition(THINK)[2]) not in text:
        yield "the text"
    for call in message.get("tool_calls") or ():
        function = call["function"]
        if function["name"] not in text:
            yield f"the call of `{function['name']}`"
            continue
        for key, value in json.loads(function["arguments"]).items():
            if key not in text or (isinstance(value, str) and value not in text):
                yield f"the argument `{key}` of the call of `{function['name']}`"


class _Text:
    """A text in which parts are searched for, as they are or as JSON, whatever the white space."""

    def __init__(self, text: str) -> None:
        self._text = _squeezed(text)

    def __contains__(self, part: str) -> bool:
        forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
        return any(_squeezed(form) in self._text for form in forms)


def _squeezed(text: str) -> str:
    return "".join(text.split())
