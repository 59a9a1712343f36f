"""data.rows"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

Raw = dict[str, Any]


class DroppedError(ValueError):
    """The reason why a raw row is not usable."""


Messages = list[dict[str, str]]
Row = dict[str, Any]
ROLES = ("system", "user", "assistant")


def normalize_text(text: str) -> str:
    r"""Fold what does not make a prompt another prompt: letter case, width, white space.

    >>> normalise("  Write ONE\nsentence. ")
    'write one sentence.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_id(prompt: Messages) -> str:
    """Hash the normalised turns of a prompt to 16 hex digits."""
    turns = (f"{turn['role']}\x1f{normalize_text(turn['content'])}" for turn in prompt)
    return hashlib.blake2b("\x1e".join(turns).encode(), digest_size=8).hexdigest()


def conversation_id(prompt: Messages) -> str:
    """The identity of a prompt's beginning: all up to the first user's turn."""
    first = next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), len(prompt))
    return prompt_id(prompt[: first + 1])
