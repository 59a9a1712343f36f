"""Folders: which files belong to a split. Expected files are those of ``datasets.load_dataset``,
except where the comment of a case gives another reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.preference_data import PAIR, prepared_whole, write_jsonl

from align.data.folders import split_files
from align.errors import DataError


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train/0000.jsonl", "test/0000.jsonl"], "train", ["train/0000.jsonl"]),
        (["data/train/0.jsonl", "data/test/0.jsonl"], "test", ["data/test/0.jsonl"]),
        (["default/train/0.jsonl", "default/dev/0.jsonl"], "validation", ["default/dev/0.jsonl"]),
        (
            ["data/train_prefs-00000-of-00001.jsonl", "data/test_prefs-00000-of-00001.jsonl"],
            "train_prefs",
            ["data/train_prefs-00000-of-00001.jsonl"],
        ),
        (["train_prefs/0.jsonl", "test_prefs/0.jsonl"], "train_prefs", ["train_prefs/0.jsonl"]),
        (["train_prefs.jsonl", "test_prefs.jsonl"], "train", ["train_prefs.jsonl"]),
        (["pairs-train.jsonl", "demonstrations-train.jsonl", "pairs-test.jsonl"], "train",
         ["demonstrations-train.jsonl", "pairs-train.jsonl"]),
        (["train.jsonl", "train_prefs.jsonl"], "train", ["train.jsonl"]),  # the exact name first
        (["Train.JSONL", "contrast.jsonl"], "train", ["Train.JSONL"]),  # no word of `contrast`
        (["my.train.v2.jsonl", "my.test.v2.jsonl"], "train", ["my.train.v2.jsonl"]),
        (["train/a.jsonl", "train/test_cases.jsonl"], "train",
         ["train/a.jsonl", "train/test_cases.jsonl"]),
        (["a.jsonl", "b/c.jsonl"], "train", ["a.jsonl", "b/c.jsonl"]),
        (["data/good-00000-of-00001.jsonl", "data/bad-00000-of-00001.jsonl"], "good",
         ["data/good-00000-of-00001.jsonl"]),
        (["train/a.jsonl", "test/a.jsonl", "dataset_info.json"], "",
         ["test/a.jsonl", "train/a.jsonl"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(files: list[str], split: str, expected: list[str], tmp_path: Path):
    folder = tmp_path / "test"  # the name of the folder itself names no split
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    read = [file.relative_to(folder).as_posix() for file in split_files(folder, split)]
    assert read == expected


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train.jsonl", "test.jsonl"], "tset", "no files of split `tset`; found `test`, `train`;"),
        (["a.jsonl"], "test", "no files of split `test`; its paths name no split"),
        (["a.jsonl", "test.jsonl"], "train",
         "no files of split `train`; found `test` and 1 file whose path names no split;"),
        (["train_gen.jsonl", "train_sft.jsonl"], "train", "found `train_gen`, `train_sft`; set"),
        (["train_prefs-00000-of-00001.jsonl"], "train", "found `train_prefs`; set `data_split`"),
        (["train/test.jsonl"], "train", "its path names the splits `train` and `test`"),
    ],
)  # fmt: skip
def test_an_unknown_split_lists_those_found(
    files: list[str], split: str, message: str, tmp_path: Path
):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError) as error:
        split_files(tmp_path, split)
    assert message in str(error.value)


def test_a_folder_with_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("align.data.folders.MAX_ENTRIES", 3)
    for n in range(4):
        (tmp_path / f"{n}.jsonl").touch()
    with pytest.raises(DataError, match="more than 3 files and folders; name the folder"):
        split_files(tmp_path, "train")


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl: neither a regular file nor a folder"):
        prepared_whole(tmp_path / "a.jsonl")


def test_a_folder_of_save_to_disk_is_refused_with_its_repair(tmp_path: Path):
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="written by `save_to_disk`; convert it to Parquet"):
        split_files(tmp_path, "train")


@pytest.mark.parametrize("key", ["config", "data_dir", "revision", "data_split"])
def test_keys_of_a_hub_data_set_are_refused_for_a_file(key: str, tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    with pytest.raises(DataError, match=f"`{key}` has no effect on local data"):
        prepared_whole(file, **{key: "test"})
