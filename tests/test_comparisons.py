"""The catalogue and its readers: each sample into rows written by hand; options that pair, thin and refuse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from align import catalogue
from align.comparisons import DroppedError, Options, oasst, shp, trees, ultrafeedback
from align.preferences import prepare_rows
from align.settings import Prepare

FOLDER = Path(__file__).parents[1] / "data" / "catalogue"
POST = "SUBREDDIT: r/pets\n\nTITLE: Cat trouble\n\nPOST: My cat sleeps on the keyboard all day.\n\nTL;DR:"
EXPECTED: dict[str, tuple[list[tuple[str, str, str]], dict[str, int]]] = {
    "hh-rlhf": (
        [
            ("How do I keep basil alive?", "Water it when the soil is dry.", "No idea."),
            ("Hi.|Hello!|Name a bird.", "A wren.", "A trout."),
        ],
        {},
    ),
    "ultrafeedback": ([("Name a prime.", "Seven.", "Nine.")], {"all scores are equal": 1}),
    "shp": (
        [("How long do I boil an egg?", "Eight minutes.", "An hour.")],
        {"ratio of scores below the threshold": 1},
    ),
    "tldr-comparisons": (
        [(POST, "Cat blocks my keyboard.", "Cats exist.")],
        {"not two summaries": 1},
    ),
    "oasst1": (
        [
            ("What is tea?", "A drink of leaves.", "A fish."),
            (
                "What is tea?|A drink of leaves.|Which leaves?",
                "Those of Camellia sinensis.",
                "Rocks.",
            ),
        ],
        {"no tree of messages": 1},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sample_is_read_into_rows_written_by_hand(name: str):
    told = Prepare(source=name, test_fraction=0.0).model_dump(exclude={"stage"})
    told |= {"source": str(FOLDER / f"{name}.sample.jsonl"), "config": None}
    prepared = prepare_rows(**told)
    found = [
        ("|".join(turn["content"] for turn in row["prompt"]), row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in prepared.tables["pairs"]["train"]
    ]  # fmt: skip
    rows, dropped = EXPECTED[name]
    assert found == rows
    assert prepared.dropped == {f"pairs: {reason}": count for reason, count in dropped.items()}
    assert prepared.read["pairs"] == len(found) + sum(prepared.dropped.values())


def test_every_entry_says_what_it_is_and_no_key_is_unknown():
    files = sorted(FOLDER.glob("*.yaml"))
    assert {file.stem for file in files} == {*EXPECTED, "embedded"}
    for file in files:
        entry = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert entry["citation"] and entry["licence"]["text"]
        assert Prepare(source=file.stem).source == entry["source"]


def test_a_recipe_s_own_keys_win_over_the_catalogue():
    assert Prepare(source="shp").ratio == 2.0
    told = Prepare(source="shp", ratio=3.0, revision="abc")
    assert (told.source, told.reader, told.ratio, told.revision) == (
        "stanfordnlp/SHP", "shp", 3.0, "abc",
    )  # fmt: skip
    assert Prepare(source="shp", reader="columns").ratio is None
    assert catalogue.licence("Anthropic/hh-rlhf")[0] == "mit"


SCORED = {
    "instruction": "Go.",
    "completions": [{"response": t, "overall_score": s} for t, s in zip("abcd", (1, 9, 5, 5), strict=True)],
}  # fmt: skip


def sides(found: Any) -> list[Any]:
    return [str(f) if isinstance(f, DroppedError) else f["chosen"] + f["rejected"] for f in found]


def test_the_ways_of_pairing_by_hand():
    assert sides(ultrafeedback(SCORED, Options())) == ["ba"]
    # scores b 9, c 5, d 5, a 1: c and d are equal, so they are no pair
    assert sides(ultrafeedback(SCORED, Options(pairing="all"))) == ["bc", "bd", "ba", "ca", "da"]
    close = sides(ultrafeedback(SCORED, Options(pairing="all", margin=5.0)))
    assert close == [*["margin below the threshold"] * 2, "ba", *["margin below the threshold"] * 2]
    drawn = [sides(ultrafeedback(SCORED, Options("best_random", seed=s)))[0] for s in range(40)]
    assert set(drawn) == {"ba", "bc", "bd"}
    again = sides(ultrafeedback(SCORED, Options("best_random", seed=3)))[0]
    assert again == drawn[3]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ["ab"]),
        ({"labels": 0, "score_B": 16}, ["ba"]),
        ({"score_A": 1}, ["the label contradicts the scores"]),
        ({"labels": 2}, ["label is not 0 or 1"]),
        ({"score_B": None}, ["a score is missing"]),
        ({"score_A": 3}, ["ratio of scores below the threshold"]),
        ({"score_A": 4}, ["ab"]),
    ],
)
def test_votes_by_hand(change: dict[str, Any], found: list[str]):
    row = {
        "history": "h",
        "human_ref_A": "a",
        "human_ref_B": "b",
        "labels": 1,
        "score_A": 8,
        "score_B": 2,
    }
    assert sides(shp(row | change, Options(ratio=2.0))) == found


def test_flat_messages_nested_trees_and_any_order_give_the_same_pairs():
    text = (FOLDER / "oasst1.sample.jsonl").read_text(encoding="utf-8")
    messages = [json.loads(line) for line in text.splitlines()][:-1]
    flat = [sides(oasst(row, Options())) for row in trees(iter(messages))]
    nested = [{"prompt": next(trees(iter(messages)))["prompt"]}]
    assert [sides(oasst(row, Options())) for row in trees(iter(nested))] == flat
    random.Random(1).shuffle(messages)
    assert [sorted(sides(oasst(row, Options()))) for row in trees(iter(messages))] == [
        sorted(found) for found in flat
    ]
    other = Options(languages=("de",))
    assert sides(oasst(nested[0], other)) == ["another language"] * 2


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"source": "a", "ratio": 2.0}, "`ratio` means nothing to `reader: columns`"),
        ({"source": "a", "reader": "shp", "pairing": "all"}, "`pairing` means nothing to"),
        ({"source": "a", "reader": "tldr", "margin": 1.0}, "`margin` means nothing to"),
        ({"source": "a", "reader": "hh", "languages": ["en"]}, "`languages` means nothing to"),
        ({"source": "a", "mixture": [{"source": "b"}]}, "give one of `source` and `mixture`"),
        ({}, "give one of `source` and `mixture`"),
        ({"mixture": [{"source": "b"}], "reader": "hh"}, "`reader` goes into each entry"),
        ({"mixture": [{"source": "b", "weight": 1.0}, {"source": "c"}]}, "a `weight`, or none"),
        ({"source": "a", "keep": ["prompt"]}, "`prompt` is a column of ours"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(told: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Prepare.model_validate(told)
