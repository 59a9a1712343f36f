"""Doctor: the report in the terminal and as an HTML page, and its histograms."""

from __future__ import annotations

import collections
import gzip
import json
import re
from pathlib import Path

import pytest
from helpers.preference_data import HH_FILE, random_pairs, write_jsonl

from align.config.data import Prepare
from align.data import doctor


def test_the_page_shows_the_report_and_is_self_contained(tmp_path: Path):
    rows = random_pairs(60)
    source = write_jsonl(tmp_path / "a<b.jsonl", [*rows, rows[0]])
    report = doctor.examine(Prepare(source=source))
    doctor.write_html(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>pairs: exact duplicate</td><td>1</td><td>row 61, like row 1</td>" in page
    assert "a&lt;b.jsonl" in page
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=", page)


@pytest.mark.skipif(not HH_FILE.is_file(), reason="the HH-RLHF file is not next to this checkout")
def test_counts_of_the_real_file_agree_with_an_independent_script():
    config = Prepare(source=str(HH_FILE), reader="hh", test_fraction=0.1)
    statistics = doctor.examine(config).statistics
    with gzip.open(HH_FILE, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    counts: collections.Counter[str] = collections.Counter()
    longer = kept = 0
    prompts = set()
    for row in rows:
        turns = {
            side: [t.strip() for t in re.split(r"\n\n(?:Human|Assistant):", row[side])[1:]]
            for side in ("chosen", "rejected")
        }
        names = {side: re.findall(r"\n\n(Human|Assistant):", row[side]) for side in turns}
        chosen, rejected = turns["chosen"], turns["rejected"]
        if chosen[:-1] != rejected[:-1]:
            counts["pairs: transcripts part before the last turn"] += 1
        elif any(names["chosen"][i] == names["chosen"][i + 1] for i in range(len(chosen) - 1)):
            counts["pairs: two turns in a row by one speaker"] += 1
        elif not (chosen[-1] and rejected[-1]):
            counts["pairs: blank completion"] += 1
        else:
            kept += 1
            longer += len(chosen[-1].split()) > len(rejected[-1].split())
            prompts.add(" ".join("|".join(chosen[:-1]).lower().split()))
    assert statistics["rows"]["pairs"] == len(rows) == 2312
    assert statistics["dropped"] == dict(counts)
    assert sum(statistics["pairs"].values()) == kept == 2299
    assert statistics["chosen_longer_share"] == longer / kept
    assert sum(statistics["prompts"].values()) == len(prompts)


def test_the_report_states_the_handling_of_near_duplicates(tmp_path: Path):
    rows = random_pairs(60)
    source = write_jsonl(
        tmp_path / "a.jsonl", [*rows, {**rows[0], "prompt": rows[0]["prompt"] + "!"}]
    )
    for action, words in (("drop", "they are dropped"), ("keep", "they have its split")):
        statistics = doctor.examine(Prepare(source=source, near_duplicates=action)).statistics
        assert f"1 prompts are near-duplicates of an earlier one; {words}." in list(
            doctor.sentences(statistics)
        )


def test_every_bar_of_a_histogram_of_lengths_covers_the_same_number_of_integers():
    histogram = doctor.length_histogram("words", dict.fromkeys(range(1, 41), 10))
    assert histogram.counts == [20] * 20
    assert (histogram.edges[0], histogram.edges[1], histogram.edges[-1]) == (1, 3, 40)
    one = doctor.length_histogram("words", {7: 3})
    assert (one.counts, one.edges) == ([3], [7, 7])
