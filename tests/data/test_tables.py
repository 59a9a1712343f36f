"""Tables: rows are written and read back, and a missing table gives one error with its repair."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.preference_data import random_pairs, run_prepare, write_jsonl

from align.config.data import Prepare
from align.data import tables
from align.data.rows import Row
from align.errors import UserError


def write(folder: Path, kind: str, split: str, rows: list[Row]) -> None:
    writer = tables.TableWriter(tables.table_file(folder, kind, split))
    for row in rows:
        writer.add(row)
    writer.close()


def numbered_rows(n: int) -> list[Row]:
    return [
        {"prompt": [{"role": "user", "content": str(k)}], "prompt_id": str(k)} for k in range(n)
    ]


def test_rows_are_read_in_file_order_with_all_or_some_columns(tmp_path: Path):
    rows = numbered_rows(5000)  # three row groups
    write(tmp_path, "prompts", "train", rows)
    assert tables.read(tmp_path, "prompts", "train") == rows
    ids = tables.read(tmp_path, "prompts", "train", columns=["prompt_id"])
    assert ids == [{"prompt_id": str(k)} for k in range(5000)]
    assert tables.column_names(tmp_path, "prompts", "train") == ["prompt", "prompt_id"]
    assert tables.table_names(tmp_path) == ["prompts-train"]
    assert tables.count_rows(tmp_path, "prompts", "train") == 5000
    assert tables.count_rows(tmp_path, "prompts", "test") == 0


def test_a_limited_number_of_rows_is_evenly_spaced(tmp_path: Path):
    write(tmp_path, "prompts", "train", numbered_rows(10))
    rows = tables.read(tmp_path, "prompts", "train", most=4)
    # k * 10 // 4 for k = 0, 1, 2, 3
    assert [row["prompt_id"] for row in rows] == ["0", "2", "5", "7"]
    assert len(tables.read(tmp_path, "prompts", "train", most=11)) == 10


@pytest.mark.parametrize(
    ("kind", "split", "repair"),
    [
        pytest.param(
            "pairs", "validation", "set `validation_fraction` of its `prepare` stage above 0",
            id="no prompt was held out",
        ),
        pytest.param(
            "unpaired", "train", "the source of this stage contains no unpaired: use another source",
            id="the source has no such rows",
        ),
        pytest.param(
            "unpaired", "test", "the source of this stage contains no unpaired: use another source",
            id="the source has no such rows in any split",
        ),
    ],
)  # fmt: skip
def test_a_missing_table_is_an_error_with_its_repair(
    tmp_path: Path, kind: str, split: str, repair: str
):
    source = write_jsonl(tmp_path / "a.jsonl", random_pairs(60))
    folder = tmp_path / "out"
    run_prepare(Prepare(source=source), folder)
    existing = [f"{k}-{s}" for k in ("demonstrations", "pairs", "prompts")
                for s in ("test", "train")]  # fmt: skip
    with pytest.raises(UserError) as error:
        tables.read(folder, kind, split, required_by="implicit_rewards")
    assert error.value.lines == (
        f"{folder}: no {kind}-{split}.parquet, which `implicit_rewards` requires;"
        f" found {', '.join(existing)}; {repair}",
    )


@pytest.mark.filterwarnings("ignore")  # from importing `datasets`
def test_trl_gets_a_data_set_none_without_a_held_out_split_and_an_error_without_training_rows(
    tmp_path: Path,
):
    write(tmp_path, "prompts", "train", numbered_rows(3))
    dataset = tables.load_dataset(tmp_path, "prompts", "train", tmp_path)
    assert dataset is not None
    assert dataset["prompt_id"][:] == ["0", "1", "2"]
    assert tables.load_dataset(tmp_path, "prompts", "validation", tmp_path) is None
    with pytest.raises(UserError, match=r"no pairs-train.parquet; found prompts-train; the source"):
        tables.load_dataset(tmp_path, "pairs", "train", tmp_path)


@pytest.mark.parametrize(
    ("fields", "further", "unknown"),
    [
        pytest.param({"tools": "[]"}, {}, "tools", id="tools in a table without them"),
        pytest.param({"reasoning_content": "why"}, {}, "reasoning_content", id="a field of a turn"),
        pytest.param({"tool_calls": [], "name": "n"}, {}, "name, tool_calls", id="two fields"),
        pytest.param({}, {"label": True}, "label", id="a column that the first row lacks"),
    ],
)
def test_a_field_that_the_table_does_not_store_is_an_error(
    tmp_path: Path, fields: Row, further: Row, unknown: str
):
    writer = tables.TableWriter(tables.table_file(tmp_path, "prompts", "train"))
    first, second = numbered_rows(2)
    writer.add(first)
    second["prompt"][0] |= fields
    with pytest.raises(ValueError, match=rf"prompts-train.parquet: .*: {unknown}$"):
        writer.add(second | further)
    writer.close()
    assert tables.read(tmp_path, "prompts", "train") == [first]


def test_a_field_of_every_turn_is_stored_where_the_table_has_it(tmp_path: Path):
    file = tables.table_file(tmp_path, "prompts", "train")
    writer = tables.TableWriter(file, {"tools", "reasoning_content"})
    first, second = numbered_rows(2)
    first["prompt"][0] |= {"tools": "[]", "reasoning_content": "why"}
    for row in (first, second):
        writer.add(row)
    writer.close()
    assert tables.read(tmp_path, "prompts", "train") == [first, second]


def test_a_damaged_table_is_named(tmp_path: Path):
    tables.table_file(tmp_path, "pairs", "train").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    for read in (tables.read, tables.column_names, tables.count_rows):
        with pytest.raises(UserError, match=r"pairs-train.parquet: damaged .*--force"):
            read(tmp_path, "pairs", "train")


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("name", ["runs [v1]", "runs*", "what?", "{a,b}", "é !x"])
def test_the_path_of_a_table_is_not_read_as_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, relative: bool
):
    monkeypatch.chdir(tmp_path)
    folder = Path(name) if relative else tmp_path / name
    folder.mkdir()
    write(folder, "prompts", "train", numbered_rows(3))
    other = tmp_path / "runs1"  # matches the pattern `runs*`
    other.mkdir()
    write(other, "prompts", "train", numbered_rows(5))
    dataset = tables.load_dataset(folder, "prompts", "train", folder)
    assert dataset is not None
    assert len(dataset) == 3
