"""The embedded data set: script, label noise and datasheet agree with the files."""

import gzip
import json
import math
import re
import runpy
from functools import cache
from statistics import mean

import pytest
from helpers.preference_data import CHECKOUT

from align.rewards import gold

FOLDER = CHECKOUT / "data" / "embedded"
FILES = ("demonstrations.jsonl.gz", "pairs.jsonl.gz")


@cache
def read(name: str) -> list[dict[str, str]]:
    with gzip.open(FOLDER / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@cache
def generated() -> dict[str, bytes]:
    files: dict[str, bytes] = runpy.run_path(str(FOLDER / "make.py"))["make_files"]()
    return files


@cache
def demonstration_scores() -> list[float]:
    rows = read("demonstrations.jsonl.gz")
    return [gold.gold_score(row["prompt"], row["completion"]) for row in rows]


@cache
def label_probabilities() -> list[float]:
    """Probability of each label."""
    rows = read("pairs.jsonl.gz")
    return [
        gold.preference_probability(row["prompt"], row["chosen"], row["rejected"]) for row in rows
    ]


@pytest.mark.parametrize("name", FILES)
def test_the_script_reproduces_the_file(name: str) -> None:
    # Text is compared, because builds of zlib may compress the same text to different bytes.
    checked_in = (FOLDER / name).read_bytes()
    assert gzip.decompress(generated()[name]) == gzip.decompress(checked_in)
    # Bytes 3 to 7 of a gzip header are flags and time: no file name, no time.
    assert generated()[name][3:8] == checked_in[3:8] == bytes(5)


def test_the_files_are_small() -> None:
    assert set(generated()) == set(FILES)
    assert sum((FOLDER / name).stat().st_size for name in FILES) < 1_000_000


def test_every_combination_occurs_once_and_has_three_answers() -> None:
    rows = read("demonstrations.jsonl.gz")
    prompts = {row["prompt"] for row in rows}
    # 3 counts * 3 tones * 12 topics * 14 things
    assert len(prompts) == 1512
    assert len({gold.parse_prompt(prompt) for prompt in prompts}) == 1512
    assert len(rows) == 3 * 1512
    assert {row["prompt"] for row in read("pairs.jsonl.gz")} <= prompts


def test_rows_have_the_columns_of_their_format() -> None:
    assert {tuple(row) for row in read(FILES[0])} == {("prompt", "completion")}
    assert {tuple(row) for row in read(FILES[1])} == {("prompt", "chosen", "rejected")}
    assert all(row["chosen"] != row["rejected"] for row in read(FILES[1]))


def test_demonstrations_are_of_mixed_quality_and_mostly_readable() -> None:
    scores = demonstration_scores()
    rows = read("demonstrations.jsonl.gz")
    parts = [gold.gold_parts(row["prompt"], row["completion"]) for row in rows]
    assert 0.5 < mean(scores) < 0.6
    assert min(scores) < 0.1
    assert max(scores) > 0.95
    assert len({round(score, 9) for score in scores}) > 1000
    assert mean(part.readable for part in parts) > 0.95


def test_labels_agree_with_gold_as_often_as_their_noise_implies() -> None:
    chances = label_probabilities()
    agree = sum(1.0 if chance > 0.5 else 0.5 if chance == 0.5 else 0.0 for chance in chances)
    expected = sum(max(chance, 1 - chance) for chance in chances)
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances))
    assert abs(agree - expected) < 3 * deviation
    assert 0.82 < expected / len(chances) < 0.85


def test_the_longer_answer_is_not_preferred() -> None:
    rows = [row for row in read("pairs.jsonl.gz") if len(row["chosen"]) != len(row["rejected"])]
    assert 0.4 < mean(len(row["chosen"]) > len(row["rejected"]) for row in rows) < 0.6


def datasheet_figures() -> dict[str, str]:
    """The figures of the datasheet, recomputed."""
    demonstrations, pairs = (read(name) for name in FILES)
    texts = [row["completion"] for row in demonstrations]
    words = {word.strip(".,").lower() for text in texts for word in text.split()}
    longer = mean(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
    return {
        "prompts": f"{len({row['prompt'] for row in demonstrations}):,}",
        "demonstrations": f"{len(demonstrations):,}",
        "pairs": f"{len(pairs):,}",
        "words in the demonstrations": f"{len(words)}",
        "words in the longest demonstration": f"{max(len(text.split()) for text in texts)}",
        "mean gold of the demonstrations": f"{mean(demonstration_scores()):.4f}",
        "best possible preference accuracy": (
            f"{mean(max(chance, 1 - chance) for chance in label_probabilities()):.4f}"
        ),
        "pairs whose chosen answer is the longer": f"{longer:.4f}",
    }


def test_the_figures_of_the_datasheet_are_correct() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert (
        dict(re.findall(r"^\| ([^|]+?) +\| ([\d.,]+) \|$", text, re.MULTILINE))
        == datasheet_figures()
    )
