"""Tests of ``artifact.json``: types of its values, and digests of folders from elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from align.errors import ArtifactError
from align.models import files as model_files
from align.runtime import artifacts, checksums

ARTIFACT = artifacts.Artifact("dpo", "dpo", "1" * 64, {}, {}, {}, {}, None, 0, 1, 0.0, None)


def test_an_artifact_is_read_as_it_was_written(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    artifacts.write_artifact(tmp_path, ARTIFACT)
    files = {
        "model.safetensors": {
            "bytes": 7,
            "sha256": checksums.digest_file(tmp_path / "model.safetensors"),
        }
    }
    read = artifacts.read_artifact(tmp_path)
    assert read is not None
    assert read == dataclasses.replace(ARTIFACT, files=files, order=read.order)
    artifacts.check_folder(tmp_path)


def test_stages_are_in_the_order_in_which_they_finished_whatever_the_clock_was(tmp_path):
    """Written as c, a, b, with the times of a clock that was set back twice."""
    folders = [tmp_path / name for name in ("c", "a", "b")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        artifacts.write_artifact(folder, ARTIFACT)
        os.utime(folder / artifacts.FILE, (2e9 - number, 2e9 - number))
    keys = [artifacts.finish_order(f, artifacts.read_artifact(f) or ARTIFACT) for f in folders]
    assert [order for order, _ in keys] == [1, 2, 3]
    (folders[0] / artifacts.FILE).write_text("{")  # damaged: it does not count
    artifacts.write_artifact(folders[2], ARTIFACT)
    last = artifacts.read_artifact(folders[2])
    assert last is not None and last.order == 4


def test_an_artifact_of_an_earlier_version_comes_before_those_with_an_order(tmp_path):
    content = dataclasses.asdict(ARTIFACT)
    del content["order"]
    artifacts.write_json(tmp_path / artifacts.FILE, checksums.seal(content))
    artifact = artifacts.read_artifact(tmp_path)
    assert artifact is not None
    artifacts.check_folder(tmp_path)
    assert artifacts.finish_order(tmp_path, artifact) < (1, 0.0)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(artifacts.Artifact)])
def test_a_value_of_another_type_is_named(tmp_path, field):
    # With a matching checksum, as if another program had written it.
    content: dict[str, Any] = dataclasses.asdict(ARTIFACT)
    content[field] = [{"x": []}] if not isinstance(content[field], list) else {"x": 1}
    artifacts.write_json(tmp_path / artifacts.FILE, checksums.seal(content))
    with pytest.raises(ArtifactError, match=rf"not an artifact of this version of Align \({field}"):
        artifacts.read_artifact(tmp_path)


def test_what_a_stage_did_not_write_is_not_recorded(tmp_path):
    for name in (
        ".cache/x.arrow",
        "checkpoint-2/a.json",
        "damaged-checkpoint-2/a.json",
        ".working",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events.out.tfevents.1").write_text("TensorBoard still writes to it")
    artifacts.write_artifact(tmp_path, ARTIFACT)
    artifact = artifacts.read_artifact(tmp_path)
    assert artifact is not None and artifact.files == {}


def test_passwords_in_addresses_are_not_stored():
    recipe = {"vllm_url": "https://me:secret@host:8000/v1", "n": [1, None], "text": "a@b://c"}
    assert artifacts.without_credentials(recipe) == recipe | {"vllm_url": "https://host:8000/v1"}


@pytest.mark.parametrize("base", [3, None, ["x"], "itself", "missing", "a model"])
def test_the_digest_of_an_adapter_covers_its_base_folder(tmp_path, base):
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    for folder in (adapter, model):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    name = {"itself": str(adapter), "a model": str(model)}.get(str(base), base)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    before = artifacts.digest_folder(adapter)
    (model / "config.json").write_text("[]")
    assert (artifacts.digest_folder(adapter) != before) == (base == "a model")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read for their digests."""
    files: list[Path] = []
    digest = checksums.digest_file
    monkeypatch.setattr(checksums, "digest_file", lambda file: files.append(file) or digest(file))
    return files


def test_a_file_of_an_input_is_read_once_unless_it_changes(tmp_path: Path, reads: list[Path]):
    weights = tmp_path / "model.safetensors"
    weights.write_text("one")
    first = [artifacts.digest_folder(tmp_path) for _ in range(2)]
    model_files.fingerprint(tmp_path)
    assert len(reads) == 1
    other = tmp_path / "other"
    other.write_text("two")
    other.replace(weights)
    assert {*first, artifacts.digest_folder(tmp_path)} != {*first}


def test_a_finished_stage_is_read_once_unless_it_changes(tmp_path: Path, reads: list[Path]):
    weights = tmp_path / "model.safetensors"
    weights.write_text("one")
    artifacts.write_artifact(tmp_path, ARTIFACT)
    del reads[:]
    for _ in range(3):
        artifacts.check_folder(tmp_path)
    assert reads == [weights]
    times = weights.stat()
    time.sleep(0.02)  # the clock of some file systems has steps of 10 ms
    weights.write_text("two")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArtifactError, match="its content differs"):
        artifacts.check_folder(tmp_path)


def test_the_digest_of_a_folder_with_a_damaged_adapter_configuration(tmp_path: Path):
    for content in ("[]", "{", "null", "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(content)
        assert len(artifacts.digest_folder(tmp_path)) == 64
