"""Calls of tools and their results: which of them contradict each other.

The APIs of OpenAI and Mistral refuse a conversation with a result for an unknown call, with more
results than calls, or with a call whose result is missing; chat templates write all of them without
an error. A row with such a fault is dropped. What may be right is reported instead: one result for
several calls without ids (ShareGPT has one turn for all), results in another order, and every
result behind a turn without calls, because a source may write a call into the text or the reasoning
of a turn in any notation (ReAct, a command in a code block).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from align.data.rows import UNTRAINED, DroppedError, Message, Messages, calls_of


class _Exchange(NamedTuple):
    """A turn of the assistant with results behind it, and the place of both in the conversation."""

    turn: Message
    number: int
    results: Messages


def check_results(turns: Messages) -> list[str]:
    """Check the results of tools; return what is unusual in them, as nouns.

    Raises:
        DroppedError: A result answers no call, or a call has no result.
    """
    unusual: dict[str, None] = {}
    for exchange in _exchanges(turns):
        calls = calls_of(exchange.turn)
        if not calls:
            unusual["a result behind a turn without `tool_calls`, whose text may contain them"] = (
                None
            )
            continue
        unanswered = _unanswered(exchange)
        has_ids = all("tool_call_id" in result for result in exchange.results)
        if unanswered and has_ids and all("id" in call for call in calls):
            raise DroppedError("tool calls without results", _of_call(exchange, unanswered[0]))
        if unanswered:
            unusual["fewer results than calls, without ids"] = None
        elif not has_ids and len(calls) > 1 and any("id" in call for call in calls):
            unusual["results without the ids of several calls, matched by their order"] = None
        names = {call["function"]["name"] for call in calls}
        if any("name" in result and result["name"] not in names for result in exchange.results):
            unusual["a result with the name of another function than its call"] = None
    return list(unusual)


def check_declared(tools: str, turns: Sequence[Message]) -> None:
    """Check that the functions which a conversation calls are among its tools.

    ``tools`` is their JSON text. Turns that are excluded from training may call others.

    Raises:
        DroppedError: A turn calls another function.
    """
    names = _declared_names(tools)
    for number, turn in enumerate(turns, 1):
        for call in calls_of(turn):
            name = call["function"]["name"]
            if name not in names and not turn.get(UNTRAINED):
                detail = f"turn {number} (assistant): `{name[:40]}`; `tools` has {_quoted(names)}"
                raise DroppedError("call of a function that is not in `tools`", detail)


@functools.lru_cache(maxsize=64)
def _declared_names(tools: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tool["function"]["name"] for tool in json.loads(tools)))


def _exchanges(turns: Messages) -> Iterator[_Exchange]:
    """The turns of the assistant behind which there are results."""
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            end = index + 1
            while end < len(turns) and turns[end]["role"] == "tool":
                end += 1
            if end > index + 1:
                yield _Exchange(turn, index + 1, turns[index + 1 : end])


def _unanswered(exchange: _Exchange) -> list[dict[str, Any]]:
    """The calls of a turn that have no result; results without a known id are in their order."""
    calls = calls_of(exchange.turn)
    pending, unmatched = list(calls), 0
    for number, result in enumerate(exchange.results, exchange.number + 1):
        call_id = result.get("tool_call_id")
        if call_id is None or not all("id" in call for call in calls):
            unmatched += 1
            continue
        matching = [call for call in pending if call["id"] == call_id]
        if not matching:
            known = _quoted([call["id"] for call in pending]) or "none"
            detail = f"turn {number} (tool): `{call_id[:40]}`; calls without a result: {known}"
            raise DroppedError("result of a tool for an unknown call", detail)
        pending.remove(matching[0])
    if unmatched > len(pending):
        counts = f"{len(exchange.results)} results of {len(calls)} calls"
        detail = f"turn {exchange.number + len(exchange.results)} (tool): {counts}"
        raise DroppedError("result of a tool without a call", detail)
    return pending[unmatched:]


def _of_call(exchange: _Exchange, call: dict[str, Any]) -> str:
    name = call["function"]["name"][:40]
    return f"turn {exchange.number} (assistant): call `{call['id'][:40]}` of `{name}`"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name[:40]}`" for name in names[:8])
