"""Splits: a hash of the prompt decides; conversations stay together; rows never move prompts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.preference_data import (
    CHECKOUT,
    PAIR,
    assistant,
    prepared,
    random_pairs,
    split_by_prompt,
    user,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.rows import normalize_text, prompt_id
from align.data.splits import split_of
from align.errors import UserError


@settings(max_examples=50)
@given(st.text(), st.sampled_from(["\n", "  ", "\t "]))
def test_letter_case_and_white_space_do_not_change_the_prompt_id(text: str, space: str):
    spaced = space + text.replace(" ", space) + space
    assert prompt_id([user(spaced)]) == prompt_id([user(text)])
    assert (
        normalize_text(normalize_text("\uff21\uff22 \ufb01  \xdf"))
        == normalize_text("ab fi SS")
        == "ab fi ss"
    )


def test_the_role_and_the_order_of_turns_change_the_prompt_id():
    turns = [user("a"), assistant("b"), user("c")]
    others = [[user("a b c")], [user("c"), assistant("b"), user("a")], [user("abc")], turns[2:]]
    assert len({prompt_id(prompt) for prompt in [turns, *others]}) == 5


@given(
    st.lists(st.text(min_size=1), unique=True, min_size=1),
    st.lists(st.text(min_size=1), unique=True),
    st.integers(),
    st.floats(0, 0.5),
    st.floats(0, 0.49),
)
def test_adding_rows_moves_no_prompt(
    old: list[str], new: list[str], seed: int, test: float, validation: float
):
    def splits(ids: list[str]) -> dict[str, str]:
        return {
            name: split_of(name, seed=seed, test_fraction=test, validation_fraction=validation)
            for name in ids
        }

    before, after = splits(old), splits([*new, *old])
    assert before.items() <= after.items()


@given(st.text(), st.integers(), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_larger_fraction_only_adds_to_a_split(key: str, seed: int, test: float, more: float):
    small = split_of(key, seed=seed, test_fraction=test)
    assert split_of(key, seed=seed, test_fraction=test + more) == "test" or small == "train"
    wider = split_of(key, seed=seed, test_fraction=test, validation_fraction=more)
    assert (wider == "test") == (small == "test")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([0.05, 0.2]))
def test_fractions_are_met_within_binomial_noise(seed: int, test: float, validation: float):
    n = 4000
    splits = [
        split_of(f"{k:016x}", seed=seed, test_fraction=test, validation_fraction=validation)
        for k in range(n)
    ]
    for split, p in (("test", test), ("validation", validation)):
        # five standard deviations: once in a million and a half
        assert abs(splits.count(split) - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_the_split_of_a_prompt_is_the_same_in_every_version_of_this_code():
    # A change of these values would move prompts that were trained on into the test split.
    key = prompt_id([user("Say a word.")])
    assert key == "e96c5cb71da4ab7b"
    assert [split_of(key, seed=s, test_fraction=0.5)[:2] for s in range(8)] == [
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "tr",
        "te",
        "tr",
    ]


def test_pairs_and_demonstrations_of_a_prompt_are_in_the_same_split():
    tables = prepared("embedded", validation_fraction=0.1).tables()
    splits_of_prompt: dict[str, set[str]] = {}
    for splits in tables.values():
        for split, rows in splits.items():
            for row in rows:
                splits_of_prompt.setdefault(row["prompt_id"], set()).add(split)
    assert {len(splits) for splits in splits_of_prompt.values()} == {1}
    assert set().union(*splits_of_prompt.values()) == {"train", "test", "validation"}
    shared = {row["prompt_id"] for row in tables["pairs"]["test"]}
    assert shared & {row["prompt_id"] for row in tables["demonstrations"]["test"]}


def test_rows_that_begin_the_same_conversation_are_in_one_split(tmp_path: Path):
    rows = []
    for i in range(50):
        turns = [user(f"Hello {i}."), assistant("Hi."), user("And?")]
        rows += [{**PAIR, "prompt": turns[:length]} for length in (1, 3)]
    data = prepared(write_jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.5)
    parts = data.tables()["prompts"].values()
    beginnings = [{row["prompt"][0]["content"] for row in part} for part in parts]
    assert beginnings[0].isdisjoint(beginnings[1])
    assert all(len(part) == 2 * len(o) for part, o in zip(parts, beginnings, strict=True))


def test_the_split_is_the_same_in_another_process_and_with_more_rows(tmp_path: Path):
    few, many = random_pairs(80), [*random_pairs(50, seed=3), *random_pairs(80)]
    before = split_by_prompt(prepared(write_jsonl(tmp_path / "a.jsonl", few)))
    assert (
        before.items() <= split_by_prompt(prepared(write_jsonl(tmp_path / "b.jsonl", many))).items()
    )
    code = (
        "import sys, json; from align.config.data import Prepare; from align.data.prepare import prepare\n"
        "rows = prepare(Prepare(source=sys.argv[1])).rows()\n"
        "print(json.dumps({p.row['prompt'][0]['content']: p.split for p in rows}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl")]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert json.loads(process.stdout) == before


def test_a_prompt_with_two_rows_leaks_in_a_split_by_row_and_not_in_a_split_by_prompt(
    tmp_path: Path,
):
    rows = random_pairs(100)
    rows += [{**row, "rejected": "never"} for row in rows]
    data = prepared(write_jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.2)
    leakage = data.findings["leakage"]
    # 40 of 200 rows; a test prompt's other row trains with probability 160/199
    assert 20 < leakage["leaked_by_row"] <= leakage["test_prompts_by_row"] <= 40
    assert leakage["leaked"] == 0
    assert 8 < leakage["test_prompts"] < 35


def test_an_empty_split_of_conversations_with_one_beginning_is_explained(tmp_path: Path):
    rows = [
        {"messages": [user("Hello"), assistant("Hi"), user(f"Go {n}"), assistant("A")]}
        for n in range(40)
    ]
    with pytest.raises(UserError) as error:
        prepared(write_jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.1)
    assert str(error.value) == (
        "test_fraction: 0.1: none of 40 prompts is in split `test`, because they have 1 different"
        " first turn, and prompts with the same first turn share a split; raise it, set it to 0,"
        " add prompts or change `split_seed`"
    )
