"""Tests of checksums: damaged checkpoints are passed over, damaged JSON is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.damage import DAMAGES

from align.errors import ArtifactError
from align.runtime import artifacts, checkpoints, checksums

WEIGHTS = "weights of step"


def make(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(f"{WEIGHTS} {step}")
    (path / "state.json").write_text(json.dumps({"step": step}))
    checkpoints.mark_complete(path, world_size=1)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "complete.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path, name, damage):
    lines: list[str] = []
    older, newest = make(tmp_path, 9), make(tmp_path, 10)
    DAMAGES[damage](newest / name)
    checkpoints.set_aside_damaged(tmp_path, lines.append)
    assert checkpoints.last_checkpoint(tmp_path, world_size=1) == older
    if name == "complete.json" and damage in ("deleted", "a link to itself"):
        assert lines == []  # as if it had been interrupted while it was written
    else:
        assert len(lines) == 1
        assert f"checkpoint-10/{name}" in lines[0]
        assert lines[0].endswith("passed over, and kept as damaged-checkpoint-10")
        assert not newest.exists()
    make(tmp_path, 11)  # training continues
    checkpoints.set_aside_damaged(tmp_path, pytest.fail)


@pytest.mark.parametrize("kind", ["a file", "a link", "a link to itself"])
def test_something_else_with_the_name_of_a_checkpoint_is_set_aside(tmp_path, kind):
    folder = tmp_path / "sft-1"
    make(folder, 5)
    path = folder / "checkpoint-8"
    match kind:
        case "a file":
            path.write_text("x")
        case "a link":
            path.symlink_to(make(tmp_path / "elsewhere", 8))
        case "a link to itself":
            path.symlink_to(path.name)
    (folder / "checkpoint-abc").write_text("not a step, so ignored")
    lines: list[str] = []
    checkpoints.set_aside_damaged(folder, lines.append)
    assert lines == [f"{path}: not a folder; passed over, and kept as damaged-checkpoint-8"]
    assert checkpoints.list_checkpoints(folder) == [folder / "checkpoint-5"]
    assert os.path.lexists(folder / "damaged-checkpoint-8")


@pytest.mark.parametrize("source", ["sft-1/checkpoint-5", "sft-2/checkpoint-6"])
def test_a_renamed_checkpoint_and_one_of_another_stage_do_not_count(tmp_path, source):
    make(tmp_path / "sft-1", 5)
    make(tmp_path / "sft-2", 6)
    (tmp_path / source).rename(tmp_path / "sft-1" / "checkpoint-7")
    lines: list[str] = []
    checkpoints.set_aside_damaged(tmp_path / "sft-1", lines.append)
    assert [line.split(": ")[1].split(";")[0] for line in lines] == [
        f"a renamed or copied {source}"
    ]


def test_damaged_checkpoints_keep_separate_names(tmp_path):
    for _ in range(2):
        DAMAGES["emptied"](make(tmp_path, 5) / "state.json")
        checkpoints.set_aside_damaged(tmp_path, lambda line: None)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"damaged-checkpoint-5", "damaged-checkpoint-5-2"}


def test_only_the_newest_intact_checkpoint_is_read_in_full(tmp_path):
    DAMAGES["a flipped bit"](make(tmp_path, 1) / "model.safetensors")
    make(tmp_path, 2)
    checkpoints.set_aside_damaged(tmp_path, pytest.fail)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "emptied", "deleted", "a folder"])
def test_a_changed_log_is_announced(tmp_path, damage):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n')
    make(tmp_path, 2)
    with log.open("a") as file:
        file.write('{"step": 3}\n')
    checkpoints.set_aside_damaged(tmp_path, pytest.fail)
    if damage == "truncated":
        log.write_text('{"step": 1}\n')
    else:
        DAMAGES[damage](log)
    lines: list[str] = []
    checkpoints.set_aside_damaged(tmp_path, lines.append)
    assert lines == [f"{log}: changed after it was written; its lines may be wrong"]


def test_files_and_folders_are_flushed_before_the_mark_is_written(tmp_path, monkeypatch):
    flushed: list[str] = []
    monkeypatch.setattr(checksums, "flush", lambda path: flushed.append(path.name))
    written = []
    monkeypatch.setattr(checkpoints, "write_json", lambda path, data: written.append(list(flushed)))
    folder = tmp_path / "checkpoint-3"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "0.pt").write_text("x")
    (folder / "model.safetensors").write_text("x")
    checkpoints.mark_complete(folder, world_size=1)
    assert set(written[0]) == {
        "0.pt", "model.safetensors", "shards", "checkpoint-3", tmp_path.name
    }  # fmt: skip


def test_a_sealed_object_survives_json_and_no_change(tmp_path):
    data = {"b": (1, 2.5e-7, float("inf")), "a": {10: "ü\u2028", 9: None}, "n": [True]}
    file = tmp_path / "x.json"
    artifacts.write_json(file, checksums.seal(data))
    assert checksums.read_sealed(file) == json.loads(json.dumps(data))
    text = file.read_text()
    for changed in (
        text.replace("2.5e-07", "2.6e-07"),
        text.replace("checksum", "checksun"),
        text.replace('"a"', '"A"'),
        text.replace("true", "1"),
        "null",
        "1",
        "",
    ):
        assert changed != text
        file.write_text(changed)
        with pytest.raises(ArtifactError, match=r"x\.json: "):
            checksums.read_sealed(file)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / artifacts.FILE)
    with pytest.raises(ArtifactError, match=r"artifact.json: damaged, not a JSON object"):
        artifacts.read_artifact(tmp_path)
