"""Reward functions that a recipe names as ``module:function``: import, signature check and call.

Imports no heavy library: ``align plan`` finds the file of a function without running it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.functions import ScoreFunction
from align.errors import UserError, counted, not_installed
from align.rewards.containment import contained, working_directory_on_path
from align.runtime import artifacts

if TYPE_CHECKING:
    from align.models.tokenization import Message

Score = Callable[..., Sequence[float | None]]
LARGEST_SCORE = 1e15
"""Squares of larger scores, summed over a batch, could overflow single precision."""
SECONDS = 600.0
"""Longest time of an import or a call, if the recipe sets no other."""
SEARCHED = "modules are searched in the working directory and in installed packages"
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_function(name: str) -> Score:
    """Import the function ``module:function`` from the working directory or an installed package.

    It is called with ``prompts`` (lists of messages), ``completions`` (texts) and, by name, those
    columns of the prompts' table that are among its parameters. All of them are lists with one
    entry per completion. It returns one finite number per completion.

    Raises:
        UserError: The module or function cannot be imported, or has other parameters.
    """
    module, _, attribute = name.partition(":")
    place = f"{name}: cannot be imported"
    with working_directory_on_path(), contained(place, SEARCHED, seconds=SECONDS):
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


def check_package(config: ScoreFunction) -> None:
    """Check that the package that a built-in function needs is installed.

    Raises:
        UserError: It is not.
    """
    if config.package is not None and importlib.util.find_spec(config.package[0]) is None:
        raise UserError(f"{config.function}: {not_installed(*config.package)}")


def function_file(name: str) -> Path | None:
    """The file of ``module:function``; None if there is none. Nothing is imported."""
    module = name.partition(":")[0]
    if module in sys.modules:  # may be the running script or notebook, which has no spec
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if file else None
    package, *below = module.split(".")
    with working_directory_on_path():
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


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Completions that a function scores: one prompt, text and value of each column a row."""

    prompts: Sequence[Sequence[Message]]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.completions)

    def row(self, i: int) -> ScoredRows:
        """One of the rows."""
        columns = {key: [values[i]] for key, values in self.columns.items()}
        return ScoredRows([self.prompts[i]], [self.completions[i]], columns)

    def place(self, i: int) -> str:
        """The completion of a row, for error messages."""
        prompt = self.prompts[i][-1].get("content") if self.prompts[i] else ""
        return f"{self.completions[i]!r:.80} (row {i + 1} of {len(self)}, prompt {prompt!r:.80})"


def call(
    config: ScoreFunction,
    function: Score,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Call a reward function and check its result: one finite number per completion.

    Raises:
        UserError: The function returns anything else.
    """
    rows = ScoredRows(prompts, completions, config.columns(columns, len(completions)))
    result = _returned(config, function, rows)
    return [_number(config.function, value, rows.place(i)) for i, value in enumerate(result)]


def judge(
    config: ScoreFunction,
    function: Score,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """Call a reward function as a judge, which may return None or NaN: it has no score then.

    Raises:
        UserError: The function returns anything else but numbers.
    """
    rows = ScoredRows(prompts, completions, config.columns(columns, len(completions)))
    return [
        math.nan if _is_missing(value) else _number(config.function, value, rows.place(i))
        for i, value in enumerate(_returned(config, function, rows))
    ]


def _is_missing(value: object) -> bool:
    """Whether a value is None, or NaN in any library."""
    return value is None or bool(getattr(value, "shape", ()) == () and value != value)


def _returned(config: ScoreFunction, function: Score, rows: ScoredRows) -> Sequence[object]:
    """What a function returns: one value per completion."""
    try:
        return _called(config.function, function, rows, config.timeout_seconds)
    except UserError as error:
        raise UserError(f"{error}{_failing_row(config, function, rows)}") from error


def _failing_row(config: ScoreFunction, function: Score, rows: ScoredRows) -> str:
    """The first row that fails alone, for the end of an error message.

    A row has its share of the time limit, at least one second.
    """
    if len(rows) == 1:
        return f"; it failed with {rows.place(0)}"
    seconds = max(1.0, config.timeout_seconds / max(len(rows), 1))
    for i in range(len(rows)):
        try:
            _called(config.function, function, rows.row(i), seconds)
        except UserError:
            return f"; it fails with {rows.place(i)}"
    return f"; it fails with {counted(len(rows), 'row')} together and with none of them alone"


def _called(name: str, function: Score, rows: ScoredRows, seconds: float) -> Sequence[object]:
    """What one call of a function returns: a list with one value per completion."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    # Copies: the function may change its arguments.
    options = {k: list(v) for k, v in rows.columns.items() if takes_all or k in parameters}
    messages = [[{**message} for message in prompt] for prompt in rows.prompts]
    with contained(f"{name}: failed", "a reward function must return", seconds=seconds):
        result = function(prompts=messages, completions=list(rows.completions), **options)
        if hasattr(result, "tolist"):  # an array or a tensor
            result = result.tolist()
    if not isinstance(result, list | tuple):
        raise UserError(
            f"{name}: expected a list of numbers, got {_shown(result)}; return a list of numbers"
        )
    if len(result) != len(rows):
        raise UserError(
            f"{name}: {counted(len(result), 'score')} for"
            f" {counted(len(rows), 'completion')}; return one for each"
        )
    return result


def _number(name: str, value: object, place: str) -> float:
    """A score as a number that is finite in single precision, as the policy is trained on it."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of an array or a tensor
    if value is None:
        raise UserError(
            f"{name}: the score of {place} is None; a reward is a number for every "
            "completion, so a verifier needs a usable reference answer in every row"
        )
    if not isinstance(value, Real):
        raise UserError(
            f"{name}: the score of {place} is {_shown(value)}; return a list of numbers"
        )
    try:
        number = float(value)
    except OverflowError:  # a large whole number
        number = math.inf
    if not abs(number) <= LARGEST_SCORE:  # true for NaN
        raise UserError(
            f"{name}: the score of {place} is {number}; scores must be finite, at most "
            f"{LARGEST_SCORE:g} in size"
        )
    return number


def _shown(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.80}"
