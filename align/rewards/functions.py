"""Python functions that a recipe names as rewards, ``module:function``: found, called, and their answers checked.

Light: planning asks for a function's file without importing anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.runtime import artifacts

Message = dict[str, str]
Score = Callable[..., Sequence[float]]


def load_function(name: str) -> Score:
    """The function ``module:function``; modules are looked for in the working directory as well.

    It is called with ``prompts`` (lists of messages), ``completions`` (texts) and, by name, the columns of the prompts'
    rows, each a list with an entry a completion; it returns a finite number for each.

    Raises:
        UserError: There is no such module or function, or it cannot take that.
    """
    module, _, attribute = name.partition(":")
    with _working_directory_on_path():
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # the module is the user's, and runs as it is imported
            raise UserError(
                f"{name}: cannot be had: {type(error).__name__}: {error}; a module lies in the working directory or is "
                "installed"
            ) from error
    if not callable(found):
        raise UserError(f"{name}: no function, but {type(found).__name__}")
    takes = inspect.signature(found).parameters
    if not {"prompts", "completions"} <= takes.keys():
        raise UserError(
            f"{name}: it takes {', '.join(takes) or 'nothing'}; a reward function is written "
            "`def score(prompts, completions, **columns)` and returns a list of numbers"
        )
    return found


def missing_columns(name: str, columns: Collection[str]) -> list[str]:
    """Columns that a function cannot do without and that are not there."""
    takes = inspect.signature(load_function(name)).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in takes if p.default is inspect.Parameter.empty and p.kind in named]
    return [each for each in needed if each not in {"prompts", "completions", *columns}]


def function_file(name: str) -> Path | None:
    """The file of ``module:function``, found without importing the module; None if there is none."""
    module = name.partition(":")[0]
    with _working_directory_on_path():
        try:
            spec = importlib.util.find_spec(module)
            file = spec.origin if spec is not None else None
        except (
            ValueError
        ):  # a module without a spec, such as the script or notebook that is running
            file = getattr(sys.modules.get(module), "__file__", None)
        except (
            Exception
        ):  # finding a submodule imports its package, whose code may fail; loading reports it
            return None
    return Path(file) if file else None


def source_digest(name: str) -> str | None:
    """Digest of the source of ``module:function``; None if it has none.

    The source is the file of the module, or the function itself in a notebook.
    """
    file = function_file(name)
    if file is not None and file.is_file():
        return artifacts.digest_files([file])
    module, _, attribute = name.partition(":")
    try:
        return artifacts.digest(inspect.getsource(getattr(sys.modules[module], attribute)))
    except (KeyError, AttributeError, OSError, TypeError):
        return None


def call(
    name: str,
    score: Score,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Scores by a function, checked: one finite number a completion.

    Raises:
        UserError: Anything else came back.
    """
    takes = inspect.signature(score).parameters
    every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    given = {key: value for key, value in columns.items() if every or key in takes}
    answer = score(prompts=prompts, completions=completions, **given)
    try:
        found = [float(value) for value in answer]
    except (TypeError, ValueError):
        raise UserError(f"{name}: returned {answer!r:.80}; return a list of numbers") from None
    if len(found) != len(completions):
        raise UserError(f"{name}: {len(found)} scores for {len(completions)} completions")
    wrong = next((i for i, value in enumerate(found) if not math.isfinite(value)), None)
    if wrong is not None:
        raise UserError(
            f"{name}: the score {found[wrong]} for {completions[wrong]!r}; scores are finite"
        )
    return found


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
