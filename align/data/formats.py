"""Formats: convert a raw row to a conversational row, or state why it is dropped.

A prompt is an optional system turn, then user and assistant turns in alternation, ending in a user
turn; a completion is one assistant turn. Plain text becomes one turn. Whole conversations, and the
transcripts of HH-RLHF, are divided where their common beginning ends. Not supported: tool calls,
images, the names of ShareGPT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from align.data.rows import ROLES, DroppedError, Messages, Raw, Row, prompt_id

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_row(raw: Raw, kind: str, reader: str) -> Row:
    """Convert a raw row of a kind.

    Raises:
        DroppedError: The row cannot be used.
    """
    if kind == "pairs":
        return hh_pair(raw) if reader == "hh" else pair(raw)
    return labeled(raw) if kind == "unpaired" else demonstration(raw)


def pair(raw: Raw) -> Row:
    """Convert a row with ``prompt``, ``chosen`` and ``rejected``.

    The prompt may be missing if the other two are whole conversations.
    """
    sides = {side: _turns(raw.get(side), "assistant") for side in ("chosen", "rejected")}
    return _check_distinct(_assemble(raw.get("prompt"), sides))


def hh_pair(raw: Raw) -> Row:
    """Convert a row whose ``chosen`` and ``rejected`` are transcripts, as in HH-RLHF."""
    sides = {side: hh_turns(raw.get(side)) for side in ("chosen", "rejected")}
    return _check_distinct(_assemble(None, sides))


def _check_distinct(row: Row) -> Row:
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        raise DroppedError("chosen equals rejected")
    return row


def demonstration(raw: Raw) -> Row:
    """Convert a row with ``prompt`` and ``completion``, or with ``messages``.

    The last turn of ``messages`` is the completion.
    """
    value = raw.get("completion") if "completion" in raw else raw.get("messages")
    if "completion" not in raw and isinstance(value, str):
        raise DroppedError("messages are not a list")
    return _assemble(raw.get("prompt"), {"completion": _turns(value, "assistant")})


def labeled(raw: Raw) -> Row:
    """Convert a demonstration with a ``label``: true or false, also as a number or text."""
    row = demonstration(raw)
    label = _LABELS.get(str(raw.get("label")).strip().lower())
    if label is None:
        raise DroppedError("label is not true or false")
    return {**row, "label": label}


def hh_turns(text: object) -> Messages:
    r"""Turns of a transcript as in HH-RLHF.

    A turn begins at "\n\nHuman:" or "\n\nAssistant:", and nowhere else.
    """
    if not isinstance(text, str):
        raise DroppedError("missing value" if text is None else "content is not text")
    head, *rest = _HH_TURN.split("\n\n" + text.lstrip())
    if head.strip() or not rest or rest[0] != "Human":
        raise DroppedError("not an HH transcript")
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": _HH_ROLES[name], "content": _text(turn.strip())} for name, turn in turns]


def _assemble(prompt: object, sides: Mapping[str, Messages]) -> Row:
    """Join a prompt and completions; ``sides`` may be whole conversations instead."""
    if any(not turns for turns in sides.values()):
        raise DroppedError("blank completion")
    if all(turns[0]["role"] != "assistant" for turns in sides.values()):
        prompt_turns, completions = _divide_conversations(prompt, sides)
    elif prompt is None:
        raise DroppedError("no prompt")
    else:
        prompt_turns, completions = _turns(prompt, "user"), dict(sides)
    _check_prompt(prompt_turns)
    for turns in completions.values():
        _check_completion(turns)
    return {"prompt": prompt_turns, **completions, "prompt_id": prompt_id(prompt_turns)}


def _divide_conversations(
    prompt: object, conversations: Mapping[str, Messages]
) -> tuple[Messages, dict[str, Messages]]:
    """The common beginning of conversations, and the last turn of each."""
    if any(turns[-1]["role"] != "assistant" for turns in conversations.values()):
        raise DroppedError("ends in a user turn")
    first, *others = conversations.values()
    n_shared, longest = 0, min(len(turns) for turns in conversations.values()) - 1
    while n_shared < longest and all(turns[n_shared] == first[n_shared] for turns in others):
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


def _turns(value: object, role: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": _text(value)}]
    if value is None:
        raise DroppedError("missing value")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DroppedError("content is not text")
    if any(turn.get("role") not in ROLES for turn in value):
        raise DroppedError("wrong roles")
    return [{"role": turn["role"], "content": _text(turn.get("content"))} for turn in value]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise DroppedError("content is not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, such as "\ud83d" in JSON
        raise DroppedError("content is not Unicode text") from None
    return value


def _check_prompt(prompt: Messages) -> None:
    if not prompt or not all(turn["content"].strip() for turn in prompt):
        raise DroppedError("blank prompt")
    roles = [turn["role"] for turn in prompt]
    roles = roles[1:] if roles[0] == "system" else roles
    if any(one == next_one for one, next_one in pairwise([*roles, "assistant"])):
        raise DroppedError("two turns in a row by one speaker")
    if not roles or "system" in roles or roles[0] != "user":
        raise DroppedError("wrong roles")


def _check_completion(turns: Messages) -> None:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise DroppedError("completion is not one assistant turn")
    if not turns[0]["content"].strip():
        raise DroppedError("blank completion")
