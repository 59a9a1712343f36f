"""Results that answer no call, calls without a result, and calls of undeclared functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.preference_data import (
    assistant,
    prepared_whole,
    system,
    training_rows,
    user,
    write_jsonl,
)

from align.data import statistics
from align.data.formats import demonstration, labeled, pair
from align.data.rows import DroppedError
from align.data.tool_results import check_results

Turn = dict[str, Any]
TOOLS = [{"name": "add"}, {"name": "sub"}]


def calls(*ids: str | None, name: str = "add", text: str = "") -> Turn:
    """A turn that calls a function once for each id; None is a call without an id."""
    made = [{"id": i, "type": "function", "function": {"name": name, "arguments": {}}} for i in ids]
    return {**assistant(text), "tool_calls": made}


def result(call_id: str | None = None, **fields: str) -> Turn:
    return {"role": "tool", "content": "3", **({"tool_call_id": call_id} if call_id else fields)}


def conversation(*turns: Turn) -> dict[str, Any]:
    return {"messages": [user("q"), *turns, assistant("y")]}


UNKNOWN = "result of a tool for an unknown call"
NO_CALL = "result of a tool without a call"
NO_RESULT = "tool calls without results"
DROPPED: list[tuple[str, dict[str, Any], str, str]] = [
    ("the id of no call", conversation(calls("a"), result("x")), UNKNOWN,
     "turn 3 (tool): `x`; calls without a result: `a`"),
    ("the id of an earlier call", conversation(calls("a"), result("a"), calls("b"), result("a")),
     UNKNOWN, "turn 5 (tool): `a`; calls without a result: `b`"),
    ("one id twice", conversation(calls("a", "b"), result("a"), result("a")), UNKNOWN,
     "turn 4 (tool): `a`; calls without a result: `b`"),
    ("a third result", conversation(calls("a"), result("a"), result("a")), UNKNOWN,
     "turn 4 (tool): `a`; calls without a result: none"),
    ("one of two results", conversation(calls("a", "b"), result("b")), NO_RESULT,
     "turn 2 (assistant): call `a` of `add`"),
    ("no result before the next turn", conversation(calls("a"), user("z"), assistant("b"),
     user("c")), NO_RESULT, "roles: user, assistant, user, assistant, user"),
    ("more results than calls", conversation(calls(None), result(), result()), NO_CALL,
     "turn 4 (tool): 2 results of 1 calls"),
    ("more results than calls, some with ids", conversation(calls("a", "b"), result("a"), result(),
     result()), NO_CALL, "turn 5 (tool): 3 results of 2 calls"),
    ("a result without a turn before it", conversation(result()), NO_CALL,
     "roles: user, tool"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason", "detail"), [c[1:] for c in DROPPED], ids=[c[0] for c in DROPPED]
)
def test_a_result_without_its_call_or_a_call_without_its_result_is_dropped(
    row: dict[str, Any], reason: str, detail: str, tmp_path: Path
):
    with pytest.raises(DroppedError) as error:
        demonstration(row)
    assert (error.value.reason, error.value.detail) == (reason, detail)
    good = conversation(calls("a"), result("a"))
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", [good, row]))
    assert data.dropped_examples == {f"demonstrations: {reason}": f"row 2: {detail}"}


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({**conversation(calls("a"), result("x")), "system": "s"}, "turn 3 (tool)"),
        ({"messages": [system(""), *conversation(calls("a"), result("x"))["messages"]]},
         "turn 4 (tool)"),
        ({"messages": [user("q"), assistant(" "), user("z"), assistant("y")], "system": "s"},
         "turn 2 (assistant)"),
        ({"messages": [system(" "), user(" "), assistant("y")]}, "turn 2 (user)"),
        ({"messages": [system(" "), assistant("y")]}, "it has no turn"),
    ],
)  # fmt: skip
def test_a_turn_has_its_number_in_the_file_also_with_a_system_turn(
    row: dict[str, Any], detail: str
):
    with pytest.raises(DroppedError) as error:
        demonstration(row)
    assert error.value.detail.split(":")[0] == detail


BEHIND_TEXT = "a result behind a turn without `tool_calls`, whose text may contain them"
FEWER = "fewer results than calls, without ids"
IN_ORDER = "results without the ids of several calls, matched by their order"
OTHER_NAME = "a result with the name of another function than its call"
KEPT: list[tuple[str, tuple[Turn, ...], list[str]]] = [
    ("ids in another order", (calls("a", "b"), result("b"), result("a")), []),
    ("no id, one call", (calls("a"), result()), []),
    ("no ids at all", (calls(None, None), result(), result()), []),
    ("ids of results only", (calls(None), result("a")), []),
    ("equal ids", (calls("0", "0"), result("0"), result("0")), []),
    ("ids again in a later turn", (calls("0"), result("0"), calls("0"), result("0")), []),
    ("no ids of several calls", (calls("a", "b"), result("b"), result()), [IN_ORDER]),
    ("one result for several calls", (calls(None, None), result()), [FEWER]),
    ("one result without an id", (calls("a", "b"), result()), [FEWER]),
    ("a call in the text", (assistant("<tool_call>…</tool_call>"), result()), [BEHIND_TEXT]),
    ("a call of ReAct in the text", (assistant("Thought: I look it up.\nAction: search\nAction Input:"
     " paris"), result()), [BEHIND_TEXT]),
    ("a command in the text", (assistant("```bash\nls -la\n```"), result()), [BEHIND_TEXT]),
    ("a call in the reasoning", ({**assistant("I look."), "reasoning_content": "call search(x)"},
     result()), [BEHIND_TEXT]),
    ("no call that can be recognized", (assistant("t"), result("a")), [BEHIND_TEXT]),
    ("the name of another function", (calls("a"), result(name="sub")), [OTHER_NAME]),
    ("the name of its function", (calls("a"), result(name="add")), []),
]  # fmt: skip


@pytest.mark.parametrize(("turns", "unusual"), [c[1:] for c in KEPT], ids=[c[0] for c in KEPT])
def test_what_may_be_right_is_kept_and_reported(
    turns: tuple[Turn, ...], unusual: list[str], tmp_path: Path
):
    row = conversation(*turns)
    assert check_results(demonstration(row)["prompt"]) == unusual
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", [conversation(), row, row | {"id": 1}]))
    assert len(training_rows(data, "demonstrations")) == 2  # the third is a duplicate
    lines = [line for line in statistics.how_read(data.findings) if "unusual" in line]
    assert lines == [f"unusual in 2 rows: {name} (first: row 2)" for name in unusual]


def test_a_call_may_be_the_last_turn():
    row = {"messages": [user("q"), calls("a", "b")], "tools": TOOLS}
    assert len(demonstration(row)["completion"][0]["tool_calls"]) == 2


def test_a_call_of_a_function_that_is_not_declared_is_dropped_where_it_would_be_trained():
    bad, good = calls("a", name="mul"), calls("a", name="sub")
    reason = "call of a function that is not in `tools`"
    detail = "turn {} (assistant): `mul`; `tools` has `add`, `sub`"
    asked: dict[str, Any] = {"prompt": "q", "tools": TOOLS, "system": "s"}
    in_prompt: dict[str, Any] = {"messages": [user("q"), bad, result("a"), assistant("y")]}
    cases: list[tuple[Any, dict[str, Any], int]] = [
        (demonstration, {**asked, "completion": [bad]}, 2),
        (demonstration, {**in_prompt, "tools": TOOLS}, 2),
        (demonstration, {**in_prompt, "tools": TOOLS, "system": "s"}, 2),
        (demonstration, {"messages": [system(" "), *in_prompt["messages"]], "tools": TOOLS}, 3),
        (pair, {**asked, "chosen": [bad], "rejected": [good]}, 2),
        (labeled, {**asked, "completion": [bad], "label": True}, 2),
        (labeled, {**in_prompt, "tools": TOOLS, "label": False}, 2),
    ]
    for read, row, number in cases:
        with pytest.raises(DroppedError) as error:
            read(row)
        assert (error.value.reason, error.value.detail) == (reason, detail.format(number))
    kept: list[tuple[Any, dict[str, Any]]] = [
        (pair, {**asked, "chosen": [good], "rejected": [bad]}),
        (labeled, {**asked, "completion": [bad], "label": False}),
        (demonstration, in_prompt),  # without tools
        (demonstration, {"messages": [system("s"), user("q"), {**bad, "weight": 0}, result("a"),
                                      assistant("y")], "tools": TOOLS}),
    ]  # fmt: skip
    for read, row in kept:
        read(row)
