"""Types and identities of rows.

A prompt is an optional system turn, then user and assistant turns, ending in a user turn; a
completion is one assistant turn. Two prompts with the same normalized turns have the same
``prompt_id``, which decides duplicates and splits.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

Message = dict[str, str]
"""One turn of a conversation: ``{"role": ..., "content": ...}``."""
Messages = list[Message]
"""The turns of a conversation, in order."""
Row = dict[str, Any]
"""A checked row: ``prompt`` and completions as :data:`Messages`, ``prompt_id``, and further
columns."""
Raw = dict[str, Any]
"""A row as the source has it, unchecked."""

ROLES = ("system", "user", "assistant")
KINDS = ("pairs", "unpaired", "demonstrations")
"""Kinds of rows that a source can contain."""


class DroppedError(ValueError):
    """A raw row cannot be used.

    ``reason`` is what the data card counts; ``detail`` is what this row contains.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def normalize_text(text: str) -> str:
    r"""Fold differences that do not distinguish prompts: letter case, character width, white space.

    >>> normalize_text("  Write ONE\nsentence. ")
    'write one sentence.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_id(prompt: Messages) -> str:
    """Hash of the normalized turns of a prompt, as 16 hexadecimal digits."""
    turns = (f"{turn['role']}\x1f{normalize_text(turn['content'])}" for turn in prompt)
    return hashlib.blake2b("\x1e".join(turns).encode(), digest_size=8).hexdigest()


def conversation_id(row: Row) -> str:
    """Hash of the beginning of a row's prompt: all turns up to and including the first user turn.

    Of a prompt with one user turn, it is the ``prompt_id``.
    """
    prompt: Messages = row["prompt"]
    first = next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), len(prompt))
    is_whole = first + 1 >= len(prompt)
    conversation: str = row["prompt_id"] if is_whole else prompt_id(prompt[: first + 1])
    return conversation
