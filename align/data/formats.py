"""Readers: the raw row of a source in, a conversational row or the reason to drop it out.

A prompt is an optional system turn, then user and assistant in turn, ending in a user turn; a
completion is one assistant turn. Plain text becomes one turn. Whole conversations, and the
transcripts of HH-RLHF, are cut where their common beginning ends. What a part of a source holds
is read off its columns, once for all its rows. Left out: tool calls, images, ShareGPT's names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from align.config.data import FORMATS, REQUIRED_COLUMNS
from align.data.rows import ROLES, DroppedError, prompt_id
from align.data.sources import Part, Raw
from align.errors import UserError, nearest

if TYPE_CHECKING:
    from align.data.rows import Messages, Row


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "completion": ("response", "answer", "output"),
    "chosen": ("preferred", "winner", "better", "best", "good", "accepted", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "worst", "bad", "response_rejected"),
    "messages": ("conversations", "conversation", "dialogue", "turns"),
}


def kind_read(names: Iterable[str], reader: str) -> str:
    """Say which kind of rows a reader makes of a part with these columns."""
    return "pairs" if reader in REQUIRED_COLUMNS else kind_of(names)


def pair(raw: Raw, *, reader: str = "columns") -> Row:
    """Read a raw row as a pair, or raise :class:`DroppedError` with the reason."""
    if reader == "hh":
        sides = {side: hh_turns(raw.get(side)) for side in ("chosen", "rejected")}
        row = _assemble(None, sides)
    else:
        sides = {side: _turns(raw.get(side), "assistant") for side in ("chosen", "rejected")}
        row = _assemble(raw.get("prompt"), sides)
    if row["chosen"][0]["content"].strip() == row["rejected"][0]["content"].strip():
        raise DroppedError("chosen equals rejected")
    return row


def demonstration(raw: Raw) -> Row:
    """Read a raw row as a demonstration; of ``messages`` the last turn is the completion."""
    value = raw.get("completion") if "completion" in raw else raw.get("messages")
    if "completion" not in raw and isinstance(value, str):
        raise DroppedError("messages are not a list")
    return _assemble(raw.get("prompt"), {"completion": _turns(value, "assistant")})


def labeled(raw: Raw) -> Row:
    """Read a raw row as a completion with a label, true or false."""
    row = demonstration(raw)
    label = _LABELS.get(str(raw.get("label")).strip().lower())
    if label is None:
        raise DroppedError("label is not true or false")
    return {**row, "label": label}


def hh_turns(text: object) -> Messages:
    r"""Read a transcript as in HH-RLHF; a turn begins at "\n\nHuman:" or "\n\nAssistant:" alone."""
    if not isinstance(text, str):
        raise DroppedError("missing value" if text is None else "content is not text")
    head, *rest = _HH_TURN.split("\n\n" + text.lstrip())
    if head.strip() or not rest or rest[0] != "Human":
        raise DroppedError("not an HH transcript")
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": _HH_ROLES[who], "content": _text(said.strip())} for who, said in turns]


def columns_of(part: Part, columns: Mapping[str, str] | None = None) -> list[str]:
    """List the columns at the head of a part, under the names that ``columns`` gives them."""
    names = dict.fromkeys(name for row in part.head for name in row)
    return list(rename_columns(names, columns or {}))


def rename_columns(raw: Raw, columns: Mapping[str, str]) -> Raw:
    """Give a row our names, by a map ``{ours: theirs}``; a mapped column keeps no second name."""
    if not columns:
        return raw
    mapped = {ours: raw[theirs] for ours, theirs in columns.items() if theirs in raw}
    taken = {columns[ours] for ours in mapped}
    return {name: value for name, value in raw.items() if name not in taken} | mapped


def kind_of(names: Iterable[str]) -> str:
    """Say which kind of rows the columns make: empty if they make none."""
    names = set(names)
    if {"chosen", "rejected"} <= names:
        return "pairs"
    if {"prompt", "completion"} <= names or "messages" in names:
        return "unpaired" if "label" in names else "demonstrations"
    return ""


def check_columns(parts: list[Part], reader: str, columns: Mapping[str, str]) -> None:
    """Raise what the columns of the parts lack, for all parts at once."""
    parts = [part for part in parts if part.head]
    names = list(dict.fromkeys(name for part in parts for name in columns_of(part)))
    wrong: list[str] = []
    for ours, theirs in columns.items():
        if names and theirs not in names:
            hint = nearest(theirs, names, only_near=True) or f"; found {_ticked(names)}"
            wrong.append(f"columns: {{{ours}: {theirs}}}: no column `{theirs}`{hint}")
    if wrong:
        raise UserError(*wrong)
    for part in parts:
        found = columns_of(part, columns)
        row = rename_columns(part.head[0], columns)
        if reader in REQUIRED_COLUMNS:
            lacks = [name for name in REQUIRED_COLUMNS[reader] if name not in found]
            if lacks:
                wrong.append(
                    f"{part.name}: no column {_ticked(lacks)}, which `reader: {reader}` needs;"
                    f" found {_ticked(found)}; map it with `columns: {{{lacks[0]}: ...}}`"
                )
        elif reader == "columns" and "chosen" in found and _is_transcript(row):
            wrong.append(f"{part.name}: these are whole transcripts; read them with `reader: hh`")
        elif not kind_of(found) or (
            kind_of(found) == "pairs"
            and reader == "columns"
            and "prompt" not in found
            and not any(
                isinstance(rename_columns(raw, columns).get("chosen"), list) for raw in part.head
            )
        ):
            wrong.append(_missing(part.name, found, reader))
    if wrong:
        raise UserError(*wrong)


def _is_transcript(row: Raw) -> bool:
    return str(row.get("prompt") or row.get("chosen")).startswith("\n\nHuman:")


def _missing(name: str, found: list[str], reader: str) -> str:
    """Word what is missing, for the format that the columns come nearest to."""

    def lacking(wanted: tuple[str, ...]) -> dict[str, str | None]:
        left = [theirs for theirs in found if theirs not in wanted]
        return {ours: _nearest(ours, left) for ours in wanted if ours not in found}

    def far(wanted: tuple[str, ...]) -> tuple[int, int]:
        lacks = lacking(wanted)
        return list(lacks.values()).count(None), len(lacks) - len(wanted)

    formats = (("chosen", "rejected"),) if reader == "hh" else FORMATS
    best = min(formats, key=far)
    lacks = lacking(best)
    if far(best) == (len(best), 0):
        return (
            f"{name}: found {_ticked(found)}; needed {' or '.join(map(_ticked, formats))};"
            f" map them with `columns: {{{formats[0][0]}: ...}}`"
        )
    given = ", ".join(f"{ours}: {theirs or '...'}" for ours, theirs in lacks.items())
    pairs = "" if "chosen" in best else f" (pairs have {_ticked(FORMATS[0])})"
    return (
        f"{name}: no column {_ticked(lacks)}; found {_ticked(found)};"
        f" map it with `columns: {{{given}}}`{pairs}"
    )


def _nearest(ours: str, names: list[str]) -> str | None:
    names = [name for name in names if name != "id" and not name.endswith("_id")]
    alike = [name for name in names if name in _SYNONYMS.get(ours, ()) or ours in name]
    return next(iter(alike or difflib.get_close_matches(ours, names, n=1)), None)


def _ticked(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _assemble(given: object, sides: Mapping[str, Messages]) -> Row:
    """Join a prompt and completions, or take the common beginning of whole conversations."""
    if any(not turns for turns in sides.values()):
        raise DroppedError("blank completion")
    if all(turns[0]["role"] != "assistant" for turns in sides.values()):
        if any(turns[-1]["role"] != "assistant" for turns in sides.values()):
            raise DroppedError("ends in a user turn")
        first, *others = sides.values()
        shared, longest = 0, min(len(turns) for turns in sides.values()) - 1
        while shared < longest and all(turns[shared] == first[shared] for turns in others):
            shared += 1
        if shared == 0 and longest:
            raise DroppedError("transcripts share no beginning")
        if any(len(turns) != shared + 1 for turns in sides.values()):
            raise DroppedError("transcripts part before the last turn")
        prompt, sides = first[:shared], {side: turns[shared:] for side, turns in sides.items()}
        # beside whole conversations a column `prompt` only repeats one of their turns
        repeated = [turn["content"] for turn in _turns(given, "user")] if given else []
        if not set(repeated) <= {turn["content"] for turn in prompt}:
            raise DroppedError("prompt is not in the transcripts")
    elif given is None:
        raise DroppedError("no prompt")
    else:
        prompt = _turns(given, "user")
    _check_prompt(prompt)
    for turns in sides.values():
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DroppedError("completion is not one assistant turn")
        if not turns[0]["content"].strip():
            raise DroppedError("blank completion")
    return {"prompt": prompt, **sides, "prompt_id": prompt_id(prompt)}


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
    except UnicodeEncodeError:  # half a surrogate pair, as "\ud83d" in JSON
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
