"""Formats: convert a raw row to a conversational row, or state why it is dropped.

A prompt is an optional system turn, then user and assistant turns in alternation, ending in a user
turn; a completion is one assistant turn. After a turn of the assistant, turns of the role ``tool``
may give results; a prompt may end in them. Plain text becomes one turn. Whole conversations, and
the transcripts of HH-RLHF, are divided where their common beginning ends. A column ``system`` is
the system turn; a column ``input`` is appended to the prompt.

:mod:`align.data.tool_calls` reads tools, tool calls and reasoning; :mod:`align.data.layouts` the
turns of ShareGPT. Not supported, and dropped: images and other media. Other fields of turns are
ignored and counted (:func:`unread_fields`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from align.data import layouts, tool_calls, tool_results, transcripts
from align.data.labels import label_of
from align.data.rows import (
    ROLES,
    UNTRAINED,
    UNUSUAL,
    DroppedError,
    Messages,
    Raw,
    Row,
    calls_of,
    prompt_id,
    turn_text,
    with_numbered_calls,
)
from align.data.tool_calls import is_empty

_CONVERSATIONS = ("prompt", "chosen", "rejected", "completion", "messages")
_MEDIA = ("images", "audios", "videos")
_UNSUPPORTED_FIELDS = (  # of a turn: without them, another text would be trained
    *("tools", "functions", "reasoning_details", "refusal", "train_detail", "masked"),
    *("images", "image", "audios", "audio", "videos", "video"),
)
_TRAIN_FIELDS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_KNOWN_FIELDS = {"role", "content", *_TRAIN_FIELDS, *_UNSUPPORTED_FIELDS, *tool_calls.FIELDS}
UNKNOWN_LABEL = "label is not true or false"
EQUAL = "chosen equals rejected"


def read_row(raw: Raw, kind: str, reader: str, labels: Mapping[str, bool]) -> Row:
    """Convert a raw row of a kind; ``labels`` maps the labels of the source, if they differ.

    Raises:
        DroppedError: The row cannot be used.
    """
    if kind == "pairs":
        return hh_pair(raw) if reader == "hh" else pair(raw)
    return labeled(raw, labels) if kind == "unpaired" else demonstration(raw)


def pair(raw: Raw) -> Row:
    """Convert a row with ``prompt``, ``chosen`` and ``rejected``.

    The prompt may be missing if the other two are whole conversations.
    """
    raw = layouts.with_messages(raw)
    sides = {side: _in_column(side, _completion, raw) for side in ("chosen", "rejected")}
    return _check_distinct(_assemble(raw, sides, ("chosen",)))  # `rejected` may be a bad call


def hh_pair(raw: Raw) -> Row:
    """Convert a row whose ``chosen`` and ``rejected`` are transcripts, as in HH-RLHF.

    Their common beginning may be in the prompt instead.
    """
    whole = {side: transcripts.whole_transcript(raw, side) for side in ("chosen", "rejected")}
    sides = {side: _in_column(side, hh_turns, whole) for side in whole}
    return _check_distinct(_assemble({"system": raw.get("system")}, sides))


def _in_column(column: str, convert: Callable[[object], Messages], raw: Raw) -> Messages:
    """The turns of a column; an error names it."""
    try:
        return convert(raw.get(column))
    except DroppedError as error:
        raise error.within(f"`{column}`") from None


def _check_distinct(row: Row) -> Row:
    if turn_text(row["chosen"][0]).strip() == turn_text(row["rejected"][0]).strip():
        raise DroppedError(EQUAL)
    return row


def demonstration(raw: Raw) -> Row:
    """Convert a row with ``prompt`` and ``completion``, or with ``messages``.

    The last turn of ``messages`` is the completion.
    """
    return _demonstration(raw, ("completion",))


def _demonstration(raw: Raw, called: Sequence[str]) -> Row:
    has_completion = raw.get("completion") is not None  # a file may have the columns of both
    value = raw["completion"] if has_completion else raw.get("messages")
    if not has_completion and isinstance(value, str):
        raise DroppedError("messages are not a list")
    return _assemble(raw, {"completion": _completion(value)}, called)


def labeled(raw: Raw, labels: Mapping[str, bool] | None = None) -> Row:
    """Convert a demonstration with a ``label``: a key of ``labels``, or true, false, 1 or 0."""
    value = raw.get("label")
    label = label_of(value, labels)
    row = _demonstration(raw, ("completion",) if label else ())
    if value is None or value != value or not str(value).strip():  # `!=`: NaN
        raise DroppedError("no label")
    if label is None:
        raise DroppedError(UNKNOWN_LABEL, f"it is {str(value)[:40]!r}")
    return {**row, "label": label}


def hh_turns(text: object) -> Messages:
    """Turns of a transcript as in HH-RLHF (:mod:`align.data.transcripts`)."""
    if text is None:
        raise DroppedError("missing value")
    return transcripts.turns_of_transcript(_text(text))


def unread_fields(raw: Raw) -> set[str]:
    """Fields of the turns of a row that are neither read nor a reason to drop it."""
    prompt = raw.get("prompt")
    inner = prompt.get("messages") if isinstance(prompt, dict) else None
    values = (inner, *map(raw.get, _CONVERSATIONS))
    conversations = [value for value in values if isinstance(value, list)]
    return {
        field
        for turns in conversations
        for turn in turns
        if isinstance(turn, dict) and len(turn) > 2
        for field, value in turn.items()
        if not _is_read(turn, field) and not is_empty(value)
    }


def _is_read(turn: Mapping[str, Any], field: str) -> bool:
    """Whether a field of a turn is read; only results of tools have a name and a call id."""
    if layouts.is_sharegpt(turn) and field in ("from", "value"):
        return True
    role = turn.get("role") or layouts.ROLES.get(str(turn.get("from")))
    if field in ("name", "tool_call_id"):
        return role in ("tool", "function")
    return field in _KNOWN_FIELDS


def _assemble(raw: Raw, sides: Mapping[str, Messages], called: Sequence[str] = ()) -> Row:
    """Join the prompt of a row and completions; ``sides`` may be whole conversations instead.

    The completions of ``called`` may only call functions that the row declares.
    """
    for column in _MEDIA:
        if raw.get(column) and not is_empty(raw[column]):
            raise DroppedError(f"`{column}` are not supported")
    tools = tool_calls.tools_text(raw)
    prompt, addition = raw.get("prompt"), _optional_text(raw, "input")
    if any(not turns for turns in sides.values()):
        raise DroppedError("blank completion")
    if all(turns[0]["role"] != "assistant" for turns in sides.values()):
        prompt_turns, completions = _divide_conversations(prompt, sides)
        if addition:
            raise DroppedError("`input` next to a whole conversation")
    elif prompt is None and any(len(turns) > 1 for turns in sides.values()):
        raise DroppedError("begins with an assistant turn")
    elif prompt is None and not ("prompt" in raw and addition):
        raise DroppedError("no prompt")
    else:
        turns = _turns("" if prompt is None else prompt, "user")
        prompt_turns = [*layouts.history_turns(raw.get("history")), *turns]
        completions = dict(sides)
    if addition and prompt_turns:
        content = prompt_turns[-1]["content"]
        content = f"{content}\n\n{addition}" if content.strip() else addition
        prompt_turns = [*prompt_turns[:-1], {**prompt_turns[-1], "content": content}]
    unusual = _check_prompt(prompt_turns)  # with the numbers that the turns have in the source
    for side, turns in completions.items():
        try:
            _check_completion(turns)
        except DroppedError as error:
            raise error.within(f"`{side}`") if len(completions) > 1 else error from None
    if tools:
        last = [turn for side in called for turn in completions[side]]
        tool_results.check_declared(tools, [*prompt_turns, *last])
    prompt_turns = _with_system(_optional_text(raw, "system"), prompt_turns)
    if tools:
        prompt_turns = [{**prompt_turns[0], "tools": tools}, *prompt_turns[1:]]
    row = {"prompt": prompt_turns, **completions, "prompt_id": prompt_id(prompt_turns)}
    return {**row, UNUSUAL: unusual} if unusual else row


def _divide_conversations(
    prompt: object, conversations: Mapping[str, Messages]
) -> tuple[Messages, dict[str, Messages]]:
    """The common beginning of conversations, and the last turn of each."""
    last = {turns[-1]["role"] for turns in conversations.values()} - {"assistant"}
    if last:
        raise DroppedError(f"ends in a {min(last)} turn")
    first = next(iter(conversations.values()))
    numbered, *others = map(with_numbered_calls, conversations.values())
    n_shared, longest = 0, min(len(turns) for turns in conversations.values()) - 1
    while n_shared < longest and all(turns[n_shared] == numbered[n_shared] for turns in others):
        n_shared += 1
    if n_shared == 0 and longest:
        raise DroppedError("transcripts share no beginning")
    if any(len(turns) != n_shared + 1 for turns in conversations.values()):
        raise DroppedError("transcripts part before the last turn")
    shared = first[:n_shared]
    # A column `prompt` next to whole conversations repeats one of their turns.
    repeated = [turn["content"] for turn in _turns(prompt, "user")] if prompt else []
    if not set(repeated) <= {turn["content"] for turn in shared}:
        raise DroppedError("prompt is not in the transcripts")
    return shared, {side: turns[n_shared:] for side, turns in conversations.items()}


def _optional_text(raw: Raw, column: str) -> str:
    """Text of a column that belongs to the prompt; empty if it is missing or blank."""
    value = raw.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DroppedError(f"`{column}` is not text", f"it is {_type_name(value)}")
    return _text(value) if value.strip() else ""


def _with_system(system: str, prompt: Messages) -> Messages:
    """The prompt with its system turn, which is left out if it is blank, as in the column."""
    prompt = _without_blank_system(prompt)
    if not system:
        return prompt
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"].strip() != system.strip():
        raise DroppedError("column `system` differs from the system turn")
    return prompt


def _without_blank_system(prompt: Messages) -> Messages:
    is_blank = prompt and prompt[0]["role"] == "system" and not prompt[0]["content"].strip()
    return prompt[1:] if is_blank else prompt


def _completion(completion: object) -> Messages:
    """Turns that end in a completion, which must not be excluded from training."""
    if isinstance(completion, dict):  # a single turn
        completion = [completion]
    turns = _turns(completion, "assistant")
    if not isinstance(completion, list) or not completion:
        return turns
    if field := _excluded_by(completion[-1]):
        raise DroppedError("completion is marked as not to be trained on", f"by `{field}`")
    return turns


def _excluded_by(turn: Mapping[str, Any]) -> str:
    """The field that excludes a turn from training; empty if there is none."""
    for field in _TRAIN_FIELDS:
        value = turn.get(field)
        if value is None or value != value:  # `!=`: NaN
            continue
        trained = label_of(value)
        if trained is None:
            raise DroppedError(f"`{field}` of a turn is not 0 or 1", f"it is {str(value)[:40]!r}")
        if not trained:
            return field
    return ""


def _turns(value: object, role: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": _text(value)}]
    if value is None:
        raise DroppedError("missing value")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DroppedError("content is not text", f"it is {_type_name(value)}")
    return [_numbered_turn(number, turn) for number, turn in enumerate(value, 1)]


def _numbered_turn(number: int, turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with its role, its text and its calls; an error names its number and its role."""
    try:
        return _turn(layouts.turn_with_role(turn))
    except DroppedError as error:
        is_sharegpt = layouts.is_sharegpt(turn)
        role = turn.get("from" if is_sharegpt else "role")
        known = f" ({role})" if role in list(layouts.ROLES if is_sharegpt else ROLES) else ""
        raise error.within(f"turn {number}{known}") from None


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with its role, its text, and its tool calls and reasoning, if it has any."""
    if turn.get("role") == "function":
        turn = {**turn, "role": "tool"}
    if turn.get("role") not in ROLES:
        raise DroppedError("wrong roles", _wrong_role(turn))
    unsupported = [n for n in _UNSUPPORTED_FIELDS if turn.get(n) and not is_empty(turn[n])]
    if unsupported:
        raise DroppedError(f"`{unsupported[0]}` of a turn is not supported")
    fields = tool_calls.extra_fields(turn)
    content = turn.get("content")
    if content is None and ("tool_calls" in fields or turn["role"] == "system"):
        content = ""
    if turn["role"] == "assistant" and _excluded_by(turn):
        fields[UNTRAINED] = True
    content = _text(_joined(content))
    if tool_calls.REASONING[0] in fields:
        content = tool_calls.behind_reasoning(content, fields[tool_calls.REASONING[0]])
    return {"role": turn["role"], "content": content, **fields}


def _joined(content: object) -> object:
    """The text of a content that is a list of text parts; any other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    others = [part for part in content if not _is_text_part(part)]
    if others:
        kind = others[0].get("type") if isinstance(others[0], dict) else None
        raise DroppedError("content is not text", f"it has a part `{str(kind)[:40]}`")
    return "".join(part["text"] for part in content)


def _is_text_part(part: object) -> bool:
    """Whether a part of a content has text and nothing else; Parquet adds keys that are null."""
    keys = {k for k, v in part.items() if v is not None} if isinstance(part, dict) else set()
    return isinstance(part, dict) and keys == {"type", "text"} and part["type"] == "text"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise DroppedError("content is not text", f"it is {_type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, such as "\ud83d" in JSON
        raise DroppedError("content is not Unicode text") from None
    return value


def _wrong_role(turn: Mapping[str, object]) -> str:
    if "role" not in turn:
        names = ", ".join(f"`{name}`" for name in list(turn)[:5]) or "nothing"
        return f"a turn has {names}; rename to `role`, `content`"
    return f"role `{str(turn['role'])[:40]}`; allowed are {', '.join(f'`{r}`' for r in ROLES)}"


def _type_name(value: object) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", bytes: "binary"}
    return "missing" if value is None else names.get(type(value), "a number")


def _check_prompt(prompt: Messages) -> list[str]:
    """Check the turns of a prompt; return what is unusual in them."""
    turns = _without_blank_system(prompt)
    if not turns:
        raise DroppedError("blank prompt", "it has no turn")
    for number, turn in enumerate(turns, 1 + len(prompt) - len(turns)):
        if not _says_something(turn):
            raise DroppedError("blank prompt", f"turn {number} ({turn['role']})")
    if len(turns) == 1 and turns[0]["role"] == "user":  # most rows
        return []
    roles = [turn["role"] for turn in turns]
    roles = roles[1:] if roles[0] == "system" else roles
    for before, role in pairwise([*roles, "assistant"]):
        if role == before != "tool":
            raise DroppedError("two turns in a row by one speaker", f"roles: {', '.join(roles)}")
        if (before, role) == ("tool", "user"):
            raise DroppedError("result of a tool without an answer", f"roles: {', '.join(roles)}")
        if role == "tool" and before == "user":
            raise DroppedError("result of a tool without a call", f"roles: {', '.join(roles)}")
    if roles and roles[0] == "assistant":
        raise DroppedError("begins with an assistant turn", f"roles: {', '.join(roles)}")
    if not roles or "system" in roles or roles[0] != "user":
        detail = "roles: " + ", ".join(turn["role"] for turn in prompt)
        raise DroppedError("wrong roles", f"{detail}; allowed is system, user, assistant, user, …")
    for turn, following in pairwise(prompt):
        if calls_of(turn) and following["role"] != "tool":
            raise DroppedError("tool calls without results", f"roles: {', '.join(roles)}")
    return tool_results.check_results(prompt)


def _says_something(turn: Mapping[str, Any]) -> bool:
    return bool(turn["content"].strip() or calls_of(turn) or turn["role"] == "tool")


def _check_completion(turns: Messages) -> None:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        detail = "roles: " + ", ".join(turn["role"] for turn in turns)
        raise DroppedError("completion is not one assistant turn", detail)
    if not _says_something(turns[0]):
        thought = tool_calls.REASONING[0] in turns[0]
        raise DroppedError("completion has only reasoning" if thought else "blank completion")
