"""Files of completions: JSONL with ``prompt`` and ``completion`` in each row."""

from __future__ import annotations

from pathlib import Path

from align.data.annotations import InvalidRowError, as_completion, as_prompt
from align.data.file_limits import Problems
from align.data.files import read_file
from align.data.rows import prompt_id
from align.errors import DataError


def read_completions(file: Path) -> dict[str, list[str]]:
    """The completions of each prompt, by :func:`align.data.rows.prompt_id`, in file order.

    Raises:
        DataError: The file is unreadable, has no rows or wrong values.
    """
    completions: dict[str, list[str]] = {}
    problems = Problems(file)
    number = 0
    for number, row in enumerate(read_file(file), 1):
        try:
            key = prompt_id(as_prompt(row, "prompt"))
            completions.setdefault(key, []).append(as_completion(row, "completion"))
        except InvalidRowError as error:
            problems.add(f"{file}: row {number}: {error}")
    problems.raise_any()
    if number == 0:
        raise DataError(f"{file}: has no rows; write a `prompt` and a `completion` in each")
    return completions
