"""Dropped rows are shown with their reason, their number and the first of them, everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.preference_data import (
    PAIR,
    assistant,
    prepared,
    prepared_whole,
    random_pairs,
    run_prepare,
    system,
    user,
    write_jsonl,
)
from rich.console import Console

from align.config.data import Prepare
from align.config.recipe import ErrorCollector, load_recipe
from align.data import doctor, statistics
from align.data.row_store import Places
from align.errors import DataError
from align.pipeline import token_lengths
from align.pipeline.plan import plan

ROWS = random_pairs(60)
BLANK = {**PAIR, "rejected": " "}
WRONG = {**PAIR, "prompt": [user("a"), {"role": "human", "content": "b"}]}
EXAMPLES = {
    "pairs: blank completion": "row 3: `rejected`",
    "pairs: contradiction": "row 1, against row 63",
    "pairs: exact duplicate": "row 64, like row 5",
    "pairs: wrong roles": "row 61: turn 2: role `human`; allowed are `system`, `user`, `assistant`,"
    " `tool`",
}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """60 pairs with two blank ones, a turn of another role, a contradiction and a duplicate."""
    swapped = {**ROWS[0], "chosen": ROWS[0]["rejected"], "rejected": ROWS[0]["chosen"]}
    rows = [*ROWS[:2], BLANK, *ROWS[2:59], WRONG, BLANK, swapped, ROWS[3]]
    return write_jsonl(tmp_path / "a.jsonl", rows)


def test_doctor_card_remarks_and_check_show_the_first_row_of_each_reason(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = Prepare(source=source, test_fraction=0.2)
    report = doctor.examine(config)
    assert report.statistics["dropped_examples"] == EXAMPLES
    counts = {**dict.fromkeys(EXAMPLES, 1), "pairs: blank completion": 2, "pairs: contradiction": 2}
    lines = [f"{counts[reason]} × {reason} ({example})" for reason, example in EXAMPLES.items()]
    console = Console(record=True, width=300)
    doctor.show(report, console)
    assert [f"  {line}" in console.export_text(clear=False) for line in lines] == [True] * 4
    doctor.write_html(report, tmp_path / "a.html")
    assert f"<td>{EXAMPLES['pairs: exact duplicate']}</td>" in (tmp_path / "a.html").read_text()
    assert [f"dropped {line}" for line in lines] == [
        line for line in statistics.remarks(report.statistics) if line.startswith("dropped")
    ]
    run_prepare(config, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for reason, example in EXAMPLES.items():
        assert f"| {reason} | {counts[reason]} | {example} |" in card
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(f"stages:\n  prepare: {{source: {source}, test_fraction: 0.2}}\n")
    recipe = load_recipe("r.yaml")
    checked = list(token_lengths.examine(ErrorCollector(recipe), plan(recipe, Path("runs"))))
    assert [f"prepare: dropped {line}" for line in lines] == [
        line for line in checked if "dropped" in line
    ]


def test_a_place_names_its_file_if_there_are_several(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ROWS[:3])
    second = write_jsonl(folder / "b.jsonl", [ROWS[3], BLANK, ROWS[1]])
    expected = {
        "pairs: blank completion": f"{second}, row 2: `rejected`",
        "pairs: exact duplicate": f"{second}, row 3, like {folder}/a.jsonl, row 2",
    }
    assert prepared_whole(folder).dropped_examples == expected
    mixture = [{"source": str(folder / "a.jsonl")}, {"source": second}]
    assert prepared_whole_mixture(mixture).dropped_examples == expected


def prepared_whole_mixture(mixture: list[dict[str, Any]]) -> Any:
    from align.data.prepare import prepare

    return prepare(Prepare.model_validate({"mixture": mixture, "test_fraction": 0.0}))


def test_an_empty_split_names_the_dropped_rows_first(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR, *[BLANK] * 40])
    with pytest.raises(DataError) as error:
        prepared(file, test_fraction=0.1)
    assert str(error.value) == (
        "test_fraction: 0.1: 40 of 41 pairs are dropped: 40 blank completion (row 2: `rejected`);"
        " of the rest, none of 1 prompts is in split `test`; fix these rows, raise it, set it to 0,"
        " add prompts or change `split_seed`"
    )


def test_a_warning_is_given_if_most_rows_are_dropped(tmp_path: Path):
    for n, warnings in ((30, []), (31, ["31 of 61 pairs are dropped; see the reasons"])):
        file = write_jsonl(tmp_path / "a.jsonl", [*ROWS[:30], *[BLANK] * n])
        summary = statistics.collect(prepared_whole(file)).summary()
        assert [w for w in summary["warnings"] if "dropped" in w] == warnings


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (
            {"prompt": [system("s"), user(" ")], "completion": "c"},
            "blank prompt: row 1: turn 2 (user)",
        ),
        (
            {"messages": [user("a"), assistant(3)]},
            "content is not text: row 1: turn 2 (assistant): ",
        ),
        (
            {"conversations": [{"from": "gpt", "value": 3}]},
            "content is not text: row 1: turn 1 (gpt): it",
        ),
    ],
)
def test_an_example_names_the_turn_and_its_role(row: dict[str, Any], example: str, tmp_path: Path):
    if "conversations" in row:
        good: dict[str, Any] = {"conversations": [{"from": "user", "value": "a"}] * 2}
        good["conversations"][1] = {"from": "gpt", "value": "b"}
    else:
        good = {"messages": [user("a"), assistant("b")]}
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", [row, good]))
    ((reason, place),) = data.dropped_examples.items()
    assert f"{reason}: {place}".startswith(f"demonstrations: {example}")


def test_readers_that_group_rows_name_trees_pairs_and_rows(tmp_path: Path):
    def message(name: str, parent: str | None, text: str, rank: int | None = None) -> Any:
        role = "prompter" if parent is None else "assistant"
        fields = {"message_id": name, "parent_id": parent, "text": text, "role": role}
        return {**fields, "rank": rank, "lang": "en"}

    trees = [
        *(message("a", None, "Hi"), message("b", "a", "A", 0), message("c", "a", "B", 1)),
        *(message("d", None, "Go"), message("e", "d", " ", 0), message("f", "d", "B", 1)),
        *(message("a", None, "again"), message("x", "lost", "C", 0)),
    ]
    data = prepared_whole(write_jsonl(tmp_path / "a.jsonl", trees), reader="oasst")
    assert data.dropped_examples == {
        "pairs: blank completion": "tree 2: `chosen`",
        "pairs: no tree of messages": "message `x`",
        "pairs: repeated message_id": "row 7",
    }
    votes = [
        {"prompt": "?", "first": "a", "second": "b", "decision": "first"},
        {"prompt": "!", "first": "a", "second": "b", "decision": "tie"},
        {"prompt": "?", "first": "a", "second": "b", "decision": "perhaps"},
    ]
    data = prepared_whole(write_jsonl(tmp_path / "b.jsonl", votes), reader="annotations")
    assert data.dropped_examples["pairs: tie"] == "annotated pair 2"
    assert data.dropped_examples["pairs: invalid annotation"].startswith("row 3: `decision`: ")


def test_places_are_those_that_were_added():
    added = [("row", 1), ("row", 2), ("row", 5), ("row", 5), ("row", 6), ("b, row", 1)]
    added += [("b, row", 7), ("c, row", 8), ("c, row", 9)]
    places = Places()
    for text, number in added:
        places.append(text, number)
    assert [places[i] for i in range(len(added))] == [f"{text} {n}" for text, n in added]
