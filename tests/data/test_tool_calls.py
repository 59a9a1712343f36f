"""Tools, tool calls and reasoning: read in every usual layout, stored in one, never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.preference_data import (
    PAIR,
    assistant,
    prepared_whole,
    run_prepare,
    system,
    training_rows,
    user,
    write_jsonl,
)

from align.config.data import Prepare
from align.data import dataset_dict, statistics, tables
from align.data.annotations import InvalidRowError, as_completion, as_prompt
from align.data.decontamination import user_texts
from align.data.formats import demonstration, labeled, pair
from align.data.rows import DroppedError, prompt_id, turn_text

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
TOOLS = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
STORED = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
CALL = {**assistant(""), "tool_calls": [STORED]}
RESULT = {"role": "tool", "content": "21"}


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rom"}'}}]},
        {
            "tool_calls": [
                {"function": {"name": "weather", "arguments": {"city": "Rom", "day": None}}}
            ]
        },
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Rom"}}], "content": None},
        {"tool_calls": '[{"name": "weather", "arguments": {"city": "Rom"}}]'},
        {"tool_calls": ['{"name": "weather", "arguments": {"city": "Rom"}}']},
        {"function_call": {"name": "weather", "arguments": '{"city":"Rom"}'}, "tool_calls": None},
        {"tool_calls": [{"name": "weather", "args": {"city": "Rom"}, "type": "tool_call"}]},
        {"tool_calls": [{"name": "weather", "parameters": {"city": "Rom"}, "arguments": None}]},
        {
            "tool_calls": [
                {"function": None, "index": 0, "name": "weather", "args": '{"city":"Rom"}'}
            ]
        },
    ],
    ids=[
        "text",
        "object with a null of Parquet",
        "flat",
        "JSON",
        "list of JSON",
        "older name",
        "LangChain",
        "Llama",
        "both forms in Parquet",
    ],
)
def test_every_layout_of_a_call_is_stored_as_one(turn: dict[str, Any]):
    turn = {"role": "assistant", "content": "", **turn}
    assert demonstration({"messages": [user("Hi"), turn]})["completion"] == [CALL]
    assert pair({"prompt": "Hi", "chosen": [turn], "rejected": "No."})["chosen"] == [CALL]
    assert labeled({"prompt": "Hi", "completion": [turn], "label": 1})["completion"] == [CALL]


def test_a_call_keeps_its_id_and_the_null_in_a_text():
    function = {"name": "f", "arguments": '{"a": null, "b": "ü"}'}
    call = {"id": "x1", "type": "function", "function": function}
    row = demonstration({"messages": [user("Hi"), {**assistant("Wait."), "tool_calls": [call]}]})
    assert row["completion"][0]["tool_calls"] == [call]


def test_the_id_of_a_call_may_be_zero():
    turns = [{**CALL, "tool_calls": [{**STORED, "id": 0}]}, {**RESULT, "tool_call_id": 0}]
    row = demonstration({"messages": [user("Hi"), *turns, assistant("A")]})
    assert row["prompt"][1]["tool_calls"][0]["id"] == row["prompt"][2]["tool_call_id"] == "0"


def test_json_text_keeps_its_nulls_and_objects_lose_those_of_parquet():
    function = {"name": "f", "parameters": {"properties": {"x": {"default": None}}}}
    tool = {"type": "function", "function": function}
    tools = json.dumps([tool])
    calls = json.dumps([{"name": "f", "arguments": {"x": None}}])
    turns = [user("Hi"), {**assistant(""), "tool_calls": calls}]
    row = demonstration({"messages": turns, "tools": tools})
    assert row["prompt"][0]["tools"] == tools
    call = row["completion"][0]["tool_calls"][0]
    assert call["function"]["arguments"] == '{"x": null}'
    turns = [user("Hi"), {**assistant(""), "tool_calls": json.loads(calls)}]
    row = demonstration({"messages": turns, "tools": [tool]})
    assert "null" not in json.dumps(row)


def test_call_ids_distinguish_neither_transcripts_nor_prompts():
    def turns(first: str, second: str, answer: str) -> list[dict[str, Any]]:
        calls = [{**STORED, "id": first}, {**STORED, "id": second}]
        results = [{**RESULT, "tool_call_id": first}, {**RESULT, "tool_call_id": second}]
        return [user("Hi"), {**CALL, "tool_calls": calls}, *results, assistant(answer)]

    row = pair({"chosen": turns("a1", "a2", "A"), "rejected": turns("b1", "b2", "B")})
    other = demonstration({"messages": turns("b1", "b2", "B")})
    assert (row["prompt"], row["prompt_id"]) == (turns("a1", "a2", "A")[:-1], other["prompt_id"])
    question, calls, first, second = other["prompt"]
    assert prompt_id([question, calls, second, first]) != other["prompt_id"]


@pytest.mark.parametrize(
    "text", ["<think>\nwhy\n</think>\n\n4", "why\n</think>\n\n4", "<think></think>4", "4"]
)
def test_reasoning_that_a_turn_has_twice_is_kept_once(text: str):
    turn = {**assistant(text), "reasoning_content": "why\n"}
    row = demonstration({"messages": [user("2+2?"), turn]})
    assert row["completion"] == [{**assistant("4"), "reasoning_content": "why\n"}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(name: str):
    row = demonstration({"messages": [user("2+2?"), {**assistant("4"), name: " two and two"}]})
    assert row["completion"] == [{**assistant("4"), "reasoning_content": " two and two"}]


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [{"type": "function", "function": WEATHER}]},
        {"tools": json.dumps([WEATHER])},
        {"functions": [{**WEATHER, "description": None}]},
        {"tools": [json.dumps(WEATHER)]},
        {"tools": WEATHER},
    ],
)
def test_tools_belong_to_the_first_turn_and_to_the_identity_of_a_prompt(columns: dict[str, Any]):
    row = pair({**PAIR, "system": "Be brief.", **columns})
    tools = row["prompt"][0].pop("tools")
    assert json.loads(tools) == [{"type": "function", "function": WEATHER}]
    assert row["prompt"] == [system("Be brief."), user("Say a word.")]
    assert row["prompt_id"] != prompt_id(row["prompt"])


def test_results_of_tools_are_turns_of_a_prompt():
    calls = {**assistant(""), "tool_calls": [STORED, STORED]}
    turns = [user("Hi"), calls, {**RESULT, "tool_call_id": "1", "name": "weather"}, RESULT]
    row = demonstration({"messages": [*turns, assistant("It is 21.")]})
    assert row["prompt"] == turns
    older = {"role": "function", "name": "weather", "content": "21"}
    row = demonstration({"messages": [user("Hi"), CALL, older, assistant("It is 21.")]})
    assert row["prompt"][2] == {**RESULT, "name": "weather"}
    sides = {"chosen": [*turns, assistant("A")], "rejected": [*turns, CALL]}
    assert pair(sides)["rejected"] == [CALL]


def test_two_calls_of_one_function_differ_by_their_arguments():
    other = {"name": "weather", "arguments": {"city": "Oslo"}}
    row = pair({"prompt": "Hi", "chosen": [CALL], "rejected": [{**CALL, "tool_calls": [other]}]})
    assert row["rejected"][0]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    with pytest.raises(DroppedError, match="chosen equals rejected"):
        pair({"prompt": "Hi", "chosen": [CALL], "rejected": [CALL]})


CASES: list[tuple[str, dict[str, Any]]] = [
    ("`tools` is not JSON", {"tools": "[{", **PAIR}),
    ("`tools` is not a list of functions", {"tools": [3], **PAIR}),
    ("`tools` next to `functions`", {"tools": [WEATHER], "functions": [WEATHER], **PAIR}),
    ("tool calls without results", {"messages": [user("a"), CALL, user("b"), assistant("c")]}),
    ("result of a tool without a call", {"messages": [user("a"), RESULT, assistant("c")]}),
    ("result of a tool without an answer",
     {"messages": [user("a"), CALL, RESULT, user("b"), assistant("c")]}),
    ("ends in a tool turn", {"messages": [user("a"), CALL, RESULT]}),
    ("`tool_calls` in a turn of another role",
     {"messages": [{**user("a"), "tool_calls": [STORED]}, assistant("c")]}),
    ("`arguments` of a tool call are not a JSON object",
     {"messages": [user("a"), {**CALL, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}),
    ("`arguments` is not JSON",
     {"messages": [user("a"), {**CALL, "tool_calls": [{"name": "f", "arguments": "x=1"}]}]}),
    ("a tool call is not a function",
     {"messages": [user("a"), {**CALL, "tool_calls": [{**STORED, "type": "custom"}]}]}),
    ("`reasoning` is not one text",
     {"messages": [user("a"), {**assistant("b"), "reasoning": "x", "thinking": "y"}]}),
    ("a tool or a call is not JSON",
     {"messages": [user("a"), {**CALL, "tool_calls": [{"name": "f", "arguments": {"x": b""}}]}]}),
    ("completion has only reasoning",
     {"messages": [user("a"), {**assistant(" "), "reasoning": "x"}]}),
    ("reasoning in the text differs from `reasoning_content`",
     {"messages": [user("a"), {**assistant("<think>y</think>b"), "reasoning": "x"}]}),
    ("reasoning in the text differs from `reasoning_content`",
     {"messages": [user("a"), {**assistant("<think>x"), "reasoning": "x"}]}),
    ("a tool call has an unknown field",
     {"messages": [user("a"), {**CALL, "tool_calls": [{"name": "f", "kwargs": {"x": 1}}]}]}),
    ("a tool call has an unknown field",
     {"messages": [user("a"), {**CALL, "tool_calls": [
         {"function": {"name": "f"}, "arguments": {"x": 1}}]}]}),
    ("`arguments` next to `args` in a tool call",
     {"messages": [user("a"), {**CALL, "tool_calls": [
         {"name": "f", "arguments": {"x": 1}, "args": {"x": 2}}]}]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "row"), CASES, ids=[f"{k}: {reason}" for k, (reason, _) in enumerate(CASES)]
)
def test_a_row_with_malformed_tools_is_dropped_with_the_reason(reason: str, row: dict[str, Any]):
    with pytest.raises(DroppedError) as error:
        (pair if "chosen" in row else demonstration)(row)
    assert error.value.reason == reason


def test_prepared_tables_give_back_the_turns_and_trl_their_column(tmp_path: Path):
    marked = {**assistant("A"), "reasoning_content": "why"}
    rows = [
        {
            "prompt": [user("Hi")],
            "chosen": [CALL],
            "rejected": [assistant("B")],
            "tools": [WEATHER],
        },
        {"prompt": [user("Go"), CALL, RESULT], "chosen": [marked], "rejected": [assistant("B")]},
    ]
    config = Prepare(source=write_jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.0)
    run_prepare(config, tmp_path / "out")
    first, second = tables.read(tmp_path / "out", "pairs", "train")
    assert first["prompt"][0].keys() == {"role", "content", "tools"}
    assert (first["chosen"], first["rejected"]) == ([CALL], [assistant("B")])
    assert (second["prompt"], second["chosen"]) == ([user("Go"), CALL, RESULT], [marked])
    in_memory = training_rows(prepared_whole(config.source))
    assert [first, second] == in_memory
    stored = pq.read_table(tmp_path / "out" / "pairs-train.parquet")
    assert json.loads(stored["tools"][0].as_py())[0]["function"]["name"] == "weather"
    assert stored["tools"][1].as_py() is None
    assert "tools" in pq.read_schema(tmp_path / "out" / "prompts-train.parquet").names
    assert run_prepare(config, tmp_path / "again")["pairs"] == {"train": 2}
    files = [tmp_path / name / "pairs-train.parquet" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_dataset_for_trl_has_the_tools_in_its_prompts(tmp_path: Path):
    rows = [
        {"messages": [user("Hi"), CALL], "tools": None},
        {"messages": [user("Go"), CALL], "tools": [WEATHER]},
    ]
    config = Prepare(source=write_jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.0)
    run_prepare(config, tmp_path / "out")
    dataset = tables.load_dataset(tmp_path / "out", "demonstrations", "train", tmp_path)
    assert dataset is not None
    assert dataset.column_names == ["prompt", "completion", "prompt_id"]
    read = [tables.with_tools(row) for row in dataset]
    assert read == tables.read(tmp_path / "out", "demonstrations", "train")


def test_rows_without_tools_have_the_schema_of_before(tmp_path: Path):
    config = Prepare(source=write_jsonl(tmp_path / "a.jsonl", [PAIR]), test_fraction=0.0)
    run_prepare(config, tmp_path)
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pq.read_schema(tmp_path / "pairs-train.parquet")
    assert schema.names == ["prompt", "chosen", "rejected", "prompt_id"]
    assert [schema.field(k).type.value_type for k in range(3)] == [turns.value_type] * 3


def test_sampled_rows_keep_the_tools(tmp_path: Path):
    row = pair({**PAIR, "tools": TOOLS})
    rows = [row, pair({**PAIR, "prompt": "Go"})]
    tables.write(rows, tables.table_file(tmp_path, "pairs", "train"))
    assert tables.read(tmp_path, "pairs", "train") == rows
    assert "tools" in tables.column_names(tmp_path, "pairs", "train")


def test_parquet_gives_every_call_the_arguments_of_all(tmp_path: Path):
    calls = [{"name": "f", "arguments": {"a": "1"}}, {"name": "g", "arguments": {"b": "2"}}]
    rows = [{"messages": [user("Hi"), {**assistant(""), "tool_calls": [call]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = training_rows(prepared_whole(tmp_path / "a.parquet"), "demonstrations")
    functions = [row["completion"][0]["tool_calls"][0]["function"] for row in read]
    assert [f["arguments"] for f in functions] == ['{"a": "1"}', '{"b": "2"}']


def test_the_text_of_a_turn_includes_all_that_it_says():
    turn = {**CALL, "content": "Wait.", "reasoning_content": "why"}
    assert turn_text(turn) == 'why\nWait.\n{"name": "weather", "arguments": {"city": "Rom"}}'


def test_the_data_set_of_the_python_api_has_the_columns_of_trl(tmp_path: Path):
    rows = [{**PAIR, "tools": [WEATHER]}, {"prompt": "Go", "chosen": "A", "rejected": [CALL]}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    data = dataset_dict.prepare(source, test_fraction=0.0)["train"]
    assert json.loads(data[0]["tools"])[0]["function"] == WEATHER and data[1]["tools"] is None
    assert data[0]["prompt"] == [user("Say a word.")]
    assert data[1]["rejected"][0]["tool_calls"][0]["function"]["name"] == "weather"


def test_rows_with_more_than_text_are_counted(tmp_path: Path):
    rows = [
        {**PAIR, "tools": [WEATHER]},
        {"prompt": "Go", "chosen": "A", "rejected": [CALL], "tools": [WEATHER]},
        {"prompt": [user("Hi"), CALL, RESULT], "chosen": "A", "rejected": "B"},
    ]
    prepared = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))
    summary = statistics.collect(prepared).summary()
    assert summary["turn_fields"] == {"tools": 2, "tool_calls": 2}
    (line,) = statistics.how_read(summary)
    assert line == "rows with more than text: `tool_calls` in 2, `tools` in 2"


def test_files_of_completions_and_annotations_find_the_prompts_of_conversations_with_tools():
    row = demonstration(
        {"messages": [user("Hi"), CALL, RESULT, assistant("A")], "tools": [WEATHER]}
    )
    turns = [user("Hi"), CALL, RESULT]
    assert as_prompt({"prompt": turns, "tools": [WEATHER]}, "prompt") == row["prompt"]
    assert as_prompt({"prompt": row["prompt"]}, "prompt") == row["prompt"]  # comparisons.parquet
    with pytest.raises(InvalidRowError, match="`completion`: tool calls and reasoning are no text"):
        as_completion({"completion": [CALL]}, "completion")
    with pytest.raises(InvalidRowError, match="`prompt`: a tool call names no function"):
        as_prompt({"prompt": [user("Hi"), {**CALL, "tool_calls": [3]}, RESULT]}, "prompt")


def test_conversations_of_sharegpt_are_evaluation_prompts():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A"}]
    assert user_texts({"conversations": turns}) == ["Hi"]


def test_completions_that_differ_in_their_calls_are_no_duplicates(tmp_path: Path):
    cities = ("Rom", "Oslo", "Rom")
    calls = [{"name": "weather", "arguments": {"city": city}} for city in cities]
    turns = [{**assistant(""), "tool_calls": [call]} for call in calls]
    rows = [{"prompt": "Hi", "completion": [turn]} for turn in turns]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(training_rows(data, "demonstrations")) == 2
    assert data.dropped == {"demonstrations: exact duplicate": 1}
    other = [{**row, "tools": [WEATHER]} for row in rows]
    data = prepared_whole(write_jsonl(tmp_path / "b.jsonl", rows + other))
    assert len(training_rows(data, "demonstrations")) == 4
