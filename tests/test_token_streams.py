"""`align data`: its commands, and token streams that agree with TRL's own batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from align import cli, token_streams
from align.settings import DPO, Prepare


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["align", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
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
    assert "out: is there already" in capsys.readouterr().err


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
    world = tiny.world(tmp_path_factory.getbasetemp())
    told = Prepare(source="embedded", max_rows=60, test_fraction=0.25)
    found = token_streams.streams(told, "dpo", str(world.sft), 3)
    from align.stages import dpo

    folder = tmp_path_factory.mktemp("dpo")
    settings = DPO(model="sft", trainer=tiny.TRAINER | {"max_steps": 1})
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
        streams = token_streams.streams(told, name, str(world.sft), 2)
        assert len(streams) == (4 if name == "reward" else 2), name
        assert "".join(streams[0].tokens).startswith("<|im_start|>user")
        assert any(streams[0].trained) == (name != "ppo")
    sft = token_streams.streams(told, "sft", str(world.sft), 1)[0]
    start = sft.trained.index(True)
    assert "".join(sft.tokens[:start]).endswith("<|im_start|>assistant\n")
    assert all(sft.trained[start:])
