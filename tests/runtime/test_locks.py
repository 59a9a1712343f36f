"""Tests of the lock of a folder."""

from __future__ import annotations

import json
import threading
import time

import pytest

from align.errors import ArtifactError
from align.runtime import artifacts
from align.runtime.locks import folder_lock


def test_the_lock_file_names_its_holder_and_stays_until_an_artifact_exists(tmp_path):
    folder = tmp_path / "new" / "dpo-1"
    with folder_lock(folder, pytest.fail):
        holder = json.loads((folder / artifacts.WORKING).read_text())
        assert holder.keys() == {"pid", "host", "since"}
        (folder / "metrics.jsonl").write_text("")
    assert (folder / artifacts.WORKING).exists()
    artifact = artifacts.Artifact("dpo", "dpo", "1", {}, {}, {}, {}, None, 0, 1, 0.0, None)
    with folder_lock(folder, pytest.fail):
        artifacts.write_artifact(folder, artifact)
    assert not (folder / artifacts.WORKING).exists()


def test_a_second_run_announces_the_holder_and_waits(tmp_path):
    entered, lines = [], []

    def second():
        with folder_lock(tmp_path, lines.append):
            entered.append(time.monotonic())

    with folder_lock(tmp_path, pytest.fail):
        thread = threading.Thread(target=second)
        thread.start()
        while not lines:
            time.sleep(0.01)
        assert entered == []
        released = time.monotonic()
    thread.join(timeout=30)
    assert entered[0] >= released
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path}: held by process ")
    assert lines[0].endswith("; waiting for it to finish")


def test_an_exception_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path, pytest.fail):
        raise ZeroDivisionError
    with folder_lock(tmp_path, pytest.fail):
        pass


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "dpo-1").write_text("")
    with pytest.raises(ArtifactError, match="cannot create this folder"):
        folder_lock(tmp_path / "dpo-1", pytest.fail).__enter__()


def test_a_folder_into_which_nothing_was_written_is_removed_and_a_waiting_run_creates_it(tmp_path):
    folder = tmp_path / "runs" / "prepare-1"
    entered, lines = [], []

    def second():
        with folder_lock(folder, lines.append):
            entered.append(json.loads((folder / artifacts.WORKING).read_text()))
            (folder / "pairs-train.parquet").write_text("rows")

    with pytest.raises(ZeroDivisionError), folder_lock(folder, pytest.fail):
        thread = threading.Thread(target=second)
        thread.start()
        while not lines:
            time.sleep(0.01)
        raise ZeroDivisionError
    thread.join(timeout=30)
    assert len(entered) == 1
    assert (folder / "pairs-train.parquet").exists()
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "other", pytest.fail):
        raise ZeroDivisionError
    assert not (tmp_path / "other").exists()
