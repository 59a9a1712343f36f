"""Reward functions that a recipe names as ``module:function``: import, signature check and call.

Imports no heavy library: ``align plan`` finds the file of a function without running it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.runtime import artifacts

if TYPE_CHECKING:
    from align.models.tokenization import Message

Score = Callable[..., Sequence[float]]


def load_function(name: str) -> Score:
    """Import the function ``module:function`` from the working directory or an installed package.

    It is called with ``prompts`` (lists of messages), ``completions`` (texts) and, by name, those
    columns of the prompts' table that are among its parameters. All of them are lists with one
    entry per completion. It returns one finite number per completion.

    Raises:
        UserError: The module or function cannot be imported, or has other parameters.
    """
    module, _, attribute = name.partition(":")
    with _working_directory_on_path():
        try:
            function = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # the user's module may raise anything
            raise UserError(
                f"{name}: cannot be imported: {type(error).__name__}: {error}; modules are "
                "searched in the working directory and in installed packages"
            ) from error
    if not callable(function):
        raise UserError(f"{name}: expected a function, got {type(function).__name__}")
    parameters = inspect.signature(function).parameters
    if not {"prompts", "completions"} <= parameters.keys():
        raise UserError(
            f"{name}: its parameters are {', '.join(parameters) or 'empty'}; define it as "
            "`def score(prompts, completions, **columns)`, returning a list of numbers"
        )
    return function


def missing_columns(name: str, columns: Collection[str]) -> list[str]:
    """Required parameters of a function that are not among ``columns``."""
    parameters = inspect.signature(load_function(name)).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [
        p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in kinds
    ]
    return [column for column in required if column not in {"prompts", "completions", *columns}]


def function_file(name: str) -> Path | None:
    """The file of ``module:function``, without importing it; None if there is none."""
    module = name.partition(":")[0]
    with _working_directory_on_path():
        try:
            spec = importlib.util.find_spec(module)
            file = spec.origin if spec is not None else None
        except ValueError:  # a module without a spec: the running script or notebook
            file = getattr(sys.modules.get(module), "__file__", None)
        except Exception:  # find_spec runs the parent package; errors are reported by the call
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
    """Call a reward function and check its result: one finite number per completion.

    Raises:
        UserError: The function returns anything else.
    """
    parameters = inspect.signature(score).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = {key: value for key, value in columns.items() if takes_all or key in parameters}
    result = score(prompts=prompts, completions=completions, **options)
    try:
        scores = [float(value) for value in result]
    except (TypeError, ValueError):
        raise UserError(
            f"{name}: expected a list of numbers, got {result!r:.80}; return a list of numbers"
        ) from None
    if len(scores) != len(completions):
        raise UserError(
            f"{name}: {len(scores)} scores for {len(completions)} completions; return one for each"
        )
    invalid = next((i for i, value in enumerate(scores) if not math.isfinite(value)), None)
    if invalid is not None:
        raise UserError(
            f"{name}: the score of {completions[invalid]!r} is {scores[invalid]}; scores must be "
            "finite"
        )
    return scores


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
