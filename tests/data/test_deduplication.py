"""Deduplication: exact duplicates, contradictions and near-duplicate prompts."""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.preference_data import (
    PAIR,
    prepared,
    prepared_whole,
    random_pairs,
    split_by_prompt,
    training_rows,
    write_jsonl,
)

from align.data.deduplication import find_duplicates
from align.data.formats import pair
from align.data.prepare import PreparedData
from align.data.row_store import CONTRADICTION, DUPLICATE, KEPT

LONG_PROMPT = (
    "please write a long and detailed story about the little brown fox who lived in the forest"
)


def test_duplicates_are_dropped_once_and_contradictions_in_both_directions(tmp_path: Path):
    ab, ba = {**PAIR}, {**PAIR, "chosen": "No.", "rejected": "Hello."}
    other = {**PAIR, "rejected": "Never."}
    again = {**other, "prompt": "say  A WORD."}
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", [ab, other, ba, again, ab]))
    assert training_rows(data) == [pair(other)]
    assert data.dropped == {"pairs: contradiction": 3, "pairs: exact duplicate": 1}
    assert data.read == {"pairs": 5}


def test_the_status_of_rows_agrees_with_a_loop_over_all_rows():
    draw = random.Random(4)
    digests = np.array(
        [[draw.randrange(3), draw.randrange(40)] for _ in range(300)], dtype=np.uint64
    )
    seen: collections.Counter[Any] = collections.Counter()
    directions = collections.defaultdict(set)
    for high, low in digests.tolist():
        directions[high, low // 2].add(low % 2)
    expected = []
    for high, low in digests.tolist():
        row = high, low // 2
        contradicts = len(directions[row]) == 2
        repeated = seen[row] > 0
        expected.append(CONTRADICTION if contradicts else DUPLICATE * repeated)
        seen[row] += 1
    assert set(expected) == {
        KEPT,
        DUPLICATE,
        CONTRADICTION,
    }
    assert find_duplicates(digests).tolist() == expected


def grams(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(len(text) - 4)}


def test_near_duplicate_prompts_are_in_one_split_if_configured(tmp_path: Path):
    rows = random_pairs(150)
    twins = [{**r, "prompt": r["prompt"] + "!", "rejected": "twin"} for r in rows]
    source = write_jsonl(tmp_path / "a.jsonl", [*rows, *twins])
    for row, twin in zip(rows, twins, strict=True):
        one, other = grams(row["prompt"].lower()), grams(twin["prompt"].lower())
        assert len(one & other) / len(one | other) > 0.9  # exact, without hashes
    keys = {"test_fraction": 0.3, "split_seed": 5}

    def n_separated(data: PreparedData) -> int:
        splits = split_by_prompt(data)
        return sum(
            splits[r["prompt"]] != splits[t["prompt"]] for r, t in zip(rows, twins, strict=True)
        )

    assert n_separated(prepared(source, **keys)) > 30
    together = prepared(source, **keys, near_duplicates="keep")
    assert n_separated(together) == 0
    assert together.findings["near_duplicate_prompts"] == 150
    assert together.dropped == {}
    # The first of two decides: with the twins added, the other prompts keep their splits.
    alone = split_by_prompt(
        prepared(write_jsonl(tmp_path / "b.jsonl", rows), **keys, near_duplicates="keep")
    )
    assert alone.items() <= split_by_prompt(together).items()
    dropped = prepared(source, **keys, near_duplicates="drop")
    assert dropped.dropped == {"pairs: near-duplicate prompt": 150}
    assert set(split_by_prompt(dropped)) == {row["prompt"] for row in rows}


@pytest.mark.parametrize("action", ["drop", "keep"])
def test_a_dropped_row_has_no_near_duplicates(tmp_path: Path, action: str):
    pair = {"prompt": LONG_PROMPT, "chosen": "a", "rejected": "b"}
    turned = {"prompt": LONG_PROMPT, "chosen": "b", "rejected": "a"}
    twin = {"prompt": LONG_PROMPT + ".", "chosen": "c", "rejected": "d"}
    source = write_jsonl(tmp_path / "a.jsonl", [*random_pairs(60), pair, turned, twin])
    data = prepared(source, near_duplicates=action)
    assert data.dropped == {"pairs: contradiction": 2}
    assert data.findings["near_duplicate_prompts"] == 0
    assert (
        split_by_prompt(data)[twin["prompt"]] == split_by_prompt(prepared(source))[twin["prompt"]]
    )


def test_replaced_demonstrations_have_no_near_duplicates(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"prompt": LONG_PROMPT + ".", "completion": "x"}])
    write_jsonl(
        folder / "b.jsonl",
        [*random_pairs(60), {"prompt": LONG_PROMPT, "chosen": "c", "rejected": "d"}],
    )
    others = [{"prompt": row["prompt"], "completion": "y"} for row in random_pairs(60, seed=3)]
    demonstrations = write_jsonl(tmp_path / "demonstrations.jsonl", others)
    data = prepared(str(folder), demonstrations=demonstrations, near_duplicates="drop")
    assert data.dropped == {}
