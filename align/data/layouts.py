"""Layouts of ShareGPT, Alpaca and OpenAI's preferences, recognized by their columns.

ShareGPT has ``conversations``, whose turns are ``{from, value}``. Beside them, LLaMA-Factory has
``chosen`` and ``rejected`` as single turns, or ``kto_tag`` as a label. Alpaca has ``instruction``,
``input`` and ``output``, and may have ``system`` and ``history``, a list of earlier questions with
their answers. OpenAI's preferences have ``input``, an object with ``messages`` and ``tools``, and
``preferred_output`` and ``non_preferred_output``. Column maps of the recipe take precedence, and so
do Align's own columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from align.data.rows import DroppedError, Messages, Raw
from align.data.tool_calls import calls_of_text, is_empty

ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "function_call": "assistant",
}
"""Values of ``from`` and the roles that they stand for."""
SHAREGPT, ALPACA, OPENAI = "ShareGPT", "Alpaca", "OpenAI"
OPTIONAL = ("input", "history")
"""Columns of Alpaca that belong to the prompt; the rows at the head of a file may lack them."""

_PREFERENCES = {
    "prompt": "input",
    "chosen": "preferred_output",
    "rejected": "non_preferred_output",
}


def recognize(names: Collection[str]) -> tuple[str, dict[str, str]]:
    """The layout of a source with these columns, and the column map that reads it.

    Both are empty if the columns are those of no layout.
    """
    if set(_PREFERENCES.values()) <= set(names):
        return OPENAI, dict(_PREFERENCES)
    label = {"label": "kto_tag"} if "kto_tag" in names and "label" not in names else {}
    pairs = {"chosen", "rejected"} <= set(names)
    if "conversations" in names and "messages" not in names:
        if pairs:
            return SHAREGPT, {"prompt": "conversations"} if "prompt" not in names else {}
        return SHAREGPT, {"messages": "conversations", **label}
    if "instruction" in names and "prompt" not in names and (pairs or "output" in names):
        columns = {"prompt": "instruction", **label}
        if not pairs and "completion" not in names:
            columns["completion"] = "output"
        return ALPACA, columns | {name: name for name in OPTIONAL}
    return "", {}


def with_messages(raw: Raw) -> Raw:
    """A pair of OpenAI with the turns of its prompt and its tools; any other row as it is.

    Raises:
        DroppedError: Both the prompt and the row have tools.
    """
    prompt = raw.get("prompt")
    if not isinstance(prompt, dict) or "messages" not in prompt:
        return raw
    raw = {**raw, "prompt": prompt["messages"]}
    if is_empty(prompt.get("tools")):
        return raw
    if not is_empty(raw.get("tools")):
        raise DroppedError("`tools` next to `tools` of `input`")
    return {**raw, "tools": prompt["tools"]}


def is_sharegpt(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has a speaker as ShareGPT names it, and no role.

    Parquet gives turns of a source with both layouts the keys of both, one of them null.
    """
    return "from" in turn and turn.get("role") is None


def turn_with_role(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn of ShareGPT with ``role`` and ``content``; any other turn as it is.

    Raises:
        DroppedError: Its ``from`` is unknown.
    """
    if not is_sharegpt(turn):
        return turn
    name = str(turn["from"]).strip().lower()
    if name not in ROLES:
        allowed = ", ".join(f"`{role}`" for role in ROLES)
        raise DroppedError("wrong roles", f"`from` is `{name[:40]}`; allowed are {allowed}")
    fields = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if name == "function_call":
        return {**fields, "role": "assistant", "tool_calls": calls_of_text(turn.get("value"))}
    return {**fields, "role": ROLES[name], "content": turn.get("value")}


def history_turns(history: object) -> Messages:
    """The turns of Alpaca's ``history``: pairs of a question and its answer.

    Raises:
        DroppedError: It is no list of pairs of texts.
    """
    turns: Messages = []
    for pair in history if isinstance(history, list) else [] if not history else [history]:
        texts = list(pair) if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise DroppedError("`history` is not a list of questions with answers")
        roles = zip(("user", "assistant"), texts, strict=True)
        turns += [{"role": role, "content": text} for role, text in roles]
    return turns
