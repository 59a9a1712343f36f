"""A JSON file with a list of objects, read one object at a time."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from align.data.file_limits import MAX_ROW, ExpansionLimit, Problems
from align.data.rows import Raw
from align.errors import DataError

CHUNK = 2**16  # bytes read at once
_SPACE = " \t\n\r"


def read_json_list(path: Path, stream: IO[bytes] | gzip.GzipFile) -> Iterator[Raw]:
    """Objects of a file that contains one JSON list.

    Raises:
        DataError: The file is malformed, or contains anything else.
    """
    text = _JsonText(path, stream)
    if text.next_character() != "[":
        value = text.take_value()
        text.check_end()
        names = (
            ", ".join(f"`{name}`" for name in list(value)[:5]) if isinstance(value, dict) else ""
        )
        content = f" with the keys {names}; write only the list of rows" if names else ""
        raise DataError(f"{path}: expected a list of objects, got {json_type(value)}{content}")
    text.take("[")
    problems, number = Problems(path), 0
    while text.next_character() != "]" or number:
        number += 1
        row = text.take_value()
        if isinstance(row, dict):
            yield row
        else:
            problems.add(f"{path}: row {number}: expected an object, got {json_type(row)}")
        if text.next_character() != ",":
            break
        text.take(",")
    text.take("]")
    text.check_end()
    problems.raise_any()


class _JsonText:
    """Text of a file, decoded as far as it is needed."""

    def __init__(self, path: Path, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._path, self._stream = path, stream
        self._limit = ExpansionLimit(path)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._position, self._line = "", 0, 1

    def next_character(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self._position < len(self._text):
                if self._text[self._position] not in _SPACE:
                    return self._text[self._position]
                self._position += 1
            if not self._read_more():
                return ""

    def take(self, character: str) -> None:
        """Skip a character that must come next."""
        if self.next_character() != character:
            raise self._error(f"Expecting {character!r}", self._position)
        self._position += 1

    def take_value(self) -> Any:
        """The next JSON value."""
        self.next_character()
        while True:
            try:
                value, self._position = self._json.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if len(self._text) - self._position > MAX_ROW:
                    reason = f"{json_reason(error)}, or a row of more than {MAX_ROW // 2**20} MiB"
                    raise self._error(reason, error.pos) from None
                if not self._read_more():
                    raise self._error(json_reason(error), error.pos) from None
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self._path}: unreadable JSON: {json_limit(error)}") from None
            else:
                return value

    def check_end(self) -> None:
        """Check that nothing follows."""
        if self.next_character():
            repair = "a file with one object per line is JSONL: name it .jsonl"
            raise self._error(f"Extra data; {repair}", self._position)

    def _read_more(self) -> bool:
        """Read as many bytes again as are waiting, so that a long value is parsed few times."""
        chunk = self._stream.read(max(CHUNK, len(self._text) - self._position))
        self._limit.add(len(chunk))
        try:
            decoded = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            place = f"{self._path}:{self._line_of(len(self._text))}"
            raise DataError(f"{place}: not UTF-8; save it as UTF-8") from None
        self._line = self._line_of(self._position)
        self._text, self._position = self._text[self._position :] + decoded, 0
        return bool(chunk)

    def _line_of(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)

    def _error(self, reason: str, position: int) -> DataError:
        return DataError(f"{self._path}:{self._line_of(position)}: not JSON: {reason}")


def json_type(value: object) -> str:
    """Name of the type of a JSON value, with its article."""
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def json_reason(error: json.JSONDecodeError) -> str:
    """Message of Python's parser, without the "at" that some of them end in."""
    return error.msg.removesuffix(" at").removesuffix(" starting")


def json_limit(error: Exception) -> str:
    """Limit of Python's parser that valid JSON exceeds: its depth, or 4,300 digits."""
    return "nested too deep" if isinstance(error, RecursionError) else "an integer is too long"
