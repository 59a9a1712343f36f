"""Launch configurations that shard: the shipped files pass, and others are refused in one line."""

from __future__ import annotations

import json
import types
from pathlib import Path

import accelerate
import pytest
from accelerate import DistributedType
from helpers import sharded_run

from align.errors import ArtifactError, UserError
from align.runtime import checkpoints, distributed, sharding

ROOT = Path(__file__).parents[2]
FILES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def launch(monkeypatch: pytest.MonkeyPatch, name: str, **changes: str) -> None:
    """Set the variables that the launcher sets for a shipped file."""
    environment = sharded_run.launcher_environment(ROOT / "accelerate_configs" / f"{name}.yaml")
    for variable, value in (environment | changes).items():
        monkeypatch.setenv(variable, value)


@pytest.mark.parametrize(("name", "kind"), FILES.items())
def test_the_shipped_files_are_recognized_and_supported(monkeypatch, name, kind):
    assert sharding.kind() is None
    launch(monkeypatch, name)
    assert sharding.kind() == kind
    distributed.check_launch()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fsdp2", {"FSDP_VERSION": "1"}, "requires FSDP1, which is not supported"),
        ("zero2", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "requires ZeRO-1, which is not"),
        ("zero2", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "requires Megatron-LM, which is not"),
        (
            "fsdp2",
            {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            "no model would be saved; set FULL_STATE_DICT",
        ),
        (
            "fsdp2",
            {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading: true, but every",
        ),
        (
            "zero3",
            {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"},
            "does not set zero3_save_16bit_model: true",
        ),
        ("zero3", {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "missing.json"}, "missing.json: not a"),
    ],
)
def test_what_would_not_work_is_refused_before_training(monkeypatch, name, changes, message):
    launch(monkeypatch, name, **changes)
    with pytest.raises(UserError, match=message) as raised:
        distributed.check_launch()
    assert len(raised.value.lines) == 1


def test_a_file_of_deepspeed_decides_if_there_is_one(monkeypatch, tmp_path):
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    launch(monkeypatch, "zero2", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "zero.json"))
    assert sharding.kind() == "ZeRO-3"
    sharding.check()


def test_fsdp_that_accelerate_does_not_use_is_an_error(monkeypatch):
    launch(monkeypatch, "fsdp2")
    with pytest.raises(UserError, match="requires FSDP, but accelerate uses"):
        distributed.init_process_group()


def test_fsdp_on_gpus_is_accepted_before_the_accelerator_exists(monkeypatch):
    """Only the later ``AcceleratorState`` says FSDP; the ``PartialState`` says MULTI_GPU."""
    state = types.SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=2)
    monkeypatch.setattr(accelerate, "PartialState", lambda **kwargs: state)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    launch(monkeypatch, "fsdp2")
    distributed.init_process_group()
    state.distributed_type = DistributedType.MULTI_CPU
    with pytest.raises(UserError, match="requires FSDP, but accelerate uses"):
        distributed.init_process_group()


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_that_accelerate_would_drop_is_an_error(monkeypatch, name):
    launch(monkeypatch, name, ACCELERATE_USE_CPU="true")
    with pytest.raises(UserError, match=r"requires ZeRO-\d, which accelerate drops where ACC"):
        distributed.init_process_group()


def test_a_checkpoint_of_another_kind_of_sharding_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    checkpoints.mark_complete(folder, world_size=2)
    assert checkpoints.last_checkpoint(tmp_path, world_size=2) == folder
    launch(monkeypatch, "zero2")
    with pytest.raises(ArtifactError, match="written with DDP, and this run uses ZeRO-2; launch"):
        checkpoints.last_checkpoint(tmp_path, world_size=2)
