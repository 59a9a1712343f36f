"""Errors caused by invalid user input, and the wording of their messages.

A message names the place, what was found, what is allowed and the repair.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

_UNPRINTABLE = re.compile(  # control characters, of directions of text too, and half pairs
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Replace characters that a terminal would obey by their escape sequences.

    Newlines and tabs stay. Everything that prints text from data or file names uses this function.

    >>> printable("\x1b[31mred\x1b[0m")
    '\\x1b[31mred\\x1b[0m'
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class UserError(ValueError):
    """Invalid input: one line per problem. A command prints the lines and exits with code 2."""

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(printable, lines))
        super().__init__(*self.lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class RecipeError(UserError):
    """Invalid recipe, override or command-line option."""


class DataError(UserError):
    """Invalid, missing or unsuitable data: a source, a table, a row."""


class ArtifactError(UserError):
    """A stage's folder is damaged, cannot be created, or does not fit this run."""


class Problems:
    """The user errors of several checks, which are raised as one."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def add(self, line: str) -> None:
        """Add an error."""
        self.errors.append(UserError(line))

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keep a user error that is raised inside."""
        try:
            yield
        except UserError as error:
            self.errors.append(error)

    def raise_any(self) -> None:
        """Raise what was collected: a single error itself, of several each line once.

        Raises:
            UserError: At least one error was collected.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = (line for error in self.errors for line in error.lines)
            raise UserError(*dict.fromkeys(lines))


MOST_LISTED = 15  # known words in a message
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?\Z")


def mismatch(expected: str, value: object, text: str | None) -> str:
    """Message for a value of the wrong type, with the repair if there is a usual one.

    ``text`` is the value as written in the YAML file, if known.

    >>> mismatch("a number", "5e-7", "5e-7")
    "expected a number, got the text '5e-7' (YAML reads 5e-7 as text: write 5.0e-7)"
    """
    message = f"expected {expected}, got {shown(value)}"
    if isinstance(value, bool) and text is not None and text.lower() not in ("true", "false"):
        return (
            f"expected {expected}, got {text}, which YAML reads as {str(value).lower()}: "
            f"write '{text}' in quotes"
        )
    if expected == "a list" and isinstance(value, str) and value:
        return f"{message} (a list of one item is written [{value}])"
    if "number" in expected and isinstance(value, str) and NUMBER.match(value.strip()):
        if "e" in value.lower():
            mantissa, exponent = value.strip().lower().split("e")
            mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
            exponent = exponent if exponent[0] in "+-" else f"+{exponent}"
            return f"{message} (YAML reads {value} as text: write {mantissa}e{exponent})"
        return f"{message} (write it without quotes)"
    return message


def shown(value: object) -> str:
    """Format a value for a message; long text is shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) < 80 else f"the text {value[:77]!r}…"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return str(value)


def counted(count: int, noun: str) -> str:
    """A number with its noun: ``1 score``, ``2 scores``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean `beta`?`` for the most similar known word; empty if none is similar.

    >>> did_you_mean("env", ["n_envs", "environment_options", "environment"])
    '; did you mean `environment`?'
    """
    similar = most_similar(word, known)
    return f"; did you mean `{similar}`?" if similar else ""


def most_similar(word: str, known: Iterable[str]) -> str | None:
    """The most similar known word; None if none is similar.

    A word that begins with the given one is preferred.
    """
    known = list(known)
    longer = [each for each in known if len(word) > 2 and each.startswith(word)]
    similar = [min(longer, key=len)] if longer else difflib.get_close_matches(word, known, n=1)
    return similar[0] if similar else None


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean `beta`?`` for a similar known word, or else the known words.

    Of many known words, those with the most letters in common are listed.

    >>> nearest("steps", (f"key{n}" for n in range(20)))[:30]
    '; known: key0, key1, key2, key'
    """
    known = list(known)
    if len(known) > MOST_LISTED:
        ratios = {each: difflib.SequenceMatcher(None, word, each).ratio() for each in known}
        listed = sorted(known, key=lambda each: -ratios[each])[:MOST_LISTED]
        more = f" and {len(known) - MOST_LISTED} more (docs/reference/configuration.md)"
    else:
        listed, more = known, ""
    return did_you_mean(word, known) or f"; known: {', '.join(listed)}{more}"


def not_installed(package: str, requirement: str) -> str:
    """The error about a missing package: ``requirement`` is the argument of ``pip install``.

    >>> not_installed("gguf", "-e '.[gguf]'")
    "gguf is not installed: pip install -e '.[gguf]'"
    """
    return f"{package} is not installed: pip install {requirement}"
