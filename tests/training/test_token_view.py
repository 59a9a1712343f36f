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
from align.models import tokenization
from align.training import token_view


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["align", *arguments])
    with pytest.raises(SystemExit) as raised:
        main.main()
    return int(raised.value.code or 0)


def test_prepare_writes_a_folder_and_doctor_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [{"q": f"Say {k}.", "chosen": f"It is {k}.", "rejected": "No."} for k in range(60)]
    Path(tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)
    arguments = ["a.jsonl", "columns={prompt: q}", "test_fraction=0.2"]
    assert command(["data", "doctor", *arguments], monkeypatch) == 0
    assert "always preferring the longer completion" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    assert command(["data", "prepare", *arguments, "--out", "out"], monkeypatch) == 0
    assert (tmp_path / "out" / "pairs-test.parquet").is_file()
    assert command(["data", "prepare", *arguments, "--out", "out"], monkeypatch) == 2
    assert "out: already exists" in capsys.readouterr().err


def test_all_errors_are_reported_at_once(
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
    prepare = Prepare(source="embedded", max_rows=60, test_fraction=0.25)
    rows = token_view.tokenized_rows(prepare, "dpo", str(world.sft), 3)
    from align.stages import dpo

    folder = tmp_path_factory.mktemp("dpo")
    config = DPO(model="sft", trainer=tiny_models.TRAINER | {"max_steps": 1})
    trainer = dpo.build(config, {"model": world.sft, "pairs": world.data}, folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    real = batch["attention_mask"] == 1
    expected: list[Any] = [
        ids[keep].tolist() for ids, keep in zip(batch["input_ids"], real, strict=True)
    ]
    assert [row.ids for row in rows] == expected
    masks = [m[keep].tolist() for m, keep in zip(batch["completion_mask"], real, strict=True)]
    assert [[int(t) for t in row.trained] for row in rows] == masks
    assert all("is included and trained" in row.remark for row in rows)
    assert ["chosen" in row.title for row in rows] == [True] * 3 + [False] * 3

    for name in ("sft", "kto", "reward", "ppo"):
        rows = token_view.tokenized_rows(prepare, name, str(world.sft), 2)
        assert len(rows) == (4 if name == "reward" else 2), name
        assert "".join(rows[0].tokens).startswith("<|im_start|>user")
        assert any(rows[0].trained) == (name != "ppo")
    sft = token_view.tokenized_rows(prepare, "sft", str(world.sft), 1)[0]
    start = sft.trained.index(True)
    assert "".join(sft.tokens[:start]).endswith("<|im_start|>assistant\n")
    assert all(sft.trained[start:])


@pytest.mark.filterwarnings("ignore")
def test_all_turns_of_a_demonstration_are_marked(tmp_path_factory: pytest.TempPathFactory):
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("turns")
    roles = ("user", "assistant") * 2
    texts = ("Say it.", "It.", "Say more.", "More.")
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    source = rows_file(folder / "a.jsonl", [{"messages": turns}, {"messages": turns[2:]}])
    prepare = Prepare(source=source, test_fraction=0.0)
    both, single = token_view.tokenized_rows(prepare, "sft", str(world.sft), 2)
    marked = [t for t, trained in zip(both.tokens, both.trained, strict=True) if trained]
    assert "".join(marked) == "It.<|im_end|>More.<|im_end|>"
    assert both.remark == "end token '<|im_end|>' is included and trained, in each of 2 turns"
    assert both.title == "row 1, demonstration"
    n_both, n_single = sum(both.trained), sum(single.trained)
    middle = (n_both + n_single) / 2
    words = f"trained tokens per row: mean {middle:.1f}, median {middle:g}"
    assert token_view.trained_tokens([both, single]) == words
    none = token_view.TokenizedRow(2, "", [], [], [], "left out")
    assert token_view.trained_tokens([both, single, none]).endswith("; 1 of 3 rows: none")
    sides = [
        token_view.TokenizedRow(0, side, [1, 2, 2], ["a"] * 3, [False, True, True], "")
        for side in ("chosen", "rejected")
    ]
    assert token_view.trained_tokens(sides) == "trained tokens per pair: mean 4.0, median 4"
    last, _ = token_view.tokenized_rows(prepare, "sft", str(world.sft), 2, train_on="last")
    assert sum(last.trained) == n_single
    template = folder / "template"
    tokenizer = tokenization.load_tokenizer(world.sft)
    tokenizer.chat_template = (  # earlier answers have no `It`
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else m.content[2:] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(template)
    rows = token_view.tokenized_rows(prepare, "sft", str(template), 2)
    assert [row.title for row in rows] == [
        "row 1, demonstration, sequence 1 of 2",
        "row 1, demonstration, sequence 2 of 2",
        "row 2, demonstration",
    ]
    assert "It." in "".join(rows[0].tokens) and "It." not in "".join(rows[1].tokens)


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.filterwarnings("ignore")
def test_rows_that_are_left_out_or_truncated_have_a_remark(
    tmp_path_factory: pytest.TempPathFactory,
):
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("long")
    long = "word " * 3000
    sides = {"chosen": "Yes.", "rejected": "No."}
    rows = [
        {"prompt": long, **sides},
        {"prompt": "Say it.", **sides},
        {"prompt": "Say more.", **sides, "chosen": long},
    ]
    prepare = Prepare(source=rows_file(folder / "a.jsonl", rows), test_fraction=0.0)

    def remarks(stage: str, n: int = 3) -> dict[str, tuple[int, str]]:
        tokenized = token_view.tokenized_rows(prepare, stage, str(world.sft), n)
        return {row.title: (sum(row.trained), row.remark) for row in tokenized}

    for stage in ("dpo", "sft"):
        by_title = remarks(stage)
        assert by_title.pop("row 1") == (
            0, "left out by TRL: its prompt alone fills `max_length` 1024",
        )  # fmt: skip
        titles = [title for title in by_title if not title.endswith("rejected")]
        assert [title.partition(",")[0] for title in titles] == ["row 2", "row 3"]
        assert "is included and trained" in by_title[titles[0]][1]
        assert by_title[titles[1]][1] == "cut at `max_length` 1024: the end token is lost"
        assert list(remarks(stage, 1)) == ["row 1"]
    reward = remarks("reward")
    assert list(reward) == ["row 1", "row 2, chosen", "row 2, rejected", "row 3"]
    for title in ("row 1", "row 3"):
        trained, remark = reward[title]
        assert trained == 0 and remark.startswith("left out by the reward stage: its longer side")


def test_a_mixture_replaces_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        rows = [
            {"prompt": f"Say {name} {k}.", "chosen": f"It is {k}.", "rejected": "No."}
            for k in range(40)
        ]
        rows_file(tmp_path / f"{name}.jsonl", rows)
    arguments = ["mixture=[{source: a.jsonl}, {source: b.jsonl}]", "test_fraction=0.2"]
    for order in (arguments, arguments[::-1]):
        assert command(["data", "doctor", *order], monkeypatch) == 0
        out = capsys.readouterr().out
        assert "b.jsonl: 40 pairs read, 40 kept" in out
    assert command(["data", "prepare", *arguments, "--out", "out"], monkeypatch) == 0
    assert "a.jsonl + b.jsonl → out" in capsys.readouterr().out
    assert command(["data", "doctor", "a.jsonl", arguments[0]], monkeypatch) == 2
    assert "set either `source` or `mixture`" in capsys.readouterr().err


def test_the_name_of_a_source_is_not_parsed_as_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("x #1.jsonl", "a: b.jsonl", "1e3", "é \U0001f600.jsonl"):
        assert data.prepare_config(name, None).source == name


def test_prepare_writes_a_complete_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = [
        {"prompt": f"Say {k}.", "chosen": f"It is {k}.", "rejected": "No.", "note": k if k else "x"}
        for k in range(60)
    ]
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "a.jsonl", rows)
    arguments = ["data", "prepare", "a.jsonl", "--out", "out"]
    assert command([*arguments, "keep_columns=[note]"], monkeypatch) == 2
    assert "the values of a kept column differ in type" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    assert command([*arguments[:-1], "a.jsonl/out"], monkeypatch) == 2
    assert "a.jsonl/out.partial: cannot be created: Not a directory" in capsys.readouterr().err
    (tmp_path / "out.partial").mkdir()
    assert command(arguments, monkeypatch) == 2
    assert "out.partial: already exists, from an interrupted run" in capsys.readouterr().err
    (tmp_path / "out.partial").rmdir()
    (tmp_path / "out").mkdir()  # an empty folder is accepted
    assert command(arguments, monkeypatch) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert (tmp_path / "out" / "README.md").is_file()
