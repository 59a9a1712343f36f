r"""Transcripts as in HH-RLHF: turns that begin at "\n\nHuman:" or "\n\nAssistant:".

A source has whole transcripts as ``chosen`` and ``rejected``, or their common beginning as
``prompt`` and only the last turns as the other two.
"""

from __future__ import annotations

import re

from align.data.rows import DroppedError, Messages, Raw

ANSWER = "\n\nAssistant:"
"""Beginning of a turn of the assistant."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def begins_transcript(text: object) -> bool:
    """Whether a value is a text that begins with a turn of a person."""
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def reads_prompt(raw: Raw) -> bool:
    """Whether the prompt of a pair is the beginning of a transcript in one of its sides."""
    return any(whole_transcript(raw, side) is not raw.get(side) for side in ("chosen", "rejected"))


def turns_of_transcript(text: str) -> Messages:
    r"""Turns of a transcript.

    A turn begins at "\n\nHuman:" or "\n\nAssistant:", and nowhere else.

    Raises:
        DroppedError: The text does not begin with a turn of a person.
    """
    head, *rest = _TURN.split("\n\n" + text.lstrip())
    if head.strip() or not rest or rest[0] != "Human":
        raise DroppedError("not an HH transcript")
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [{"role": _ROLES[name], "content": turn.strip()} for name, turn in turns]


def whole_transcript(raw: Raw, side: str) -> object:
    """The whole transcript of a side of a pair, whose beginning may be in the prompt."""
    text, prompt = raw.get(side), raw.get("prompt")
    if isinstance(text, str) and begins_transcript(prompt) and not begins_transcript(text):
        return f"{prompt}{text}"
    return text
