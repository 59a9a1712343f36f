"""The commands of ``align data``, and tokenized rows that agree with TRL's batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_models

from align.cli import data, main
from align.config.data import Prepare
from align.config.training import DPO
from align.training import token_view


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["align", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    return int(left.value.code or 0)


def test_prepare_writes_a_folder_once_and_doctor_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [{"q": f"Say {k}.", "chosen": f"It is {k}.", "rejected": "No."} for k in range(60)]
    Path(tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)
    told = ["a.jsonl", "columns={prompt: q}", "test_fraction=0.2"]
    assert command(["data", "doctor", *told], monkeypatch) == 0
    assert "always preferring the longer completion" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    assert command(["data", "prepare", *told, "--out", "out"], monkeypatch) == 0
    assert (tmp_path / "out" / "pairs-test.parquet").is_file()
    assert command(["data", "prepare", *told, "--out", "out"], monkeypatch) == 2
    assert "out: already exists" in capsys.readouterr().err


def test_mistakes_are_told_all_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(["data", "doctor", "embedded", "redaer=hh", "max_rows=x"], monkeypatch) == 2
    assert capsys.readouterr().err.splitlines() == [
        "command line: prepare.max_rows: expected a whole number, got the text 'x'",
        "command line: prepare.redaer: unknown key; did you mean `reader`?",
    ]
    assert command(["data", "show", "embedded", "--stage", "dop"], monkeypatch) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.filterwarnings("ignore")
def test_the_marked_tokens_are_those_that_trl_trains_on(tmp_path_factory: pytest.TempPathFactory):
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    told = Prepare(source="embedded", max_rows=60, test_fraction=0.25)
    found = token_view.tokenized_rows(told, "dpo", str(world.sft), 3)
    from align.stages import dpo

    folder = tmp_path_factory.mktemp("dpo")
    settings = DPO(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 1})
    trainer = dpo.build(settings, {"model": world.sft, "pairs": world.data}, folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    real = batch["attention_mask"] == 1
    expected: list[Any] = [
        ids[keep].tolist() for ids, keep in zip(batch["input_ids"], real, strict=True)
    ]
    assert [stream.ids for stream in found] == expected
    masks = [m[keep].tolist() for m, keep in zip(batch["completion_mask"], real, strict=True)]
    assert [[int(t) for t in stream.trained] for stream in found] == masks
    assert all("is included and trained" in stream.remark for stream in found)
    assert ["chosen" in stream.title for stream in found] == [True] * 3 + [False] * 3

    for name in ("sft", "kto", "reward", "ppo"):
        streams = token_view.tokenized_rows(told, name, str(world.sft), 2)
        assert len(streams) == (4 if name == "reward" else 2), name
        assert "".join(streams[0].tokens).startswith("<|im_start|>user")
        assert any(streams[0].trained) == (name != "ppo")
    sft = token_view.tokenized_rows(told, "sft", str(world.sft), 1)[0]
    start = sft.trained.index(True)
    assert "".join(sft.tokens[:start]).endswith("<|im_start|>assistant\n")
    assert all(sft.trained[start:])


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_left_out_or_cut_are_said_to_be(tmp_path_factory: pytest.TempPathFactory):
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("long")
    long = "word " * 3000
    sides = {"chosen": "Yes.", "rejected": "No."}
    rows = [
        {"prompt": long, **sides},
        {"prompt": "Say it.", **sides},
        {"prompt": "Say more.", **sides, "chosen": long},
    ]
    told = Prepare(source=rows_file(folder / "a.jsonl", rows), test_fraction=0.0)

    def shown(stage: str, n: int = 3) -> dict[str, tuple[int, str]]:
        found = token_view.tokenized_rows(told, stage, str(world.sft), n)
        return {stream.title: (sum(stream.trained), stream.remark) for stream in found}

    for stage in ("dpo", "sft"):
        found = shown(stage)
        assert found.pop("row 1") == (
            0, "left out by TRL: its prompt alone fills `max_length` 1024",
        )  # fmt: skip
        titles = [title for title in found if not title.endswith("rejected")]
        assert [title.partition(",")[0] for title in titles] == ["row 2", "row 3"]
        assert "is included and trained" in found[titles[0]][1]
        assert found[titles[1]][1] == "cut at `max_length` 1024: eos '<|im_end|>' is lost"
        assert list(shown(stage, 1)) == ["row 1"]
    reward = shown("reward")
    assert list(reward) == ["row 1", "row 2, chosen", "row 2, rejected", "row 3"]
    for title in ("row 1", "row 3"):
        trained, remark = reward[title]
        assert trained == 0 and remark.startswith("left out by the reward stage: its longer side")


def test_a_mixture_stands_in_place_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        rows = [
            {"prompt": f"Say {name} {k}.", "chosen": f"It is {k}.", "rejected": "No."}
            for k in range(40)
        ]
        rows_file(tmp_path / f"{name}.jsonl", rows)
    told = ["mixture=[{source: a.jsonl}, {source: b.jsonl}]", "test_fraction=0.2"]
    for order in (told, told[::-1]):
        assert command(["data", "doctor", *order], monkeypatch) == 0
        out = capsys.readouterr().out
        assert "b.jsonl: 40 pairs read, 40 kept" in out
    assert command(["data", "prepare", *told, "--out", "out"], monkeypatch) == 0
    assert "a.jsonl + b.jsonl → out" in capsys.readouterr().out
    assert command(["data", "doctor", "a.jsonl", told[0]], monkeypatch) == 2
    assert "set either `source` or `mixture`" in capsys.readouterr().err


def test_a_source_s_name_is_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x #1.jsonl", "a: b.jsonl", "1e3", "é \U0001f600.jsonl"):
        assert data.prepare_config(name, None).source == name


def test_prepare_leaves_a_whole_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [
        {"prompt": f"Say {k}.", "chosen": f"It is {k}.", "rejected": "No.", "note": k if k else "x"}
        for k in range(60)
    ]
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "a.jsonl", rows)
    told = ["data", "prepare", "a.jsonl", "--out", "out"]
    assert command([*told, "keep_columns=[note]"], monkeypatch) == 2
    assert "the values of a kept column differ in type" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    assert command([*told[:-1], "a.jsonl/out"], monkeypatch) == 2
    assert "a.jsonl/out.partial: cannot be created: Not a directory" in capsys.readouterr().err
    (tmp_path / "out.partial").mkdir()
    assert command(told, monkeypatch) == 2
    assert "out.partial: already exists, from an interrupted run" in capsys.readouterr().err
    (tmp_path / "out.partial").rmdir()
    (tmp_path / "out").mkdir()  # an empty one is no obstacle
    assert command(told, monkeypatch) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert (tmp_path / "out" / "README.md").is_file()
