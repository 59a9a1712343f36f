"""Tool calls, tools and reasoning of a raw turn, in one stored layout.

A turn of the assistant has ``tool_calls`` as the API of OpenAI writes them, with ``arguments`` as
JSON text, because Parquet would give all calls the arguments of all others. Text of reasoning is
``reasoning_content``. A turn of the role ``tool`` may have ``tool_call_id`` and ``name``. The tools
of a conversation are JSON text in the field ``tools`` of its first turn. Left out: built-in tools
and calls that are written in the text of a turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.data.rows import DroppedError, Message, Raw

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the field for reasoning; the first is the stored one."""
CALLS = ("tool_calls", "function_call")
TOOLS = ("tools", "functions")
"""Columns with the tools of a conversation; ``functions`` is the older name."""
FIELDS = (*REASONING, *CALLS, "tool_call_id", "name")
_EMPTY: tuple[Any, ...] = (None, False, "", "null", [], "[]", {}, "{}")


def is_empty(value: object) -> bool:
    """Whether a value has no content: missing, false, or an empty text, list or object."""
    return value is None or value in _EMPTY


def extra_fields(turn: Mapping[str, Any]) -> Message:
    """The fields of a raw turn beside role and content, in the stored layout.

    Raises:
        DroppedError: A field is malformed, or belongs to another role.
    """
    role = turn.get("role")
    fields: Message = {}
    if role == "tool":
        values = {name: turn.get(name) for name in ("tool_call_id", "name")}
        fields |= {name: str(value) for name, value in values.items() if not is_empty(value)}
    reasoning = [name for name in REASONING if not is_empty(turn.get(name))]
    calls = [name for name in CALLS if not is_empty(turn.get(name))]
    if role != "assistant" and (reasoning or calls):
        raise DroppedError(f"`{[*reasoning, *calls][0]}` in a turn of another role", f"`{role}`")
    if reasoning:
        texts = {turn[name] for name in reasoning if isinstance(turn[name], str)}
        if len(texts) != 1 or not all(isinstance(turn[name], str) for name in reasoning):
            names = ", ".join(f"`{name}`" for name in reasoning)
            raise DroppedError(f"`{reasoning[0]}` is not one text", f"the turn has {names}")
        if (text := texts.pop()).strip():
            fields[REASONING[0]] = text
    if len(calls) > 1:
        raise DroppedError("`tool_calls` next to `function_call`")
    if calls:
        value = decoded(turn[calls[0]], calls[0])
        fields["tool_calls"] = [
            _call(call) for call in (value if isinstance(value, list) else [value])
        ]
    return fields


def calls_of_text(value: object) -> list[dict[str, Any]]:
    """The calls of a turn whose text is one call, or a list of them, as JSON.

    Raises:
        DroppedError: The text is no call.
    """
    calls = decoded(value, "function_call")
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def tools_text(raw: Raw) -> str:
    """The tools of a row as JSON text in the layout of OpenAI; empty if it has none.

    Raises:
        DroppedError: They are no functions, or both columns have some.
    """
    names = [name for name in TOOLS if not is_empty(raw.get(name))]
    if not names:
        return ""
    if len(names) > 1:
        raise DroppedError("`tools` next to `functions`")
    tools = decoded(raw[names[0]], names[0])
    tools = tools if isinstance(tools, list) else [tools]
    return to_json([_tool(tool, names[0]) for tool in tools])


def _tool(value: object, column: str) -> dict[str, Any]:
    tool: Any = without_nulls(decoded(value, column))
    if isinstance(tool, dict) and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise DroppedError(f"`{column}` is not a list of functions", f"{to_json(tool):.60}")
    return dict(tool)


def _call(value: object) -> dict[str, Any]:
    """A call with its arguments as JSON text."""
    call: Any = decoded(value, "tool_calls")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise DroppedError("a tool call names no function", f"{to_json(call):.60}")
    if (kind := call.get("type")) not in (None, "function"):
        raise DroppedError("a tool call is not a function", f"its type is {str(kind)[:40]!r}")
    given = function.get("arguments")
    arguments = {} if is_empty(given) else given
    if isinstance(arguments, str):
        arguments = decoded(arguments, "arguments")
    else:
        arguments = without_nulls(arguments)
    if not isinstance(arguments, dict):
        raise DroppedError("`arguments` of a tool call are not a JSON object", f"{given!r:.60}")
    identity = {} if is_empty(call.get("id")) else {"id": str(call["id"])}
    stored = {"name": function["name"], "arguments": to_json(arguments)}
    return {**identity, "type": "function", "function": stored}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def decoded(value: object, name: str) -> Any:
    """A value, or what its JSON text contains.

    Raises:
        DroppedError: The text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise DroppedError(f"`{name}` is not JSON", f"it is {value[:40]!r}") from None


def to_json(value: object) -> str:
    """JSON text with the characters as they are.

    Raises:
        DroppedError: The value has what JSON cannot express, or text that is not Unicode.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError):
        raise DroppedError("a tool or a call is not JSON") from None
    return text


def without_nulls(value: Any) -> Any:
    """The value without keys that are null.

    Parquet and ``datasets`` give every object of a column the keys of all others.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
