"""The stage `prepare`: tables, data card, metrics and remarks; the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.preference_data import CHECKOUT, run_prepare

from align.config.data import Prepare
from align.errors import UserError
from align.runtime.progress import Logger, NullDisplay
from align.stages import prepare


def config(source: object = "embedded", **keys: Any) -> Prepare:
    return Prepare.model_validate({"source": str(source), **keys})


def pairs_file(path: Path, n: int = 60) -> Path:
    rows = [{"prompt": f"Say {k}.", "chosen": f"It is {k}.", "rejected": "No."} for k in range(n)]
    rows += [{**rows[0]}, {**rows[1], "rejected": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Embedded(NamedTuple):
    """The stage with the embedded data set: its folder, and its metrics."""

    folder: Path
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    folder = tmp_path_factory.mktemp("embedded")
    return Embedded(folder, run_prepare(config(), folder))


def test_the_embedded_data_set_is_written_as_conversational_parquet(embedded: Embedded):
    folder, metrics = embedded
    names = [f"{k}-{s}.parquet" for k in ("demonstrations", "pairs", "prompts")
             for s in ("test", "train")]  # fmt: skip
    assert sorted(file.name for file in folder.iterdir()) == sorted(["README.md", *names])
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pq.read_table(folder / "pairs-train.parquet")
    assert table.schema.names == ["prompt", "chosen", "rejected", "prompt_id"]
    assert [table.schema.field(name).type for name in ("prompt", "chosen")] == [turns, turns]
    assert table.num_rows == metrics["pairs"]["train"]
    row = table.to_pylist()[0]
    assert [turn["role"] for turn in row["prompt"] + row["chosen"]] == ["user", "assistant"]
    assert metrics["rows"]["pairs"] == sum(metrics["pairs"].values()) + sum(
        n for reason, n in metrics["dropped"].items() if reason.startswith("pairs")
    )
    assert json.loads(json.dumps(metrics)) == metrics


def test_the_prompts_are_those_of_the_other_tables_once_each(embedded: Embedded):
    def ids(kind: str, split: str) -> list[str]:
        return pq.read_table(embedded.folder / f"{kind}-{split}.parquet")["prompt_id"].to_pylist()

    for split in ("train", "test"):
        prompts = ids("prompts", split)
        assert len(prompts) == len(set(prompts))
        assert set(prompts) == {*ids("pairs", split), *ids("demonstrations", split)}
    assert not set(ids("prompts", "train")) & set(ids("prompts", "test"))


def test_the_same_source_and_configuration_give_the_same_bytes(tmp_path: Path):
    def digests(folder: Path, **keys: Any) -> dict[str, str]:
        run_prepare(config(pairs_file(tmp_path / "a.jsonl"), **keys), folder)
        files = sorted(folder.iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    first = digests(tmp_path / "first")
    assert len(first) == 7
    assert digests(tmp_path / "second") == first
    assert digests(tmp_path / "third", split_seed=1) != first


def test_the_data_card_contains_counts_drops_configuration_and_digests(tmp_path: Path):
    source = pairs_file(tmp_path / "a.jsonl")
    metrics = run_prepare(config(source, validation_fraction=0.2), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    counts = [metrics["pairs"][split] for split in ("train", "test", "validation")]
    assert sum(counts) == 60
    assert f"| pairs | 62 | 60 | {counts[0]} | {counts[1]} | {counts[2]} |" in card
    assert "| pairs: blank completion | 1 |" in card
    assert "| pairs: exact duplicate | 1 |" in card
    assert hashlib.sha256(source.read_bytes()).hexdigest() in card
    assert "| validation_fraction | `0.2` |" in card
    assert "License: unknown; see the source." in card
    # "It is 7." has three words, "No." one: the chosen completion is always the longer one
    assert "**Warning:** always preferring the longer completion is right for 100.0%" in card
    assert "The demonstrations are the chosen" in card


def test_the_data_card_has_the_license_of_the_embedded_data_set_and_no_local_path(
    embedded: Embedded,
):
    card = (embedded.folder / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "| data/embedded/pairs.jsonl.gz | " in card
    assert str(CHECKOUT) not in card


@pytest.mark.filterwarnings("ignore")  # from importing `datasets`
def test_datasets_loads_the_folder_by_the_header_of_the_card(tmp_path: Path):
    import datasets

    run_prepare(config(pairs_file(tmp_path / "a.jsonl")), tmp_path / "out")
    dataset = datasets.load_dataset(
        str(tmp_path / "out"), "pairs", split="test", cache_dir=str(tmp_path / "cache")
    )
    expected = pq.read_table(tmp_path / "out" / "pairs-test.parquet").to_pylist()
    assert dataset.to_list() == expected


def test_a_source_with_only_demonstrations_writes_no_pairs(tmp_path: Path):
    source = tmp_path / "a.jsonl"
    rows = [{"prompt": f"Say {k}.", "completion": "No."} for k in range(60)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = run_prepare(config(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("pairs*"))
    assert "chosen_longer_share" not in metrics
    assert (metrics["words"]["prompt_median"], metrics["words"]["completion_p95"]) == (2, 1)


def test_an_error_is_raised_before_anything_is_written(tmp_path: Path):
    with pytest.raises(UserError, match="is in split `test`"):
        run_prepare(config(pairs_file(tmp_path / "a.jsonl"), test_fraction=1e-9), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_states_how_prompts_are_split(tmp_path: Path):
    source = pairs_file(tmp_path / "a.jsonl")
    cards = {}
    for name, keys in {"plain": {}, "near": {"near_duplicates": "keep"}}.items():
        run_prepare(config(source, **keys), tmp_path / name)
        cards[name] = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert all("up to its first user turn, including a system turn" in c for c in cards.values())
    words = "Near-duplicate prompts have the split of the first one"
    assert [words in card for card in cards.values()] == [False, True]


def test_the_remarks_are_counts_dropped_rows_and_warnings(tmp_path: Path):
    source = pairs_file(tmp_path / "a.jsonl")
    logger = Logger("prepare", tmp_path, NullDisplay(), main=True)
    result = prepare.run(config(source), {}, tmp_path / "out", logger)
    counts = result.metrics["pairs"]
    assert result.remarks[1:] == (
        f"{counts['train']} pairs for training, {counts['test']} held out",
        "dropped 1 × pairs: blank completion (row 62: `rejected`)",
        "dropped 1 × pairs: exact duplicate (row 61, like row 1)",
        f"warning: {result.metrics['warnings'][0]}",
    )
    assert result.remarks[0].endswith("held out")
    assert " demonstrations for training, " in result.remarks[0]
