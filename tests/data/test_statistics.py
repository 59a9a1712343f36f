"""Statistics: lengths, the longest rows, the bag-of-words baseline."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers.preference_data import (
    HH_FILE,
    WORDS,
    prepared,
    prepared_whole,
    random_pairs,
    run_prepare,
    write_jsonl,
)

from align.config.data import Prepare
from align.data import doctor
from align.data.formats import pair
from align.data.statistics import BagOfWordsBaseline, collect


def test_lengths_by_hand(tmp_path: Path):
    # chosen of 3, 2, 1, 3 words against rejected of 1: longer 3 of 4, equal 1 of 4
    words = ["a b c", "d e", "f", "g h i"]
    rows = [{"prompt": "one two", "chosen": text, "rejected": f"no{text[0]}"} for text in words]
    summary = collect(prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))).summary()
    assert (summary["chosen_longer_share"], summary["equal_length_share"]) == (0.75, 0.25)
    assert summary["prefer_longer_accuracy"] == 0.875
    assert len(summary["warnings"]) == 1
    assert "right for 87.5% of the pairs" in summary["warnings"][0]
    assert summary["words"]["chosen_median"] == 2.5
    assert (summary["words"]["chosen_p95"], summary["words"]["prompt_median"]) == (3, 2)


def test_the_longest_prompt_of_each_split_is_that_of_its_table(tmp_path: Path):
    words = [f"{'so ' * (k % 7)}is it {k}?" for k in range(40)]
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in words]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.3)
    expected = {
        split: max(len(row["prompt"][0]["content"].split()) for row in rows)
        for split, rows in data.tables()["prompts"].items()
    }
    assert collect(data).summary()["longest_prompts"] == expected
    assert expected["train"] == 9


def test_rows_with_special_tokens_in_their_text_are_counted(tmp_path: Path):
    marks = ["<|im_end|>", "<|im_end|> twice <|im_end|>", "</s>", "<｜User｜>", "a < b | c", "<b>"]
    rows = [
        {"prompt": f"What is {k}?", "chosen": f"It is {mark}.", "rejected": "no"}
        for k, mark in enumerate(marks)
    ]
    summary = collect(prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))).summary()
    (warning,) = [line for line in summary["warnings"] if "special" in line]
    assert warning.startswith("4 rows have special tokens in their text, such as <|im_end|>;")


@pytest.mark.skipif(not HH_FILE.is_file(), reason="the HH-RLHF file is not next to this checkout")
def test_of_2312_real_pairs_13_are_dropped_for_three_reasons():
    data = prepared(HH_FILE, reader="hh")
    assert data.read == {"pairs": 2312}
    assert data.dropped == {
        "pairs: blank completion": 4,
        "pairs: transcripts part before the last turn": 5,
        "pairs: two turns in a row by one speaker": 4,
    }
    summary = collect(data).summary()
    assert summary["pairs"] == {"train": 2050, "test": 249}
    assert summary["prompts"] == {"train": 2049, "test": 248}
    # One row's prompt is often the beginning of another's: no conversation is in two splits.
    beginnings = {
        split: {row["prompt"][0]["content"] for row in rows}
        for split, rows in data.tables()["pairs"].items()
    }
    assert beginnings["train"].isdisjoint(beginnings["test"])


def test_the_longest_row_is_named_and_the_long_ones_are_counted(tmp_path: Path):
    rows = random_pairs(60)
    rows[7]["rejected"] = "word " * 5000
    rows[8]["chosen"] = "word " * 1500
    out = tmp_path / "out"
    statistics = run_prepare(Prepare(source=write_jsonl(tmp_path / "a.jsonl", rows)), out)
    long = pair(rows[7])
    words = 5000 + len(rows[7]["prompt"].split())
    assert statistics["longest_rows"]["pairs"] == {
        "words": words, "prompt_id": long["prompt_id"], "long": 2,
    }  # fmt: skip
    sentence = (
        f"The longest row of the pairs has {words:,} words (prompt_id `{long['prompt_id']}`);"
        " 2 rows have more than 1,000 words."
    )
    assert sentence in list(doctor.sentences(statistics))
    assert sentence in (out / "README.md").read_text(encoding="utf-8")


def test_the_baseline_predicts_labels_that_depend_on_words_and_no_random_ones():
    draw = random.Random(0)
    dependent, independent = BagOfWordsBaseline(), BagOfWordsBaseline()
    for k in range(400):
        word, other = draw.sample(WORDS, 2)
        sides = {"chosen": f"please {word}", "rejected": f"never {other}"}
        dependent.add(pair({"prompt": f"p {k}", **sides}))
        independent.add(pair({"prompt": f"p {k}", "chosen": word, "rejected": other}))
    accuracy, chance = dependent.accuracy(), independent.accuracy()
    assert accuracy is not None and accuracy["accuracy"] > 0.99
    assert chance is not None and abs(chance["accuracy"] - 0.5) < 0.1  # four standard errors


def test_an_accuracy_of_1_has_an_interval():
    baseline = BagOfWordsBaseline()
    for k in range(100):
        baseline.add(pair({"prompt": f"p {k}", "chosen": "please", "rejected": "never"}))
    accuracy = baseline.accuracy()
    assert accuracy is not None and accuracy["accuracy"] == 1.0
    # Wilson's interval of 100 of 100 is from n / (n + z²) = 0.963 to 1
    assert accuracy["half_width"] == pytest.approx((1 - 100 / (100 + 1.96**2)) / 2)
