"""Public data sets and the catalog: each sample gives rows written by hand; options and errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from align.config import catalog, recipe
from align.config.data import Prepare
from align.data.pairing import PairingOptions
from align.data.prepare import prepare
from align.data.public_datasets import (
    gsm8k_solutions,
    oasst,
    shp,
    tldr,
    trees,
    ultrafeedback,
)
from align.data.rows import DroppedError
from align.errors import UserError
from align.rewards import verifiers

FOLDER = Path(__file__).parents[2] / "data" / "catalog"
POST = "SUBREDDIT: r/pets\n\nTITLE: Cat trouble\n\nPOST: My cat sleeps on the keyboard all day.\n\nTL;DR:"
PENS = "Ada has 3 boxes of 4 pens. How many pens?"
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
    "gsm8k-solutions": (
        [
            (PENS, "4*3=12\n#### 12", "3+4=7\n#### 7"),
            (PENS, "4*3=12\n#### 12", "There are 3 boxes of"),
        ],
        {"all scores are equal": 1},
    ),
}
SHARED = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"  # beside the checkout


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sample_is_read_into_rows_written_by_hand(name: str):
    file = str(FOLDER / f"{name}.sample.jsonl")
    config = Prepare(source=name, test_fraction=0.0)
    prepared = prepare(config.model_copy(update={"source": file, "config": None}))
    pairs = [
        ("|".join(turn["content"] for turn in row["prompt"]), row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in prepared.tables()["pairs"]["train"]
    ]  # fmt: skip
    rows, dropped = EXPECTED[name]
    assert pairs == rows
    assert prepared.dropped == {f"pairs: {reason}": count for reason, count in dropped.items()}
    assert prepared.read["pairs"] == len(pairs) + sum(prepared.dropped.values())


def test_gsm8k_gives_demonstrations_whose_answer_is_kept_for_the_verifier():
    file = str(FOLDER / "gsm8k.sample.jsonl")
    config = Prepare(source=file, reader="gsm8k", keep_columns=["answer"], test_fraction=0.0)
    prepared = prepare(config)
    (row,) = prepared.tables()["demonstrations"]["train"]
    assert [turn["content"] for turn in row["prompt"]] == [PENS]
    assert row["completion"][0]["content"] == "3 boxes of 4 are 3*4=12 pens.\n#### 12"
    (prompt,) = prepared.tables()["prompts"]["train"]
    assert verifiers.number([], ["It is 12.", "#### 7"], [prompt["answer"]] * 2) == [1.0, 0.0]
    assert prepared.dropped == {"demonstrations: no final answer behind ####": 1}


def test_labeled_solutions_keep_the_reference_answer_for_the_verifier():
    file = str(FOLDER / "gsm8k-solutions.sample.jsonl")
    config = Prepare(source=file, reader="gsm8k_solutions", keep_columns=["answer", "ground_truth"])
    prepared = prepare(config.model_copy(update={"test_fraction": 0.0}))
    (prompt,) = prepared.tables()["prompts"]["train"]
    assert prompt["answer"] == "3*4=12\n#### 12"
    assert prompt["ground_truth"] == "3*4=<<3*4=12>>12\nA: 12"
    (pair,) = prepared.tables()["pairs"]["train"]  # best against worst, without the catalog
    sides = [pair[side][0]["content"] for side in ("chosen", "rejected")]
    assert verifiers.number([], sides, [prompt["answer"]] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"a": {"solution": 3, "is_correct": True}}, "a solution is not text"),
        ({"a": {"solution": "3", "is_correct": "yes"}}, "is_correct is not true or false"),
        ({"a": {"solution": "3", "is_correct": True}}, "fewer than two scored completions"),
    ],
)
def test_malformed_solutions_are_dropped_with_the_reason(raw: dict[str, Any], reason: str):
    row = {"question": "?", "ground_truth": "A: 3", **raw}
    (dropped,) = gsm8k_solutions(row, PairingOptions(pairing="all"))
    assert isinstance(dropped, DroppedError)
    assert dropped.reason == reason


@pytest.mark.skipif(not SHARED.is_dir(), reason="no copy of GSM8K beside the checkout")
def test_the_real_labeled_solutions_give_2429_pairs_that_the_verifier_agrees_with():
    file = str(SHARED / "example_model_solutions.jsonl.gz")
    config = Prepare(source=file, reader="gsm8k_solutions", pairing="all", keep_columns=["answer"])
    prepared = prepare(config.model_copy(update={"test_fraction": 0.0}))
    equal = prepared.dropped["pairs: all scores are equal"]
    assert prepared.read["pairs"] - equal == 2_429
    assert prepared.dropped["pairs: exact duplicate"] == 3  # without calculator annotations
    tables = prepared.tables()
    pairs = tables["pairs"]["train"]
    answers = {row["prompt_id"]: row["answer"] for row in tables["prompts"]["train"]}
    references = [answers[pair["prompt_id"]] for pair in pairs]
    for side, is_correct in (("chosen", 1.0), ("rejected", 0.0)):
        texts = [pair[side][0]["content"] for pair in pairs]
        assert verifiers.number([], texts, references) == [is_correct] * len(pairs)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no copy of GSM8K beside the checkout")
def test_the_real_questions_are_all_read():
    config = Prepare(source=str(SHARED / "train.jsonl.gz"), reader="gsm8k", test_fraction=0.0)
    prepared = prepare(config)
    assert len(prepared.tables()["demonstrations"]["train"]) == 7_473
    assert not prepared.dropped


def test_every_entry_has_a_license_and_a_citation_and_no_unknown_key():
    files = sorted(FOLDER.glob("*.yaml"))
    assert {file.stem for file in files} == {*EXPECTED, "embedded", "arithmetic", "gsm8k"}
    for file in files:
        entry = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert entry["citation"] and entry["license"]["text"]
        assert Prepare(source=file.stem).source == entry["source"]


def test_keys_of_the_recipe_take_precedence_over_the_catalog():
    assert Prepare(source="shp").ratio == 2.0
    config = Prepare(source="shp", ratio=3.0, revision="abc")
    assert (config.source, config.reader, config.ratio, config.revision) == (
        "stanfordnlp/SHP", "shp", 3.0, "abc",
    )  # fmt: skip
    assert Prepare(source="shp", reader="columns").ratio is None
    assert catalog.license_of("Anthropic/hh-rlhf")[0] == "mit"


SCORED = {
    "instruction": "Go.",
    "completions": [{"response": t, "overall_score": s} for t, s in zip("abcd", (1, 9, 5, 5), strict=True)],
}  # fmt: skip


def sides(pairs: Any) -> list[Any]:
    return [str(p) if isinstance(p, DroppedError) else p["chosen"] + p["rejected"] for p in pairs]


def test_the_ways_of_pairing_by_hand():
    assert sides(ultrafeedback(SCORED, PairingOptions())) == ["ba"]
    # scores b 9, c 5, d 5, a 1: c and d are equal and give no pair
    assert sides(ultrafeedback(SCORED, PairingOptions(pairing="all"))) == [
        "bc",
        "bd",
        "ba",
        "ca",
        "da",
    ]
    close = sides(ultrafeedback(SCORED, PairingOptions(pairing="all", margin=5.0)))
    assert close == [*["margin below the threshold"] * 2, "ba", *["margin below the threshold"] * 2]
    drawn = [
        sides(ultrafeedback(SCORED, PairingOptions("best_random", seed=s)))[0] for s in range(40)
    ]
    assert set(drawn) == {"ba", "bc", "bd"}
    again = sides(ultrafeedback(SCORED, PairingOptions("best_random", seed=3)))[0]
    assert again == drawn[3]


@pytest.mark.parametrize(
    ("change", "expected"),
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
def test_votes_by_hand(change: dict[str, Any], expected: list[str]):
    row = {
        "history": "h",
        "human_ref_A": "a",
        "human_ref_B": "b",
        "labels": 1,
        "score_A": 8,
        "score_B": 2,
    }
    assert sides(shp(row | change, PairingOptions(ratio=2.0))) == expected


def test_flat_messages_nested_trees_and_any_order_give_the_same_pairs():
    text = (FOLDER / "oasst1.sample.jsonl").read_text(encoding="utf-8")
    messages = [json.loads(line) for line in text.splitlines()][:-1]
    flat = [sides(oasst(row, PairingOptions())) for row in trees(iter(messages))]
    nested = [{"prompt": next(trees(iter(messages)))["prompt"]}]
    assert [sides(oasst(row, PairingOptions())) for row in trees(iter(nested))] == flat
    random.Random(1).shuffle(messages)
    assert [sorted(sides(oasst(row, PairingOptions()))) for row in trees(iter(messages))] == [
        sorted(pairs) for pairs in flat
    ]
    other = PairingOptions(languages=("de",))
    assert sides(oasst(nested[0], other)) == ["another language"] * 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "a", "ratio": 2.0}, "`ratio` has no effect with `reader: columns`"),
        ({"source": "a", "reader": "shp", "pairing": "all"}, "`pairing` has no effect with"),
        ({"source": "a", "reader": "tldr", "margin": 1.0}, "`margin` has no effect with"),
        ({"source": "a", "reader": "hh", "languages": ["en"]}, "`languages` has no effect with"),
        ({"source": "a", "mixture": [{"source": "b"}]}, "set either `source` or `mixture`"),
        ({}, "set either `source` or `mixture`"),
        ({"mixture": [{"source": "b"}], "reader": "hh"}, "`reader` belongs into the entries"),
        ({"mixture": [{"source": "b", "weight": 1.0}, {"source": "c"}]}, "`weight` in every entry of `mixture`, or in none"),
        ({"source": "a", "keep_columns": ["prompt"]}, "must not contain `prompt`"),
        ({"source": "a", "reader": "sph"}, "reader\n.*'columns', 'hh', 'ultrafeedback', 'shp'"),
        ({"source": "a", "test_fraction": -0.1}, "test_fraction\n.*greater than or equal to 0"),
        ({"source": "a", "test_fraction": 0.5, "validation_fraction": 0.5}, "`test_fraction` and `validation_fraction`"),
    ],
)  # fmt: skip
def test_options_without_effect_are_rejected(keys: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Prepare.model_validate(keys)


def scored(*completions: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": "Go.", "completions": list(completions)}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (  # scores on two scales cannot be compared
            scored(
                {"response": "a", "overall_score": 7.5}, {"response": "b", "fine-grained_score": 8}
            ),
            ["completions have no score in common"],
        ),
        (
            scored(
                {"response": "a", "overall_score": 9, "rating": 1},
                {"response": "b", "rating": "2"},
            ),
            ["ba"],
        ),
        (
            scored(
                {"response": "a", "score": 1},
                {"response": None, "score": 9},
                {"response": "c", "score": 3},
            ),
            ["completion without text", "ca"],
        ),
        (scored({"response": "a", "score": 10**400}, {"response": "b", "score": 1}),
         ["completions have no score in common"]),
    ],
)  # fmt: skip
def test_completions_of_a_row_are_compared_by_one_score(row: dict[str, Any], expected: list[str]):
    assert sides(ultrafeedback(row, PairingOptions())) == expected


def test_a_choice_may_be_a_float():
    row = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1.0}
    assert sides(tldr(row, PairingOptions())) == ["ba"]


def message(name: object, parent: object, role: str = "prompter", **more: Any) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "role": role, "text": str(name)} | more


def test_messages_outside_of_trees_are_counted():
    tree = [
        message("q", None),
        message("a", "q", "assistant", rank=0),
        message("b", "q", "assistant", rank=1),
    ]
    odd = [
        message("a", "q", "assistant", rank=0),
        message([1], None),
        message("e", {}),
        message("f", "nowhere"),
        message("g", "f", "assistant"),
        *[message("x", "y"), message("y", "x", "assistant"), message("z", "y")],
        message("s", None, "assistant"),
    ]
    rows = list(trees(iter([*odd, *tree])))
    reasons = [reason for row in rows for reason in sides(oasst(row, PairingOptions()))]
    assert sorted(reasons) == sorted([
        "ab", "repeated message_id", "message_id is not a text or a number", "parent_id is not a text or a number",
        "no tree of messages", *["parents go round in a circle"] * 3, "no user's message in the tree",
    ])  # fmt: skip
    assert sides(oasst({"prompt": message("q", None, replies=5)}, PairingOptions())) == [
        "replies are not a list"
    ]


def test_max_rows_counts_trees_and_not_their_messages(tmp_path: Path):
    rows = [message(f"q{k}", None) for k in range(20)]
    for k in range(20):
        rows += [message(f"{side}{k}", f"q{k}", "assistant", rank=i) for i, side in enumerate("ab")]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepared = prepare(Prepare(source=str(file), reader="oasst", max_rows=12, test_fraction=0.0))
    assert (prepared.read["pairs"], prepared.dropped) == (12, {})


def test_the_columns_of_a_reader_can_be_mapped(tmp_path: Path):
    row = {"human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 8, "score_B": 2}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"post": "h", **row}) + "\n", encoding="utf-8")
    config = recipe.load_stage(
        "prepare", [f"source={file}", "reader=shp", "columns={history: post}", "test_fraction=0.0"]
    )
    prepared = prepare(config)
    assert prepared.tables()["pairs"]["train"][0]["prompt"][0]["content"] == "h"
    with pytest.raises(UserError, match="columns: post: not a column of"):
        prepare(Prepare(source=str(file), columns={"post": "history"}))


def test_a_file_or_folder_takes_precedence_over_the_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert Prepare(source="shp").source == "stanfordnlp/SHP"
    for name in ("shp", "embedded"):
        (tmp_path / name).mkdir()
    assert (Prepare(source="shp").source, Prepare(source="shp").reader) == ("shp", "columns")
    assert Prepare(source="embedded").source == "embedded"
