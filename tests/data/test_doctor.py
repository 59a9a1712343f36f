"""What prepare finds: faults put in on purpose, near-duplicates, contamination, mixtures, kept columns, the real file."""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from align.config.data import Prepare
from align.data import deduplication, doctor
from align.data import tables as data_tables
from align.data.formats import pair
from align.data.prepare import PreparedData, prepare
from align.data.statistics import BagOfWordsBaseline
from align.errors import UserError
from align.runtime.progress import Logger, NullDisplay
from align.stages.prepare import run

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.jsonl.gz"
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "frost",
    "grove",
    "heath",
    "ivory",
    "jade",
    "kelp",
    "lotus",
    "maple",
    "north",
    "ocean",
]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def clean(n: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "prompt": f"Item {seed}.{k}: " + " ".join(draw.choices(WORDS, k=12)),
            "chosen": f"yes {k} " + draw.choice(WORDS),
            "rejected": f"no {k}",
        }
        for k in range(n)
    ]


def prepared(source: str, **keys: Any) -> PreparedData:
    return prepare(Prepare.model_validate({"source": source, **keys}))


def ids(ready: PreparedData, kind: str = "pairs") -> dict[str, str]:
    return {p.row["prompt"][0]["content"]: p.split for p in ready.rows() if p.kind == kind}


def test_the_rows_of_the_embedded_set_and_their_order_are_what_they_were():
    # other stages' results depend on them; the digest is from the code that held all rows in memory
    tables = prepare(Prepare(source="embedded", test_fraction=0.15)).tables()
    found = {
        f"{kind}-{split}": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[
            :16
        ]
        for kind, splits in tables.items()
        for split, rows in splits.items()
    }
    assert found == {
        "demonstrations-train": "d6360ac18dd6f248", "demonstrations-test": "079f80246af8729b",
        "pairs-train": "d54d528324a96bbf", "pairs-test": "0127bcfbc9751859",
        "prompts-train": "af1be7f7517a292f", "prompts-test": "0bc11763ba238400",
    }  # fmt: skip


def test_every_fault_that_was_put_in_is_counted_and_none_is_lost(tmp_path: Path):
    rows = clean(200)
    faults = [
        *[dict(rows[k]) for k in range(7)],  # exact duplicates
        *[{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[50:55]],
        *[{**r, "chosen": r["rejected"]} for r in rows[60:64]],
        *[{**r, "chosen": " "} for r in rows[70:73]],
        *[{**r, "prompt": [{"role": "human", "content": "x"}]} for r in rows[80:82]],
        {**rows[90], "prompt": ""},
    ]
    outliers = [{**r, "chosen": "word " * 5000} for r in clean(2, seed=9)]
    mixed = [*rows, *faults, *outliers]
    random.Random(0).shuffle(mixed)
    told = Prepare(source=jsonl(tmp_path / "a.jsonl", mixed))
    figures = doctor.examine(told).statistics
    assert figures["dropped"] == {
        "pairs: blank completion": 3,
        "pairs: blank prompt": 1,
        "pairs: chosen equals rejected": 4,
        "pairs: contradiction": 10,  # both directions of five
        "pairs: exact duplicate": 7,
        "pairs: wrong roles": 2,
    }
    assert figures["rows"]["pairs"] == len(mixed)
    assert len(mixed) == sum(figures["pairs"].values()) + sum(figures["dropped"].values())
    histogram = next(h for h in doctor.examine(told).histograms if h.title == "words of chosen")
    assert (histogram.edges[-1], histogram.counts[-1]) == (5000, 2)


def test_verdicts_agree_with_a_loop_over_all_rows():
    draw = random.Random(4)
    keys = np.array([[draw.randrange(3), draw.randrange(40)] for _ in range(300)], dtype=np.uint64)
    seen: collections.Counter[Any] = collections.Counter()
    directions = collections.defaultdict(set)
    for high, low in keys.tolist():
        directions[high, low // 2].add(low % 2)
    expected = []
    for high, low in keys.tolist():
        row = high, low // 2
        contradicts = len(directions[row]) == 2
        repeated = seen[row] > 0
        expected.append(
            deduplication.CONTRADICTION if contradicts else deduplication.DUPLICATE * repeated
        )
        seen[row] += 1
    assert set(expected) == {
        deduplication.KEPT,
        deduplication.DUPLICATE,
        deduplication.CONTRADICTION,
    }
    assert deduplication.find_duplicates(keys).tolist() == expected


def test_a_prompt_with_two_rows_leaks_under_a_split_by_row_and_not_under_ours(tmp_path: Path):
    rows = clean(100)
    rows += [{**row, "rejected": "never"} for row in rows]
    ready = prepared(jsonl(tmp_path / "a.jsonl", rows), test_fraction=0.2)
    found = ready.findings["leakage"]
    # 40 of 200 rows; a test prompt's other row trains with probability 160/199
    assert 20 < found["leaked_by_row"] <= found["test_prompts_by_row"] <= 40
    assert found["leaked"] == 0
    assert 8 < found["test_prompts"] < 35


def grams(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(len(text) - 4)}


def test_no_near_duplicate_prompt_is_in_two_splits_when_asked(tmp_path: Path):
    rows = clean(150)
    twins = [{**r, "prompt": r["prompt"] + "!", "rejected": "twin"} for r in rows]
    source = jsonl(tmp_path / "a.jsonl", [*rows, *twins])
    for row, twin in zip(rows, twins, strict=True):
        one, other = grams(row["prompt"].lower()), grams(twin["prompt"].lower())
        assert len(one & other) / len(one | other) > 0.9  # exactly, without any hash
    knobs = {"test_fraction": 0.3, "split_seed": 5}

    def torn(ready: PreparedData) -> int:
        where = ids(ready)
        return sum(
            where[r["prompt"]] != where[t["prompt"]] for r, t in zip(rows, twins, strict=True)
        )

    assert torn(prepared(source, **knobs)) > 30
    together = prepared(source, **knobs, near_duplicates="keep")
    assert torn(together) == 0
    assert together.findings["near_duplicate_prompts"] == 150
    assert together.dropped == {}
    # the first of two decides, so those who were there before the twins came stay where they were
    alone = ids(prepared(jsonl(tmp_path / "b.jsonl", rows), **knobs, near_duplicates="keep"))
    assert alone.items() <= ids(together).items()
    dropped = prepared(source, **knobs, near_duplicates="drop")
    assert dropped.dropped == {"pairs: near-duplicate prompt": 150}
    assert set(ids(dropped)) == {row["prompt"] for row in rows}


def test_evaluation_prompts_are_dropped_exactly_and_by_runs_of_words(tmp_path: Path):
    rows = clean(60)
    named = [
        {"prompt": rows[0]["prompt"].upper() + "?!"},  # the same words
        {"question": "Now " + rows[1]["prompt"] + " and more of it"},  # 14 words in a row
        {"messages": [{"role": "user", "content": "Item 0"}]},  # short: matched whole alone
        {"prompt": " ".join(rows[3]["prompt"].split()[:11])},  # 12 words: no run of 13
    ]
    bench = jsonl(tmp_path / "bench.jsonl", named)
    ready = prepared(jsonl(tmp_path / "a.jsonl", rows), decontaminate=[bench])
    assert ready.dropped == {
        f"pairs: prompt is in {bench}": 1,
        f"pairs: prompt shares 13 words in a row with {bench}": 1,
    }
    assert not {rows[0]["prompt"], rows[1]["prompt"]} & set(ids(ready))
    with pytest.raises(UserError, match="1 rows have no text in `prompt`"):
        prepared("embedded", decontaminate=[jsonl(tmp_path / "x.jsonl", [{"text": "a"}])])


def test_a_mixture_is_weighed_capped_and_counted_by_source(tmp_path: Path):
    one = jsonl(tmp_path / "one.jsonl", clean(90, seed=1))
    two = jsonl(tmp_path / "two.jsonl", [*clean(40, seed=2), *clean(1, seed=1)])
    told = {
        "mixture": [{"source": one, "weight": 1.0}, {"source": two, "weight": 2.0, "max_rows": 40}]
    }
    ready = prepare(Prepare.model_validate(told))
    # 40 of the second stay whole, so the first gets half as many
    counts = {name: found["pairs"] for name, found in ready.sources.items()}
    assert counts == {
        one: {"read": 90, "kept": 20, "dropped": {"left out by weight": 70}},
        two: {"read": 40, "kept": 40, "dropped": {}},
    }
    again = ids(prepare(Prepare.model_validate(told)))
    other = Prepare.model_validate(told | {"split_seed": 1})
    assert set(again) == set(ids(ready)) != set(ids(prepare(other)))
    plain = prepare(Prepare.model_validate({"mixture": [{"source": one}, {"source": two}]}))
    assert plain.dropped == {"pairs: exact duplicate": 1}
    assert plain.sources[two]["pairs"]["dropped"] == {"exact duplicate": 1}


def test_a_cap_counts_over_the_files_of_a_folder(tmp_path: Path):
    for name in ("one", "two"):
        jsonl(tmp_path / f"{name}.jsonl", clean(30, seed=len(name) + ord(name[0])))
    assert prepared(str(tmp_path), max_rows=40).read == {"pairs": 40}


def test_kept_columns_come_along_with_the_first_row_of_a_prompt(tmp_path: Path):
    rows = [{**r, "tests": [k], "meta": {"level": k}} for k, r in enumerate(clean(40))]
    rows.append({**rows[0], "rejected": "other", "tests": [99]})
    source = jsonl(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out"
    told = Prepare(source=source, keep_columns=["tests", "meta"])
    run(told, {}, out, Logger("prepare", out, NullDisplay(), main=True))
    found = [
        r
        for s in ("train", "test")
        for r in pq.read_table(out / f"prompts-{s}.parquet").to_pylist()
    ]
    assert sorted((json.loads(r["tests"]), json.loads(r["meta"])["level"]) for r in found) == [
        ([k], k) for k in range(40)
    ]
    assert pq.read_schema(out / "pairs-train.parquet").names[-1] == "prompt_id"
    with pytest.raises(
        UserError, match=r"keep_columns: .* has no column `test`; did you mean `tests`"
    ):
        prepared(source, keep_columns=["test"])


def test_the_split_is_the_same_in_another_process_and_unmoved_by_rows(tmp_path: Path):
    few, many = clean(80), [*clean(50, seed=3), *clean(80)]
    before = ids(prepared(jsonl(tmp_path / "a.jsonl", few)))
    assert before.items() <= ids(prepared(jsonl(tmp_path / "b.jsonl", many))).items()
    code = (
        "import sys, json; from align.config.data import Prepare; from align.data.prepare import prepare\n"
        "rows = prepare(Prepare(source=sys.argv[1])).rows()\n"
        "print(json.dumps({p.row['prompt'][0]['content']: p.split for p in rows}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert json.loads(done.stdout) == before


def test_a_label_that_words_give_away_is_found_and_one_at_random_is_not():
    draw = random.Random(0)
    told, blind = BagOfWordsBaseline(), BagOfWordsBaseline()
    for k in range(400):
        word, other = draw.sample(WORDS, 2)
        sides = {"chosen": f"please {word}", "rejected": f"never {other}"}
        told.add(pair({"prompt": f"p {k}", **sides}))
        blind.add(pair({"prompt": f"p {k}", "chosen": word, "rejected": other}))
    found, chance = told.accuracy(), blind.accuracy()
    assert found is not None and found["accuracy"] > 0.99
    assert chance is not None and abs(chance["accuracy"] - 0.5) < 0.1  # four standard errors


def test_the_page_shows_what_was_found_and_needs_no_other_file(tmp_path: Path):
    rows = clean(60)
    source = jsonl(tmp_path / "a<b.jsonl", [*rows, rows[0]])
    found = doctor.examine(Prepare(source=source))
    doctor.write_html(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>pairs: exact duplicate</td><td>1</td>" in page
    assert "a&lt;b.jsonl" in page
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=", page)


@pytest.mark.skipif(not HH.is_file(), reason="the HH-RLHF file is not beside this checkout")
def test_counts_of_the_real_file_agree_with_a_script_of_its_own():
    found = doctor.examine(Prepare(source=str(HH), reader="hh", test_fraction=0.1))
    with gzip.open(HH, "rt", encoding="utf-8") as file:
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
    assert found.statistics["rows"]["pairs"] == len(rows) == 2312
    assert found.statistics["dropped"] == dict(counts)
    assert sum(found.statistics["pairs"].values()) == kept == 2299
    assert found.statistics["chosen_longer_share"] == longer / kept
    assert sum(found.statistics["prompts"].values()) == len(prompts)


LONG = "please write a long and detailed story about the little brown fox who lived in the forest"


@pytest.mark.parametrize("what", ["drop", "keep"])
def test_nobody_is_a_near_duplicate_of_a_row_that_was_dropped(tmp_path: Path, what: str):
    pair = {"prompt": LONG, "chosen": "a", "rejected": "b"}
    turned = {"prompt": LONG, "chosen": "b", "rejected": "a"}
    twin = {"prompt": LONG + ".", "chosen": "c", "rejected": "d"}
    source = jsonl(tmp_path / "a.jsonl", [*clean(60), pair, turned, twin])
    ready = prepared(source, near_duplicates=what)
    assert ready.dropped == {"pairs: contradiction": 2}
    assert ready.findings["near_duplicate_prompts"] == 0
    assert ids(ready)[twin["prompt"]] == ids(prepared(source))[twin["prompt"]]


def test_nobody_is_a_near_duplicate_of_demonstrations_that_others_replace(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [{"prompt": LONG + ".", "completion": "x"}])
    jsonl(folder / "b.jsonl", [*clean(60), {"prompt": LONG, "chosen": "c", "rejected": "d"}])
    others = [{"prompt": row["prompt"], "completion": "y"} for row in clean(60, seed=3)]
    said = jsonl(tmp_path / "said.jsonl", others)
    ready = prepared(str(folder), demonstrations=said, near_duplicates="drop")
    assert ready.dropped == {}


def test_prompts_that_are_dropped_do_not_share_a_split(tmp_path: Path):
    rows = clean(60)
    source = jsonl(tmp_path / "a.jsonl", [*rows, {**rows[0], "prompt": rows[0]["prompt"] + "!"}])
    for what, words in (("drop", "they are dropped"), ("keep", "they have its split")):
        figures = doctor.examine(Prepare(source=source, near_duplicates=what)).statistics
        assert f"1 prompts are near-duplicates of an earlier one; {words}." in list(
            doctor.sentences(figures)
        )


def test_all_files_of_a_folder_are_evaluation_prompts_and_none_is_no_text(tmp_path: Path):
    rows = clean(60)
    folder = tmp_path / "bench"
    folder.mkdir()
    for k, name in enumerate(("test", "dev")):
        jsonl(folder / f"{name}.jsonl", [{"prompt": rows[k]["prompt"]}])
    source = jsonl(tmp_path / "a.jsonl", [*rows, {**rows[2], "prompt": "None"}])
    ready = prepared(source, decontaminate=[str(folder)])
    assert ready.dropped == {f"pairs: prompt is in {folder}": 2}
    empty = [{"messages": [{"role": "user", "content": None}]}]
    with pytest.raises(UserError, match="1 rows have no text in `prompt`"):
        prepared(source, decontaminate=[jsonl(tmp_path / "x.jsonl", empty)])


def test_kept_objects_with_other_fields_in_later_rows_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_tables, "ROW_GROUP", 10)
    metas = [{"level": k} if k < 30 else {"depth": [k]} for k in range(60)]
    rows = [{**row, "meta": meta} for row, meta in zip(clean(60), metas, strict=True)]
    out = tmp_path / "out"
    told = Prepare(
        source=jsonl(tmp_path / "a.jsonl", rows), keep_columns=["meta"], test_fraction=0.0
    )
    run(told, {}, out, Logger("prepare", out, NullDisplay(), main=True))
    found = pq.read_table(out / "prompts-train.parquet")["meta"].to_pylist()
    assert [json.loads(text) for text in found] == metas


def test_bars_of_whole_numbers_hold_as_many_of_them_each():
    histogram = doctor.length_histogram("words", dict.fromkeys(range(1, 41), 10))
    assert histogram.counts == [20] * 20
    assert (histogram.edges[0], histogram.edges[1], histogram.edges[-1]) == (1, 3, 40)
    one = doctor.length_histogram("words", {7: 3})
    assert (one.counts, one.edges) == ([3], [7, 7])


def test_the_longest_row_is_named_and_the_long_ones_are_counted(tmp_path: Path):
    rows = clean(60)
    rows[7]["rejected"] = "word " * 5000
    rows[8]["chosen"] = "word " * 1500
    out = tmp_path / "out"
    told = Prepare(source=jsonl(tmp_path / "a.jsonl", rows))
    figures = run(told, {}, out, Logger("prepare", out, NullDisplay(), main=True)).metrics
    long = pair(rows[7])
    words = 5000 + len(rows[7]["prompt"].split())
    assert figures["longest_rows"]["pairs"] == {
        "words": words, "prompt_id": long["prompt_id"], "long": 2,
    }  # fmt: skip
    sentence = (
        f"The longest row of the pairs has {words:,} words (prompt_id `{long['prompt_id']}`);"
        " 2 rows have more than 1,000 words."
    )
    assert sentence in list(doctor.sentences(figures))
    assert sentence in (out / "README.md").read_text(encoding="utf-8")


def test_an_accuracy_of_all_has_a_width():
    told = BagOfWordsBaseline()
    for k in range(100):
        told.add(pair({"prompt": f"p {k}", "chosen": "please", "rejected": "never"}))
    found = told.accuracy()
    assert found is not None and found["accuracy"] == 1.0
    # Wilson's interval of 100 of 100 is from n / (n + z²) = 0.963 to 1
    assert found["half_width"] == pytest.approx((1 - 100 / (100 + 1.96**2)) / 2)
