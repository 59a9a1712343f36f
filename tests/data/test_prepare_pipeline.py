"""Preparation as a whole: every row is kept or dropped for a counted reason, in a fixed order."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.preference_data import (
    CHECKOUT,
    PAIR,
    assistant,
    prepared,
    prepared_whole,
    random_pairs,
    run_prepare,
    split_by_prompt,
    system,
    training_rows,
    user,
    write_jsonl,
)

from align.config.data import Prepare
from align.data import doctor
from align.data import tables as data_tables
from align.data.decontamination import user_texts
from align.data.prepare import prepare
from align.errors import UserError


def test_the_rows_of_the_embedded_data_set_and_their_order_are_fixed():
    # Results of other stages depend on them.
    tables = prepared("embedded", test_fraction=0.15).tables()
    digests = {
        f"{kind}-{split}": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[
            :16
        ]
        for kind, splits in tables.items()
        for split, rows in splits.items()
    }
    assert digests == {
        "demonstrations-train": "d6360ac18dd6f248", "demonstrations-test": "079f80246af8729b",
        "pairs-train": "d54d528324a96bbf", "pairs-test": "0127bcfbc9751859",
        "prompts-train": "af1be7f7517a292f", "prompts-test": "0bc11763ba238400",
    }  # fmt: skip


def test_every_inserted_fault_is_counted(tmp_path: Path):
    rows = random_pairs(200)
    faults = [
        *[dict(rows[k]) for k in range(7)],  # exact duplicates
        *[{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[50:55]],
        *[{**r, "chosen": r["rejected"]} for r in rows[60:64]],
        *[{**r, "chosen": " "} for r in rows[70:73]],
        *[{**r, "prompt": [{"role": "human", "content": "x"}]} for r in rows[80:82]],
        {**rows[90], "prompt": ""},
    ]
    outliers = [{**r, "chosen": "word " * 5000} for r in random_pairs(2, seed=9)]
    shuffled = [*rows, *faults, *outliers]
    random.Random(0).shuffle(shuffled)
    config = Prepare(source=write_jsonl(tmp_path / "a.jsonl", shuffled))
    statistics = doctor.examine(config).statistics
    assert statistics["dropped"] == {
        "pairs: blank completion": 3,
        "pairs: blank prompt": 1,
        "pairs: chosen equals rejected": 4,
        "pairs: contradiction": 10,  # both directions of five
        "pairs: exact duplicate": 7,
        "pairs: wrong roles": 2,
    }
    assert statistics["rows"]["pairs"] == len(shuffled)
    assert len(shuffled) == sum(statistics["pairs"].values()) + sum(statistics["dropped"].values())
    histogram = next(h for h in doctor.examine(config).histograms if h.title == "words of chosen")
    assert (histogram.edges[-1], histogram.counts[-1]) == (5000, 2)


def test_a_mapped_column_loses_its_old_name(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    swapped = prepared_whole(file, columns={"chosen": "rejected", "rejected": "chosen"})
    assert training_rows(swapped)[0]["chosen"] == [assistant("No.")]
    data = prepared_whole(file, columns={"completion": "chosen"})
    assert sorted(data.tables()) == ["demonstrations", "prompts"]


def test_labels_are_read_from_numbers_and_words_and_a_completion_with_both_is_dropped(
    tmp_path: Path,
):
    labels = [(True, "a"), (0, "b"), ("False", "c"), (None, "d"), (1, "e"), (0, "e")]
    rows = [{"prompt": "Hi", "completion": text, "label": label} for label, text in labels]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [row["label"] for row in training_rows(data, "unpaired")] == [True, False, False]
    assert [row["completion"] for row in training_rows(data, "demonstrations")] == [
        [assistant("a")]
    ]
    assert data.dropped == {
        "unpaired: contradiction": 2,
        "unpaired: no label": 1,
    }


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        ({"up": True, "down": False}, ["up", "Down", "sideways"]),
        ({1: True, -1: False}, [1, -1.0, 0]),
        ({"chosen": True, "rejected": False}, ["chosen", "rejected", "true"]),
    ],
)
def test_labels_of_the_source_are_mapped_and_others_dropped(
    labels: dict[Any, bool], values: list[Any], tmp_path: Path
):
    rows = [{"prompt": f"{i}", "completion": "a", "label": v} for i, v in enumerate(values)]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows), labels=labels)
    assert [row["label"] for row in training_rows(data, "unpaired")] == [True, False]
    assert data.dropped == {"unpaired: label is not true or false": 1}


def test_columns_and_fields_that_are_not_read_are_counted(tmp_path: Path):
    rows = [
        {**PAIR, "id": 1, "source": "x", "note": None},
        {**PAIR, "prompt": [{**user("Go"), "name": "Ann"}], "id": 2, "source": ""},
    ]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows), keep_columns=["source"])
    assert data.findings["not_read"] == {"column `id`": 2, "field `name` of turns": 1}


def test_instruction_and_input_of_alpaca_are_one_prompt(tmp_path: Path):
    rows = [{"instruction": "Add.", "input": text, "output": "x"} for text in ("1 + 2", " ")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "instruction", "completion": "output"}
    for column_map in (columns, {**columns, "input": "input"}):
        data = prepared_whole(file, columns=column_map)
        prompts = [row["prompt"] for row in training_rows(data, "demonstrations")]
        assert prompts == [[user("Add.\n\n1 + 2")], [user("Add.")]]
        assert "not_read" not in data.findings


def test_a_column_input_beside_a_prompt_is_not_read_unless_it_is_mapped(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "input": "1"}])
    data = prepared_whole(file)
    assert training_rows(data)[0]["prompt"] == [user("Say a word.")]
    assert data.findings["not_read"] == {"column `input`": 1}
    mapped = prepared_whole(file, columns={"input": "input"})
    assert training_rows(mapped)[0]["prompt"] == [user("Say a word.\n\n1")]


def test_rows_with_different_systems_do_not_contradict_each_other(tmp_path: Path):
    sides = {"chosen": "Yes.", "rejected": "No."}
    swapped = {"chosen": "No.", "rejected": "Yes."}
    rows = [
        {"system": "Agree.", "question": "So?", **sides},
        {"system": "Refuse.", "question": "So?", **swapped},
        {"system": "", "question": "And?", **sides},
    ]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", rows), columns={"prompt": "question"})
    assert data.dropped == {}
    assert [row["prompt"] for row in training_rows(data)] == [
        [system("Agree."), user("So?")],
        [system("Refuse."), user("So?")],
        [user("And?")],
    ]


def test_a_separate_source_of_demonstrations_replaces_them(tmp_path: Path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    demonstrations = write_jsonl(
        tmp_path / "demonstrations.jsonl", [{"messages": [user("Hi"), assistant("Hey")]}] * 2
    )
    data = prepared_whole(pairs, demonstrations=demonstrations)
    assert [row["completion"] for row in training_rows(data, "demonstrations")] == [
        [assistant("Hey")]
    ]
    assert data.read == {"demonstrations": 2, "pairs": 1}
    assert data.dropped == {"demonstrations: exact duplicate": 1}
    assert [file.name for file in data.files] == ["pairs.jsonl", "demonstrations.jsonl"]


def test_demonstrations_from_labeled_completions_are_all_accounted_for(tmp_path: Path):
    completions = [
        {"prompt": f"Q {k}", "completion": f"c {k}", "label": k % 3 == 0} for k in range(60)
    ]
    completions += [{"prompt": "Q 0", "completion": "c 0", "label": True}]
    labeled = write_jsonl(tmp_path / "labeled.jsonl", completions)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{**PAIR, "prompt": f"P {k}"} for k in range(5)])
    data = prepared_whole(pairs, demonstrations=labeled)
    assert data.read["demonstrations"] == 61
    assert data.dropped == {
        "demonstrations: exact duplicate": 1,
        "demonstrations: not desirable": 40,
    }
    assert len(training_rows(data, "demonstrations")) == 20


def test_a_mixture_is_weighted_limited_and_counted_by_source(tmp_path: Path):
    one = write_jsonl(tmp_path / "one.jsonl", random_pairs(90, seed=1))
    two = write_jsonl(tmp_path / "two.jsonl", [*random_pairs(40, seed=2), *random_pairs(1, seed=1)])
    config = {
        "mixture": [{"source": one, "weight": 1.0}, {"source": two, "weight": 2.0, "max_rows": 40}]
    }
    data = prepare(Prepare.model_validate(config))
    # The second keeps its 40 rows, so the first keeps half as many.
    counts = {name: kinds["pairs"] for name, kinds in data.sources.items()}
    assert counts == {
        one: {"read": 90, "kept": 20, "dropped": {"left out by weight": 70}},
        two: {"read": 40, "kept": 40, "dropped": {}},
    }
    again = split_by_prompt(prepare(Prepare.model_validate(config)))
    other = Prepare.model_validate(config | {"split_seed": 1})
    assert set(again) == set(split_by_prompt(data)) != set(split_by_prompt(prepare(other)))
    plain = prepare(Prepare.model_validate({"mixture": [{"source": one}, {"source": two}]}))
    assert plain.dropped == {"pairs: exact duplicate": 1}
    assert plain.sources[two]["pairs"]["dropped"] == {"exact duplicate": 1}


def test_max_rows_counts_over_the_files_of_a_folder(tmp_path: Path):
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", random_pairs(30, seed=len(name) + ord(name[0])))
    assert prepared(str(tmp_path), max_rows=40).read == {"pairs": 40}


def test_evaluation_prompts_are_dropped_exactly_and_by_runs_of_words(tmp_path: Path):
    rows = random_pairs(60)
    evaluation = [
        {"prompt": rows[0]["prompt"].upper() + "?!"},  # the same words
        {"question": "Now " + rows[1]["prompt"] + " and more of it"},  # 14 words in a row
        {"messages": [{"role": "user", "content": "Item 0"}]},  # short: only matched as a whole
        {"prompt": " ".join(rows[3]["prompt"].split()[:11])},  # 12 words: no run of 13
    ]
    bench = write_jsonl(tmp_path / "bench.jsonl", evaluation)
    data = prepared(write_jsonl(tmp_path / "a.jsonl", rows), decontaminate=[bench])
    assert data.dropped == {
        f"pairs: prompt is in {bench}": 1,
        f"pairs: prompt shares 13 words in a row with {bench}": 1,
    }
    assert not {rows[0]["prompt"], rows[1]["prompt"]} & set(split_by_prompt(data))
    other = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p"}, {"text": "a", "id": 1}])
    with pytest.raises(UserError) as error:
        prepared("embedded", decontaminate=[other])
    assert str(error.value) == (
        f"decontaminate: {other}: 1 rows have no text in `prompt`, `messages`, `question` or"
        f" `instruction` (row 2 of {other} has `text`, `id`); rename the column that contains the"
        " prompt"
    )
    assert user_texts({"prompt": None, "question": "p"}) == ["p"]  # as Parquet joins two layouts


def test_all_files_of_a_folder_are_evaluation_prompts_and_null_is_not_text(tmp_path: Path):
    rows = random_pairs(60)
    folder = tmp_path / "bench"
    folder.mkdir()
    for k, name in enumerate(("test", "dev")):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": rows[k]["prompt"]}])
    source = write_jsonl(tmp_path / "a.jsonl", [*rows, {**rows[2], "prompt": "None"}])
    data = prepared(source, decontaminate=[str(folder)])
    assert data.dropped == {f"pairs: prompt is in {folder}": 2}
    empty = [{"messages": [{"role": "user", "content": None}]}]
    with pytest.raises(UserError, match="1 rows have no text in `prompt`"):
        prepared(source, decontaminate=[write_jsonl(tmp_path / "x.jsonl", empty)])


def test_kept_columns_are_copied_from_the_first_row_of_a_prompt(tmp_path: Path):
    rows = [{**r, "tests": [k], "meta": {"level": k}} for k, r in enumerate(random_pairs(40))]
    rows.append({**rows[0], "rejected": "other", "tests": [99]})
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out"
    run_prepare(Prepare(source=source, keep_columns=["tests", "meta"]), out)
    copied = [
        r
        for s in ("train", "test")
        for r in pq.read_table(out / f"prompts-{s}.parquet").to_pylist()
    ]
    assert sorted((json.loads(r["tests"]), json.loads(r["meta"])["level"]) for r in copied) == [
        ([k], k) for k in range(40)
    ]
    assert pq.read_schema(out / "pairs-train.parquet").names[-1] == "prompt_id"
    with pytest.raises(
        UserError, match=r"keep_columns: .* has no column `test`; did you mean `tests`"
    ):
        prepared(source, keep_columns=["test"])


def test_kept_objects_with_other_fields_in_later_rows_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_tables, "ROW_GROUP", 10)
    metas = [{"level": k} if k < 30 else {"depth": [k]} for k in range(60)]
    rows = [{**row, "meta": meta} for row, meta in zip(random_pairs(60), metas, strict=True)]
    out = tmp_path / "out"
    config = Prepare(
        source=write_jsonl(tmp_path / "a.jsonl", rows), keep_columns=["meta"], test_fraction=0.0
    )
    run_prepare(config, out)
    copied = pq.read_table(out / "prompts-train.parquet")["meta"].to_pylist()
    assert [json.loads(text) for text in copied] == metas


def test_importing_the_stage_imports_no_heavy_library():
    code = (
        "import sys, align.stages.prepare;"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == "[]"


def test_a_full_disk_for_temporary_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("align.data.row_store.pickle.dump", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*set TMPDIR to another") as error:
        training_rows(prepared_whole(write_jsonl(tmp_path / "a.jsonl", [PAIR])))
    assert len(error.value.lines) == 1


def test_a_negative_seed_of_the_split_is_refused():
    with pytest.raises(ValueError, match="split_seed"):
        Prepare.model_validate({"source": "embedded", "split_seed": -1})
