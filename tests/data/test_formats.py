"""Formats: a raw row becomes a conversational row, or is dropped for a named reason."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.preference_data import PAIR, assistant, system, user

from align.data.formats import demonstration, hh_pair, hh_turns, pair
from align.data.rows import DroppedError, prompt_id


def test_plain_text_becomes_one_turn_each():
    assert pair(PAIR) == {
        "prompt": [user("Say a word.")],
        "chosen": [assistant("Hello.")],
        "rejected": [assistant("No.")],
        "prompt_id": prompt_id([user("Say a word.")]),
    }


def test_the_common_beginning_of_two_conversations_is_the_prompt():
    start = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hm?"), user("Go")]
    row = pair({"chosen": [*start, assistant("A")], "rejected": [*start, assistant("B")]})
    assert row["prompt"] == start
    assert (row["chosen"], row["rejected"]) == ([assistant("A")], [assistant("B")])


def test_a_prompt_column_next_to_whole_conversations_must_repeat_one_of_their_turns():
    sides = {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}
    assert pair({"prompt": "Hi", **sides})["prompt"] == [user("Hi")]
    with pytest.raises(DroppedError, match="prompt is not in the transcripts"):
        pair({"prompt": "Bye", **sides})


def test_the_last_turn_of_messages_is_the_completion():
    turns = [user("Hi"), assistant("Hm?"), user("Go"), assistant("A")]
    row = demonstration({"messages": turns})
    assert (row["prompt"], row["completion"]) == (turns[:3], turns[3:])


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("tool_calls", [{"id": "1"}], "a tool call names no function"),
        ("thinking", ["two and two"], "`thinking` is not one text"),
        ("images", ["a.png"], "`images` of a turn is not supported"),
        ("weight", 0, "completion is marked as not to be trained on"),
        ("weight", 0.0, "completion is marked as not to be trained on"),
        ("train", False, "completion is marked as not to be trained on"),
        ("loss", False, "completion is marked as not to be trained on"),
        ("loss_mask", 0, "completion is marked as not to be trained on"),
        ("masked", True, "`masked` of a turn is not supported"),
        ("train_detail", [{"train": False}], "`train_detail` of a turn is not supported"),
        ("reasoning_details", [{"text": "x"}], "`reasoning_details` of a turn is not supported"),
        ("weight", 0.5, "`weight` of a turn is not 0 or 1"),
    ],
)
def test_a_row_whose_turns_have_more_than_text_is_dropped(field: str, value: Any, reason: str):
    marked = {**assistant("4"), field: value}
    for read, row in (
        (demonstration, {"messages": [user("2+2?"), marked]}),
        (demonstration, {"prompt": "2+2?", "completion": [marked]}),
        (pair, {"prompt": "2+2?", "chosen": [marked], "rejected": "5"}),
        (pair, {"chosen": [user("2+2?"), assistant("5")], "rejected": [user("2+2?"), marked]}),
    ):
        with pytest.raises(DroppedError, match=reason):
            read(row)


def test_empty_fields_and_weights_of_users_change_nothing():
    turns = [
        {**user("Hi"), "weight": 0},
        {**assistant("Hm?"), "weight": 1, "tool_calls": []},
        {**user("Go"), "reasoning_content": None},
        {**assistant("A"), "weight": 1.0, "train": None, "tool_calls": None},
    ]
    row = demonstration({"messages": turns, "tools": "[]"})
    assert (row["prompt"], row["completion"]) == (
        [user("Hi"), assistant("Hm?"), user("Go")],
        [assistant("A")],
    )


@pytest.mark.parametrize(
    ("field", "value"), [("weight", 0), ("train", False), ("loss_mask", "0"), ("loss", 0.0)]
)
def test_an_earlier_turn_that_is_excluded_from_training_is_marked(field: str, value: Any):
    marked = {**assistant("Hm?"), field: value}
    row = demonstration({"messages": [user("Hi"), marked, user("Go"), assistant("A")]})
    assert row["prompt"][1] == {**assistant("Hm?"), "untrained": True}
    same = demonstration({"messages": [user("Hi"), assistant("Hm?"), user("Go"), assistant("A")]})
    assert row["prompt_id"] == same["prompt_id"]  # it is the same prompt
    with pytest.raises(DroppedError, match="of a turn is not 0 or 1"):
        demonstration(
            {"messages": [user("Hi"), {**marked, field: 0.5}, user("Go"), assistant("A")]}
        )


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"images": ["a.png"]}, "`images` are not supported"),
        ({"system": 3}, "`system` is not text"),
        ({"prompt": [system("Be kind."), user("Hi")], "system": "Be brief."}, "differs from"),
    ],
)
def test_columns_that_belong_to_the_prompt_are_not_lost(columns: dict[str, Any], reason: str):
    with pytest.raises(DroppedError, match=reason):
        pair({**PAIR, **columns})


def test_a_column_system_is_the_system_turn_also_of_whole_conversations():
    sides = {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}
    assert pair({**sides, "system": "Be brief."})["prompt"] == [system("Be brief."), user("Hi")]
    repeated = {**PAIR, "prompt": [system("Be brief."), user("Hi")], "system": "Be brief. "}
    assert pair(repeated)["prompt"] == [system("Be brief."), user("Hi")]


def test_a_blank_system_turn_is_left_out():
    blank = [system(" "), user("Hi")]
    sides = {"chosen": [*blank, assistant("A")], "rejected": [*blank, assistant("B")]}
    for row in (sides, {**PAIR, "prompt": blank}, {**PAIR, "prompt": blank, "system": ""}):
        assert pair(row)["prompt"] == [user("Hi")]
    assert pair({**sides, "system": "Be brief."})["prompt"] == [system("Be brief."), user("Hi")]
    with pytest.raises(DroppedError, match="blank prompt"):
        pair({**PAIR, "prompt": [system(" ")]})


def test_fields_of_a_turn_other_than_role_and_content_are_removed():
    row = demonstration({"prompt": [{**user("Hi"), "tool_calls": None}], "completion": "A"})
    assert row["prompt"] == [user("Hi")]


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        pytest.param("\n\nHuman: a\n\nAssistant: b", [user("a"), assistant("b")], id="plain"),
        pytest.param(
            "\n\nHuman: say Human: or\nAssistant: x\n\nAssistant: b",
            [user("say Human: or\nAssistant: x"), assistant("b")],
            id="a name inside a text is text",
        ),
        pytest.param(
            "Human: a\n\nAssistant: one\n\ntwo\n\nHuman: c",
            [user("a"), assistant("one\n\ntwo"), user("c")],
            id="no leading newlines, paragraphs, a last user turn",
        ),
        pytest.param(
            "\n\nHuman: a\n\nAssistant:", [user("a"), assistant("")], id="empty last turn"
        ),
    ],
)
def test_transcripts_by_hand(text: str, turns: list[dict[str, str]]):
    assert hh_turns(text) == turns


H, A = "\n\nHuman: ", "\n\nAssistant: "


def test_the_beginning_of_a_transcript_may_be_in_the_prompt():
    whole = {"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}a{A}b{H}c{A}e"}
    for prompt, sides in (
        (f"{H}a{A}b{H}c{A.rstrip()}", {"chosen": " d", "rejected": " e"}),
        (f"{H}a{A}b{H}c", {"chosen": f"{A}d", "rejected": f"{A}e"}),
        (f"{H}a", whole),
    ):
        assert hh_pair({"prompt": prompt, **sides}) == hh_pair(whole), prompt
    with pytest.raises(DroppedError, match="ends in a user turn"):
        hh_pair({"prompt": f"{H}a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DroppedError, match="not an HH transcript"):
        hh_pair({"prompt": "a", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize(
    ("reader", "raw", "reason"),
    [
        (pair, {**PAIR, "prompt": " \n"}, "blank prompt"),
        (pair, {**PAIR, "prompt": []}, "blank prompt"),
        (pair, {**PAIR, "prompt": None}, "no prompt"),
        (pair, {**PAIR, "prompt": 3}, "content is not text"),
        (pair, {**PAIR, "prompt": [user("a"), user("b")]}, "two turns in a row by one speaker"),
        (pair, {**PAIR, "prompt": [user("a"), assistant("b")]}, "in a row by one speaker"),
        (pair, {**PAIR, "prompt": [assistant("a"), user("b")]}, "begins with an assistant turn"),
        (pair, {**PAIR, "prompt": [{"role": "human", "content": "a"}]}, "wrong roles"),
        (pair, {**PAIR, "prompt": [{"role": "system", "content": "a"}]}, "wrong roles"),
        (pair, {**PAIR, "chosen": ""}, "blank completion"),
        (pair, {**PAIR, "rejected": "  "}, "blank completion"),
        (pair, {**PAIR, "rejected": []}, "blank completion"),
        (pair, {**PAIR, "rejected": None}, "missing value"),
        (pair, {**PAIR, "rejected": 1.5}, "content is not text"),
        (pair, {**PAIR, "chosen": "\ud83d"}, "content is not Unicode text"),
        (pair, {**PAIR, "chosen": [assistant("a"), assistant("b")]}, "not one assistant turn"),
        (pair, {**PAIR, "chosen": [user("a")]}, "completion is not one assistant turn"),
        (pair, {**PAIR, "chosen": [{"role": "assistant"}]}, "content is not text"),
        (pair, {**PAIR, "rejected": "Hello. "}, "chosen equals rejected"),
        (hh_pair, {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b"}, "chosen equals rejected"),
        (hh_pair, {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}"}, "blank completion"),
        (hh_pair, {"chosen": f"{H}a{A}b", "rejected": f"{H}a{A}b{H}c"}, "ends in a user turn"),
        (hh_pair, {"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}a{A}x{H}c{A}d"}, "part before"),
        (hh_pair, {"chosen": f"{H}a{A}b{H}c{A}d", "rejected": f"{H}x{A}b{H}c{A}d"}, "no beginning"),
        (hh_pair, {"chosen": f"{H}a{A}b{A}c", "rejected": f"{H}a{A}b{A}d"}, "in a row by one"),
        (hh_pair, {"chosen": f"{A}a{H}b{A}c", "rejected": f"{A}a{H}b{A}d"}, "not an HH transcript"),
        (hh_pair, {"chosen": "a", "rejected": "b"}, "not an HH transcript"),
        (hh_pair, {"chosen": f"{H}a{A}b"}, "missing value"),
    ],
)
def test_an_unusable_row_is_dropped_for_a_named_reason(
    reader: Any, raw: dict[str, Any], reason: str
):
    with pytest.raises(DroppedError, match=reason):
        reader(raw)


def test_text_parts_are_joined_and_other_parts_drop_the_row():
    parts = [{"type": "text", "text": "A ", "image_url": None}, {"type": "text", "text": "B"}]
    row = demonstration({"messages": [user("Hi"), {"role": "assistant", "content": parts}]})
    assert row["completion"] == [assistant("A B")]
    image = {"type": "image_url", "text": None, "image_url": {"url": "a.png"}}
    for content in ([*parts, image], ["A"], [{"type": "text", "text": "A", "file": "x"}]):
        with pytest.raises(DroppedError, match="content is not text"):
            demonstration({"messages": [{"role": "user", "content": content}, assistant("A")]})
