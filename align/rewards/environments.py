"""Environments that a recipe names: import, the calls of ``reset`` and ``step``, and their checks.

An environment is a class without arguments, with two methods. One object plays one episode::

    class Environment:
        def reset(self, row): ...        # the messages that the policy answers
        def step(self, completion): ...  # messages, reward, whether the episode has ended

Imports no heavy library, so that ``align check`` plays the beginning of an episode in a second.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from align.config.online_rl_keys import ENVIRONMENTS
from align.errors import UserError
from align.rewards.containment import contained, working_directory_on_path
from align.rewards.functions import LARGEST_SCORE, SEARCHED

Message = dict[str, Any]
FIELDS = {"role", "content", "name", "tool_call_id", "tool_calls", "tools"}
"""Fields that a message may have."""
SHAPE = "`step` must return (messages, reward, done)"
SECONDS = 600.0
"""Longest time of a call."""
OVERTIME = "correct it, or set a time limit inside of it"


@dataclass(frozen=True, slots=True)
class Step:
    """The answer of an environment to a turn of the policy."""

    messages: list[Message]
    """Messages for the next turn; empty at the end."""
    reward: float
    ended: bool


@dataclass(frozen=True, slots=True)
class Environment:
    """The class of an environment, whose code may do anything."""

    name: str
    """Its name in the recipe."""
    new: type[Any]

    def reset(self, row: Mapping[str, Any], *, seed: int) -> tuple[Any, list[Message]]:
        """A new object for one episode, and the messages that it begins with.

        ``seed`` is passed on to a parameter of this name, from which an environment takes its
        random numbers.

        Raises:
            UserError: The code fails, or returns anything else.
        """
        place = f"{self.name}: `reset` of {_shown_row(row)}"
        repair = "it must return a list of messages"
        with contained(f"{place}: failed", repair, seconds=SECONDS, overtime=OVERTIME):
            episode = self.new()
            takes_seed = "seed" in inspect.signature(episode.reset).parameters
            options = {"seed": seed} if takes_seed else {}
            messages = episode.reset(copy.deepcopy(dict(row)), **options)
        messages = _messages(place, messages)
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            last = f"a message of the role `{messages[-1]['role']}`" if messages else "no message"
            raise UserError(
                f"{place}: returned {last} at the end, expected one of `user` or `tool`, which the "
                "policy answers"
            )
        return episode, messages

    def step(self, episode: Any, row: Mapping[str, Any], completion: str) -> Step:
        """The answer to a turn of the policy.

        Raises:
            UserError: The code fails, or returns anything else.
        """
        place = f"{self.name}: `step` with {completion!r:.80} in the episode of {_shown_row(row)}"
        with contained(f"{place}: failed", SHAPE, seconds=SECONDS, overtime=OVERTIME):
            result = episode.step(completion)
        if not isinstance(result, tuple | list) or len(result) != 3:
            raise UserError(f"{place}: returned {_shown(result)}; {SHAPE}")
        messages, reward, done = result
        if hasattr(done, "item"):
            done = done.item()  # of an array or a tensor
        if not isinstance(done, bool):
            raise UserError(f"{place}: `done` is {_shown(done)}, expected True or False; {SHAPE}")
        checked = [] if done else _messages(place, messages)
        wrong = [m["role"] for m in checked if m["role"] == "assistant"]
        if not done and (wrong or not checked):
            what = "a message of the role `assistant`" if wrong else "no messages"
            raise UserError(
                f"{place}: returned {what} although the episode continues; return messages of "
                "`tool` or `user`, which the policy answers, or end it with done = True"
            )
        return Step(checked, _reward(place, reward), done)


def load_environment(name: str) -> Environment:
    """Import an embedded environment, or the class ``module:Class``.

    Raises:
        UserError: It cannot be imported, or is no class with both methods.
    """
    module, _, attribute = ENVIRONMENTS.get(name, name).partition(":")
    place = f"{name}: cannot be imported"
    with (
        working_directory_on_path(),
        contained(place, SEARCHED, seconds=SECONDS, overtime=OVERTIME),
    ):
        new = getattr(importlib.import_module(module), attribute, None)
    if new is None:
        raise UserError(f"{place}: the module `{module}` has no class `{attribute}`; {SEARCHED}")
    if not inspect.isclass(new):
        raise UserError(f"{name}: expected a class, got {_shown(new)}; {SEARCHED}")
    missing = [method for method in ("reset", "step") if not callable(getattr(new, method, None))]
    if missing:
        raise UserError(
            f"{name}: the class has no method `{missing[0]}`; define `reset(self, row)`, which "
            "returns messages, and `step(self, completion)`, which returns (messages, reward, done)"
        )
    return Environment(name, new)


def _reward(place: str, value: object) -> float:
    """A reward as a number, which is finite in single precision."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of an array or a tensor
    number = math.nan
    if isinstance(value, Real):
        with contextlib.suppress(OverflowError):  # a large whole number
            number = float(value)
    if not abs(number) <= LARGEST_SCORE:  # true for NaN
        raise UserError(
            f"{place}: the reward is {_shown(value)}; expected a finite number, at most "
            f"{LARGEST_SCORE:g} in size; {SHAPE}"
        )
    return number


def _messages(place: str, value: object) -> list[Message]:
    """Messages of the user's code, as the tables store them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{place}: expected a list of messages, got {_shown(value)}")
    return [_message(place, message, k) for k, message in enumerate(value)]


def _message(place: str, value: object, index: int) -> Message:
    which = f"{place}: message {index + 1}"
    if not isinstance(value, Mapping):
        raise UserError(f"{which} is {_shown(value)}; expected {{'role': …, 'content': …}}")
    message = dict(value)
    if message.get("role") not in ("system", "user", "assistant", "tool"):
        raise UserError(
            f"{which} has the role {message.get('role')!r:.40}; allowed are `system`, `user`, "
            "`assistant` and `tool`"
        )
    if not isinstance(message.get("content"), str):
        raise UserError(
            f"{which} has the content {_shown(message.get('content'))}; expected a text"
        )
    if unknown := message.keys() - FIELDS:
        raise UserError(
            f"{which} has the field `{min(map(str, unknown))}`; allowed are "
            f"{', '.join(f'`{field}`' for field in sorted(FIELDS))}"
        )
    if "tools" in message and not isinstance(message["tools"], str):
        message["tools"] = json.dumps(message["tools"], ensure_ascii=False)
    return message


def _shown_row(row: Mapping[str, Any]) -> str:
    """The last text of a row's prompt, by which it can be found."""
    prompt = row.get("prompt")
    return f"the row {prompt[-1]['content']!r:.60}" if prompt else "a row"


def _shown(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"
