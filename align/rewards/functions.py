"""Reward functions that a recipe names as ``module:function``: import, signature check and call.

Imports no heavy library: ``align plan`` finds the file of a function without running it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.machinery import all_suffixes
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError, counted
from align.runtime import artifacts, signals

if TYPE_CHECKING:
    from align.models.tokenization import Message

LOGGER = logging.getLogger("align.rewards")
Score = Callable[..., Sequence[float | None]]
LARGEST_SCORE = 1e15
"""Squares of larger scores, summed over a batch, could overflow single precision."""
SECONDS_UNTIL_WARNING = 120.0
SEARCHED = "modules are searched in the working directory and in installed packages"


@contextlib.contextmanager
def _watched(name: str) -> Iterator[None]:
    """Log a warning if a reward function does not return, because a run would only seem to stop."""
    message = "%s: the reward function has not returned after %.0f seconds; the run waits for it"
    timer = threading.Timer(
        SECONDS_UNTIL_WARNING, LOGGER.warning, (message, name, SECONDS_UNTIL_WARNING)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def load_function(name: str) -> Score:
    """Import the function ``module:function`` from the working directory or an installed package.

    It is called with ``prompts`` (lists of messages), ``completions`` (texts) and, by name, those
    columns of the prompts' table that are among its parameters. All of them are lists with one
    entry per completion. It returns one finite number per completion.

    Raises:
        UserError: The module or function cannot be imported, or has other parameters.
    """
    module, _, attribute = name.partition(":")
    with _working_directory_on_path(), _contained(f"{name}: cannot be imported", SEARCHED):
        function = getattr(importlib.import_module(module), attribute)
    if not callable(function) or inspect.iscoroutinefunction(function):
        kind = "async function" if callable(function) else type(function).__name__
        raise UserError(f"{name}: expected a function, got {kind}")
    parameters: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(ValueError):  # a builtin has none
        parameters = inspect.signature(function).parameters
    check_parameters(name, parameters)
    return function


def check_parameters(name: str, parameters: Collection[str]) -> None:
    """Check that a function takes prompts and completions.

    Raises:
        UserError: It takes other parameters.
    """
    if not {"prompts", "completions"} <= set(parameters):
        raise UserError(
            f"{name}: its parameters are {', '.join(parameters) or 'empty'}; define it as "
            "`def score(prompts, completions, **columns)`, returning a list of numbers"
        )


def function_file(name: str) -> Path | None:
    """The file of ``module:function``; None if there is none. Nothing is imported."""
    module = name.partition(":")[0]
    if module in sys.modules:  # may be the running script or notebook, which has no spec
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if file else None
    package, *below = module.split(".")
    with _working_directory_on_path():
        try:
            spec = importlib.util.find_spec(package)  # of `a.b`, it would import `a`
        except (ValueError, AttributeError):
            return None
    if spec is None:
        return None
    if not below:
        return Path(spec.origin) if spec.origin and spec.has_location else None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *below)
        files = [path / "__init__.py"]
        files += [path.with_name(path.name + suffix) for suffix in all_suffixes()]
        existing = next((file for file in files if file.is_file()), None)
        if existing is not None:
            return existing
    return None


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
    result = _returned(name, score, prompts, completions, columns)
    return [
        _number(name, value, completion)
        for value, completion in zip(result, completions, strict=True)
    ]


def judge(
    name: str,
    score: Score,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Call a reward function as a judge, which may return None or NaN: it has no score then.

    Raises:
        UserError: The function returns anything else but numbers.
    """
    result = _returned(name, score, prompts, completions, columns)
    return [
        math.nan if _is_missing(value) else _number(name, value, completion)
        for value, completion in zip(result, completions, strict=True)
    ]


def _is_missing(value: object) -> bool:
    """Whether a value is None, or NaN in any library."""
    return value is None or bool(getattr(value, "shape", ()) == () and value != value)


def _returned(
    name: str,
    score: Score,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Sequence[object]:
    """What a function returns: one value per completion."""
    parameters = inspect.signature(score).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    # Copies: the function may change its arguments.
    options = {key: list(v) for key, v in columns.items() if takes_all or key in parameters}
    messages = [[{**message} for message in prompt] for prompt in prompts]
    with _contained(f"{name}: failed", "a reward function must return"), _watched(name):
        result = score(prompts=messages, completions=list(completions), **options)
    if hasattr(result, "tolist"):  # an array or a tensor
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise UserError(
            f"{name}: expected a list of numbers, got {_shown(result)}; return a list of numbers"
        )
    if len(result) != len(completions):
        raise UserError(
            f"{name}: {counted(len(result), 'score')} for"
            f" {counted(len(completions), 'completion')}; return one for each"
        )
    return result


def _number(name: str, value: object, completion: str) -> float:
    """A score as a number that is finite in single precision, as the policy is trained on it."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of an array or a tensor
    if value is None:
        raise UserError(
            f"{name}: the score of {completion!r:.80} is None; a reward is a number for every "
            "completion, so a verifier needs a usable reference answer in every row"
        )
    if not isinstance(value, Real):
        raise UserError(
            f"{name}: the score of {completion!r:.80} is {_shown(value)}; return a list of numbers"
        )
    try:
        number = float(value)
    except OverflowError:  # a large whole number
        number = math.inf
    if not abs(number) <= LARGEST_SCORE:  # true for NaN
        raise UserError(
            f"{name}: the score of {completion!r:.80} is {number}; scores must be finite, at most "
            f"{LARGEST_SCORE:g} in size"
        )
    return number


def _shown(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.80}"


class _ExitError(Exception):
    """The function would have ended the process."""


@contextlib.contextmanager
def _contained(place: str, repair: str) -> Iterator[None]:
    """Turn whatever the user's code does instead of returning into a ``UserError``.

    It may raise anything, exit, or change the working directory, on which relative paths depend.
    """
    process, directory, exit_process = os.getpid(), Path.cwd(), os._exit

    def refuse(status: int) -> None:
        if os.getpid() != process:
            exit_process(status)  # a process that the user's code has forked
        raise _ExitError(f"os._exit({status})")

    os._exit = refuse  # type: ignore[assignment]
    try:
        yield
    except signals.Interrupted:
        raise
    except BaseException as error:
        pressed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if isinstance(error, KeyboardInterrupt) and pressed:
            raise  # Ctrl-C in a program that uses the Python API
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].removeprefix(
            "_ExitError: "
        )
        where = f" (line {frame.lineno} of {frame.filename})" if frame.lineno else ""
        raise UserError(f"{place}: {reason}{where}; {repair}") from error
    finally:
        os._exit = exit_process
        os.chdir(directory)


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
