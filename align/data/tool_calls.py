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
_EMPTY: tuple[Any, ...] = (None, "", "null", [], "[]", {}, "{}")
_ARGUMENTS = ("arguments", "args", "parameters")
"""Names of the arguments of a call; the first is the stored one."""
_FUNCTION_FIELDS = {"name", *_ARGUMENTS}
_CALL_FIELDS = {"id", "type", "index"}  # the place of a call is its index


def is_empty(value: object) -> bool:
    """Whether a value has no content: missing, false, or an empty text, list or object."""
    return value is False or value in _EMPTY  # 0 equals False, but it may be the id of a call


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
        fields["tool_calls"] = calls_of_text(turn[calls[0]], calls[0])
    return fields


def behind_reasoning(text: str, reasoning: str) -> str:
    """The text of a turn without its reasoning, if the text repeats what a field has.

    Raises:
        DroppedError: The text begins with other reasoning.
    """
    inline, end, rest = text.partition("</think>")
    begins = inline.lstrip().startswith("<think>")
    inline = inline.lstrip().removeprefix("<think>").strip()
    if end and (inline == reasoning.strip() or (begins and not inline)):
        return rest.lstrip()
    if begins:
        raise DroppedError("reasoning in the text differs from `reasoning_content`")
    return text


def calls_of_text(value: object, name: str = "function_call") -> list[dict[str, Any]]:
    """The calls of a turn from a field that has one call, or a list of them, or their JSON.

    Raises:
        DroppedError: The field has something else.
    """
    return [_call(call) for call in _items(value, name)]


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
    return to_json([_tool(tool, names[0]) for tool in _items(raw[names[0]], names[0])])


def _items(value: object, name: str) -> list[Any]:
    """The objects of a field that has one or several, or their JSON, which keeps its nulls."""
    value = decoded(value, name) if isinstance(value, str) else without_nulls(value)
    return [decoded(item, name) for item in (value if isinstance(value, list) else [value])]


def _tool(tool: Any, column: str) -> dict[str, Any]:
    if isinstance(tool, dict) and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise DroppedError(f"`{column}` is not a list of functions", f"{to_json(tool):.60}")
    return dict(tool)


def _call(call: Any) -> dict[str, Any]:
    """A call with its arguments as JSON text."""
    nested = call.get("function") if isinstance(call, dict) else None
    function = call if is_empty(nested) else nested
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise DroppedError("a tool call names no function", f"{to_json(call):.60}")
    if (kind := call.get("type")) not in (None, "function", "tool_call"):
        raise DroppedError("a tool call is not a function", f"its type is {str(kind)[:40]!r}")
    outer = _CALL_FIELDS | (_FUNCTION_FIELDS if function is call else {"function"})
    _check_fields(call, outer)
    if function is not call:
        _check_fields(function, _FUNCTION_FIELDS)
    identity = {} if is_empty(call.get("id")) else {"id": str(call["id"])}
    stored = {"name": function["name"], "arguments": to_json(_arguments(function))}
    return {**identity, "type": "function", "function": stored}


def _check_fields(call: Mapping[str, Any], known: set[str]) -> None:
    unknown = [key for key, value in call.items() if key not in known and not is_empty(value)]
    if unknown:
        allowed = ", ".join(f"`{name}`" for name in sorted(known))
        detail = f"it has `{str(unknown[0])[:40]}`; allowed are {allowed}"
        raise DroppedError("a tool call has an unknown field", detail)


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in _ARGUMENTS if not is_empty(function.get(name))]
    if len(names) > 1:
        raise DroppedError(f"`{names[0]}` next to `{names[1]}` in a tool call")
    value = function[names[0]] if names else {}
    arguments = decoded(value, names[0]) if names else {}
    if not isinstance(arguments, dict):
        raise DroppedError("`arguments` of a tool call are not a JSON object", f"{value!r:.60}")
    return arguments


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
