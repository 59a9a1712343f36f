"""The layouts of ShareGPT, Alpaca and OpenAI are recognized by their columns, and shown as such."""

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

from align.data import layouts, statistics
from align.data.formats import demonstration
from align.data.rows import DroppedError
from align.errors import DataError


def turns(*pairs: str) -> list[dict[str, str]]:
    return [{"from": p.partition(": ")[0], "value": p.partition(": ")[2]} for p in pairs]


CALL = '{"name": "weather", "arguments": {"city": "Rom"}}'
STORED = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
GO = [system("Be brief."), user("Hi"), assistant("Hm?"), user("Go")]
PREFERRED = {"preferred_output": [assistant("A")], "non_preferred_output": [assistant("B")]}
SHARED = turns("human: Hi", "gpt: Hm?", "human: Go")
ROWS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("ShareGPT", {"conversations": [*SHARED, *turns("gpt: A")], "system": "Be brief."},
     "demonstrations", {"prompt": GO, "completion": [assistant("A")]}),
    ("ShareGPT, system turn", {"conversations": turns("system: Be brief.", "user: Hi", "bard: A")},
     "demonstrations", {"prompt": [GO[0], user("Hi")], "completion": [assistant("A")]}),
    ("ShareGPT, pairs", {"conversations": SHARED, "system": "Be brief.",
      "chosen": turns("gpt: A")[0], "rejected": turns("gpt: B")[0]},
     "pairs", {"prompt": GO, "chosen": [assistant("A")], "rejected": [assistant("B")]}),
    ("ShareGPT, labeled", {"conversations": turns("human: Hi", "gpt: A"), "kto_tag": True},
     "unpaired", {"prompt": [user("Hi")], "completion": [assistant("A")], "label": True}),
    ("ShareGPT, tools", {"conversations": turns("human: Hi", f"function_call: {CALL}",
      "observation: 21", "gpt: It is 21."), "tools": '[{"name": "weather"}]'},
     "demonstrations", {"completion": [assistant("It is 21.")], "prompt": [
         user("Hi") | {"tools": '[{"type": "function", "function": {"name": "weather"}}]'},
         assistant("") | {"tool_calls": [STORED]}, {"role": "tool", "content": "21"}]}),
    ("ShareGPT, a call at the end",
     {"conversations": turns("human: Hi", f"function_call: [{CALL}, {CALL}]")}, "demonstrations",
     {"prompt": [user("Hi")], "completion": [assistant("") | {"tool_calls": [STORED] * 2}]}),
    ("ShareGPT, parameters of a call", {"conversations": turns("human: Hi",
      'function_call: {"name": "weather", "parameters": {"city": "Rom"}}')}, "demonstrations",
     {"prompt": [user("Hi")], "completion": [assistant("") | {"tool_calls": [STORED]}]}),
    ("ShareGPT, third field", {"conversations": [t | {"weight": 1}
      for t in turns("human: Hi", "gpt: A")]},
     "demonstrations", {"prompt": [user("Hi")], "completion": [assistant("A")]}),
    ("ShareGPT, null role and null system turn", {"conversations": [
      t | {"role": None, "content": None, "value": t["value"] or None}
      for t in turns("system: ", "human: Hi", "gpt: A")]},
     "demonstrations", {"prompt": [user("Hi")], "completion": [assistant("A")]}),
    ("Alpaca, blank instruction", {"instruction": " ", "input": "1 + 2", "output": "3"},
     "demonstrations", {"prompt": [user("1 + 2")], "completion": [assistant("3")]}),
    ("Alpaca, no instruction", {"instruction": None, "input": "1 + 2", "output": "3"},
     "demonstrations", {"prompt": [user("1 + 2")], "completion": [assistant("3")]}),
    ("Alpaca", {"instruction": "Add.", "input": "1 + 2", "output": "3"},
     "demonstrations", {"prompt": [user("Add.\n\n1 + 2")], "completion": [assistant("3")]}),
    ("Alpaca, history", {"instruction": "Go", "input": "", "output": "A", "system": "Be brief.",
      "history": [["Hi", "Hm?"]]},
     "demonstrations", {"prompt": GO, "completion": [assistant("A")]}),
    ("Alpaca, pairs", {"instruction": "Hi", "chosen": "A", "rejected": "B"},
     "pairs", {"prompt": [user("Hi")], "chosen": [assistant("A")], "rejected": [assistant("B")]}),
    ("Alpaca, labeled", {"instruction": "Hi", "output": "A", "kto_tag": "true"},
     "unpaired", {"prompt": [user("Hi")], "completion": [assistant("A")], "label": True}),
    ("OpenAI", {"input": {"messages": GO, "tools": [], "parallel_tool_calls": True}, **PREFERRED},
     "pairs", {"prompt": GO, "chosen": [assistant("A")], "rejected": [assistant("B")]}),
    ("OpenAI, tools", {"input": {"messages": GO[3:], "tools": [{"name": "weather"}]}, **PREFERRED},
     "pairs", {"chosen": [assistant("A")], "rejected": [assistant("B")], "prompt": [
         GO[3] | {"tools": '[{"type": "function", "function": {"name": "weather"}}]'}]}),
    ("OpenAI, null tools and tools of the row", {"input": {"messages": GO[3:], "tools": None},
      "tools": [{"name": "weather"}], **PREFERRED},
     "pairs", {"prompt": [
         GO[3] | {"tools": '[{"type": "function", "function": {"name": "weather"}}]'}]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "kind", "expected"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_a_layout_is_recognized_and_shown(
    row: dict[str, Any], kind: str, expected: dict[str, Any], tmp_path: Path
):
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    data = prepared_whole(file)
    (read,) = training_rows(data, kind)
    assert {name: read[name] for name in expected} == expected
    assert "not_read" not in data.findings
    names = {"conversations": "ShareGPT", "instruction": "Alpaca", "preferred_output": "OpenAI"}
    layout = next(layout for name, layout in names.items() if name in row)
    (line,) = statistics.how_read(data.findings)
    assert line.startswith(f"recognized: {file} as {layout}, columns {{")


def test_fields_that_a_layout_does_not_read_are_shown(tmp_path: Path):
    speakers = [t | {"weight": None, "emotion": "glad"} for t in turns("human: Hi", "gpt: A")]
    own = [user("Hi") | {"from": "x"}, assistant("A") | {"from": "y"}]
    for row, name in (({"conversations": speakers}, "emotion"), ({"messages": own}, "from")):
        data = prepared_whole(write_jsonl(tmp_path / f"{name}.jsonl", [row]))
        names = [field for field in data.findings["not_read"] if field.startswith("field")]
        assert names == [f"field `{name}` of turns"]


def test_own_columns_and_column_maps_take_precedence(tmp_path: Path):
    row = {"prompt": "Hi", "completion": "A", "instruction": "x", "output": "y", "history": "z"}
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert training_rows(data, "demonstrations")[0]["prompt"] == [user("Hi")]
    assert "recognized" not in data.findings
    assert data.findings["not_read"].keys() == {
        "column `history`", "column `instruction`", "column `output`"
    }  # fmt: skip
    row = {"conversations": turns("human: Hi", "gpt: A"), "who": "Be brief."}
    data = prepared_whole(write_jsonl(tmp_path / "b.jsonl", [row]), columns={"system": "who"})
    assert training_rows(data, "demonstrations")[0]["prompt"] == [system("Be brief."), user("Hi")]


def test_a_mapped_input_is_no_part_of_the_prompt_too(tmp_path: Path):
    row = {"instruction": "Hi", "input": "Be brief.", "output": "A", "history": [["Go", "Hm?"]]}
    columns = {"prompt": "instruction", "completion": "output", "system": "input"}
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", [row]), columns=columns)
    (read,) = training_rows(data, "demonstrations")
    assert read["prompt"] == [system("Be brief."), user("Go"), assistant("Hm?"), user("Hi")]


def test_rows_of_the_layout_are_checked_as_others(tmp_path: Path):
    rows = [
        {"conversations": turns("human: Hi", "gpt: A")},
        {"conversations": turns("gpt: Welcome.", "human: Hi", "gpt: A")},
        {"conversations": turns("human: Hi")},
        {"conversations": turns("human: Hi", "narrator: A")},
        {"conversations": turns("human: Hi", "function_call: weather")},
    ]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))
    assert data.dropped == {
        "demonstrations: `function_call` is not JSON": 1,
        "demonstrations: ends in a user turn": 1,
        "demonstrations: begins with an assistant turn": 1,
        "demonstrations: wrong roles": 1,
    }


def test_rows_of_openai_are_checked_as_others(tmp_path: Path):
    tools = [{"name": "weather"}]
    named = [user("Hi") | {"emotion": "glad"}]
    rows = [
        {"input": {"messages": named}, **PREFERRED},
        {"input": {"messages": GO[3:], "tools": tools}, "tools": tools, **PREFERRED},
        {"input": {"turns": GO}, **PREFERRED},
        {"input": {"messages": GO[:3]}, **PREFERRED},
    ]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))
    assert data.dropped == {
        "pairs: `tools` next to `tools` of `input`": 1,
        "pairs: content is not text": 1,
        "pairs: two turns in a row by one speaker": 1,
    }
    assert data.findings["not_read"] == {"field `emotion` of turns": 1}


def test_a_system_turn_that_differs_from_the_column_is_dropped(tmp_path: Path):
    row = {"conversations": turns("system: Be kind.", "human: Hi", "gpt: A"), "system": "Be brief."}
    with pytest.raises(DataError, match="column `system` differs from the system turn"):
        prepared_whole(write_jsonl(tmp_path / "a.jsonl", [row]))


def test_a_history_of_another_form_is_no_conversation():
    assert layouts.history_turns(None) == []
    for history in ("Hi", [["Hi"]], [["Hi", None]]):
        with pytest.raises(DroppedError, match="`history` is not a list"):
            demonstration({"prompt": "a", "completion": "b", "history": history})
