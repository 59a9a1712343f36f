"""What is known of a reward function from its source, without running it, before a launch.

A name that the source does not decide, such as one from ``import *`` or below a decorator, is
accepted here: ``align check`` and a run import the function before anything is trained.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from align.config.functions import ScoreFunction
from align.errors import UserError, did_you_mean
from align.rewards.functions import NAMED, SEARCHED, check_parameters, function_file, load_function

DYNAMIC = {"__getattr__", "globals", "exec", "setattr", "*"}
"""Names whose use means that a module may define more than its source shows."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters of a function by name, and those without a default."""

    parameters: tuple[str, ...]
    required: tuple[str, ...]


def missing_columns(function: ScoreFunction, columns: Collection[str]) -> list[str]:
    """Columns that a function requires and the prompts lack, as far as is known.

    ``columns`` are those of the prompts.

    Raises:
        UserError: There is no such reward function.
    """
    known = signature(function.address)
    return list(function.missing_columns(known.required if known else (), columns))


def signature(name: str) -> Signature | None:
    """The signature of ``module:function`` as its source has it; None if it does not decide it.

    Of a module that is imported already, it is that of the function itself.

    Raises:
        UserError: The module does not exist or is not Python, it has no such function, or the
            function has other parameters than a reward function.
    """
    module, _, attribute = name.partition(":")
    if module in sys.modules:
        return _loaded_signature(name)
    file = function_file(name)
    if file is None and ("." in module or importlib.util.find_spec(module) is None):
        raise UserError(f"{name}: cannot be imported: no module `{module}`; {SEARCHED}")
    if file is None or file.suffix != ".py":
        return None
    try:
        tree = ast.parse(file.read_bytes(), file.name)
    except (OSError, SyntaxError, ValueError) as error:
        kind = type(error).__name__
        raise UserError(f"{name}: cannot be imported: {kind}: {error}; {SEARCHED}") from None
    defined = dict(_definitions(tree.body))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if attribute not in defined:
        if DYNAMIC & (defined.keys() | used):
            return None
        hint = did_you_mean(attribute, defined)
        raise UserError(f"{name}: cannot be imported: {file} has no function `{attribute}`{hint}")
    node = defined[attribute]
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return None
    result = _signature(node.args)
    check_parameters(name, result.parameters)
    return result


def _loaded_signature(name: str) -> Signature:
    parameters = inspect.signature(load_function(name)).parameters
    required = [
        key
        for key, each in parameters.items()
        if each.default is inspect.Parameter.empty and each.kind in NAMED
    ]
    return Signature(tuple(parameters), tuple(required))


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """The names that statements define at the top level of a module, with their nodes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias
        else:
            for block in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, block, []))
            for branch in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                yield from _definitions(branch.body)
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id, part


def _signature(arguments: ast.arguments) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    n_required = len(positional) - len(arguments.defaults)
    required = [argument.arg for argument in positional[:n_required]]
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required += [argument.arg for argument, default in keyword_only if default is None]
    others = [*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return Signature(tuple(each.arg for each in others if each), tuple(required))
