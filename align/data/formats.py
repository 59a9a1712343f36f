"""Formats: a raw row to a conversational row, or the reason to drop it.

A prompt is an optional system turn, then user and assistant turns in alternation, ending in a user
turn; a completion is one assistant turn. Plain text becomes one turn. Whole conversations, and the
transcripts of HH-RLHF, are divided where their common beginning ends. The columns of a part decide
the kind of all its rows: pairs, demonstrations or labeled completions. Not supported: tool calls,
images, the names of ShareGPT.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from align.config.data import FORMATS, REQUIRED_COLUMNS, columns_read
from align.data.rows import ROLES, DroppedError, Messages, Raw, Row, prompt_id
from align.data.sources import Part
from align.errors import DataError, did_you_mean, nearest

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_FORMATS = (("chosen", "rejected"),)
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "completion": ("response", "answer", "output"),
    "chosen": ("preferred", "winner", "better", "best", "good", "accepted", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "worst", "bad", "response_rejected"),
    "messages": ("conversations", "conversation", "dialogue", "turns"),
}

# Rows


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


# Columns


def kind_of_part(part: Part, reader: str, columns: Mapping[str, str]) -> str:
    """Kind of the rows that a reader makes of a part."""
    return "pairs" if reader in REQUIRED_COLUMNS else kind_of(columns_of(part, columns))


def kind_of(names: Iterable[str]) -> str:
    """Kind of the rows with these columns; empty if the columns fit no kind."""
    names = set(names)
    if {"chosen", "rejected"} <= names:
        return "pairs"
    if {"prompt", "completion"} <= names or "messages" in names:
        return "unpaired" if "label" in names else "demonstrations"
    return ""


def columns_of(part: Part, columns: Mapping[str, str] | None = None) -> list[str]:
    """Columns at the head of a part, renamed by ``columns``."""
    names = dict.fromkeys(name for row in part.head for name in row)
    return list(rename_columns(names, columns or {}))


def rename_columns(raw: Raw, columns: Mapping[str, str]) -> Raw:
    """Rename columns by a map from Align's names to those of the source.

    A renamed column is not available under its old name.
    """
    if not columns:
        return raw
    renamed = {own: raw[name] for own, name in columns.items() if name in raw}
    taken = {columns[own] for own in renamed}
    return {name: value for name, value in raw.items() if name not in taken} | renamed


def check_column_map(reader: str, columns: Mapping[str, str]) -> None:
    """Check the keys of ``columns`` for a reader, before the source is read.

    Raises:
        DataError: A key is not a column that the reader uses, or one column is mapped twice.
    """
    known = columns_read(reader)
    problems = [
        f"columns: {own}: not a column of `reader: {reader}`{nearest(own, known)}"
        for own in columns
        if own not in known
    ]
    problems += [
        f"columns: `{name}` is mapped twice; keep one of the two keys"
        for name, count in Counter(columns.values()).items()
        if count > 1
    ]
    if problems:
        raise DataError(*problems)


def check_columns(parts: list[Part], reader: str, columns: Mapping[str, str]) -> None:
    """Check the columns of all parts of a source.

    Raises:
        DataError: One line for each part, or each key of ``columns``, that lacks a column.
    """
    parts = [part for part in parts if part.head]
    names = list(dict.fromkeys(name for part in parts for name in columns_of(part)))
    problems = []
    for own, name in columns.items():
        if names and name not in names:
            hint = did_you_mean(name, names) or f"; found {_quoted(names)}"
            problems.append(f"columns: {{{own}: {name}}}: no column `{name}`{hint}")
    if problems:
        raise DataError(*problems)
    for part in parts:
        if reader in REQUIRED_COLUMNS:
            problems += _public_problems(part, reader, columns)
        elif reader == "hh":
            problems += _transcript_problems(part, columns)
        else:
            problems += _column_problems(part, columns)
    if problems:
        raise DataError(*problems)


def _public_problems(part: Part, reader: str, columns: Mapping[str, str]) -> list[str]:
    names = columns_of(part, columns)
    missing = [name for name in REQUIRED_COLUMNS[reader] if name not in names]
    if not missing:
        return []
    return [
        f"{part.name}: no column {_quoted(missing)}, required by `reader: {reader}`;"
        f" found {_quoted(names)}; map it with `columns: {{{missing[0]}: ...}}`"
    ]


def _transcript_problems(part: Part, columns: Mapping[str, str]) -> list[str]:
    names = columns_of(part, columns)
    return [] if kind_of(names) else [_missing_columns(part.name, names, _HH_FORMATS)]


def _column_problems(part: Part, columns: Mapping[str, str]) -> list[str]:
    names = columns_of(part, columns)
    rows = [rename_columns(raw, columns) for raw in part.head]
    if "chosen" in names and _is_transcript(rows[0]):
        return [f"{part.name}: the rows are whole transcripts; read them with `reader: hh`"]
    kind = kind_of(names)
    has_prompt = "prompt" in names or any(isinstance(row.get("chosen"), list) for row in rows)
    if not kind or (kind == "pairs" and not has_prompt):
        return [_missing_columns(part.name, names, FORMATS)]
    return []


def _is_transcript(row: Raw) -> bool:
    return str(row.get("prompt") or row.get("chosen")).startswith("\n\nHuman:")


def _missing_columns(part: str, names: list[str], formats: tuple[tuple[str, ...], ...]) -> str:
    """Message for missing columns, for the format that the columns are nearest to."""

    def missing(format: tuple[str, ...]) -> dict[str, str | None]:
        others = [name for name in names if name not in format]
        return {own: _nearest_column(own, others) for own in format if own not in names}

    def distance(format: tuple[str, ...]) -> tuple[int, int]:
        absent = missing(format)
        return list(absent.values()).count(None), len(absent) - len(format)

    best = min(formats, key=distance)
    if distance(best) == (len(best), 0):
        return (
            f"{part}: found {_quoted(names)}; expected {' or '.join(map(_quoted, formats))};"
            f" map them with `columns: {{{formats[0][0]}: ...}}`"
        )
    absent = missing(best)
    column_map = ", ".join(f"{own}: {name or '...'}" for own, name in absent.items())
    pairs = "" if "chosen" in best else f" (pairs have {_quoted(FORMATS[0])})"
    return (
        f"{part}: no column {_quoted(absent)}; found {_quoted(names)};"
        f" map it with `columns: {{{column_map}}}`{pairs}"
    )


def _nearest_column(own: str, names: list[str]) -> str | None:
    names = [name for name in names if name != "id" and not name.endswith("_id")]
    alike = [name for name in names if name in _SYNONYMS.get(own, ()) or own in name]
    return next(iter(alike or difflib.get_close_matches(own, names, n=1)), None)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
