"""Two ranks learn the same with and without prefix sharing, under DDP, ZeRO and FSDP."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import distributed_training, forks
from helpers.distributed_training import KINDS, STEPS
from torch.testing import assert_close

TWO = {
    "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "machine_rank": 0,
    "main_process_port": 0, "main_training_function": "main", "rdzv_backend": "static", "same_network": True,
}  # fmt: skip
ZERO = {
    "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}  # fmt: skip
FSDP2 = TWO | {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
    },
}


class Expected(NamedTuple):
    """Observations that identify the kind of a launch, which accelerate may silently replace."""

    type: str
    wrapper: str  # start of the class name: FSDP2 appends that of the model
    layer: str
    stage: int | None
    held: float  # share of the weights that each rank holds


HOW = {
    "DDP": Expected("MULTI_CPU", "DistributedDataParallel", "LlamaDecoderLayer", None, 1),
    "ZeRO-2": Expected("DEEPSPEED", "DeepSpeedEngine", "LlamaDecoderLayer", 2, 1),
    "ZeRO-3": Expected("DEEPSPEED", "DeepSpeedEngine", "LlamaDecoderLayer", 3, 0.5),
    "FSDP2": Expected("FSDP", "FSDP", "FSDPLlamaDecoderLayer", None, 0.5),
}
# Passes of the first layer per step, of the policy and of a reference. With an adapter, the
# reference is the policy with the adapter disabled; checkpointing runs the policy twice.
PASSES = {"sft": [1], "dpo": [1, 1], "lora": [2], "dpo checkpointing": [2, 1], "lora checkpointing": [3]}  # fmt: skip
NO_DEEPSPEED = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux")


class Outcome(NamedTuple):
    """Observations of both ranks and the final weights of each run."""

    ranks: list[dict[str, dict[str, Any]]]
    weights: dict[str, dict[str, torch.Tensor]]


def configuration(how: str, folder: Path) -> Path:
    """Write the configuration of a launch."""
    config: dict[str, Any] = FSDP2
    if how.startswith("ZeRO"):
        stage = int(how[-1])
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:  # by default, every rank keeps weights as small as these
            zero |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            }
        (folder / "zero.json").write_text(json.dumps(ZERO | {"zero_optimization": zero}))
        settings = {
            "deepspeed_config_file": str(folder / "zero.json"),
            "zero3_init_flag": stage == 3,
        }
        config = TWO | {"distributed_type": "DEEPSPEED", "deepspeed_config": settings}
    (folder / "launch.json").write_text(json.dumps(config))
    return folder / "launch.json"


def launch(how: str, folder: Path) -> Outcome:
    """The outcome of two ranks."""
    if how == "DDP":
        with forks.ranks(distributed_training.main, folder, log=folder / "log") as ranks:
            codes = [forks.wait(rank) for rank in ranks]
        assert codes == [0, 0], (folder / "log").read_text()
    else:
        run_launcher(how, folder)
    return Outcome(
        [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)],
        torch.load(folder / "weights.pt"),
    )


def run_launcher(how: str, folder: Path) -> None:
    """Start two ranks as users do."""
    # Variables that other tests set for accelerate would replace DeepSpeed and FSDP by DDP.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", configuration(how, folder), distributed_training.__file__, folder),
    ]
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(forks.ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=300)
        except BaseException:  # ranks that wait for each other outlive their launcher
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert (folder / "weights.pt").is_file(), output


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    return functools.cache(lambda how: launch(how, tmp_path_factory.mktemp(how)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "DDP",
        pytest.param("ZeRO-2", marks=NO_DEEPSPEED),
        pytest.param("ZeRO-3", marks=NO_DEEPSPEED),
        "FSDP2",
    ],
)
def test_two_ranks_learn_the_same_with_prefix_sharing(how, launched):
    outcome, ddp = launched(how), launched("DDP")
    expected = HOW[how]
    for kind in KINDS:
        padded, shared = f"{kind}, padded", f"{kind}, shared"
        for seen in outcome.ranks:
            for run in (seen[padded], seen[shared]):
                assert run["processes"] == 2
                assert run["type"] == f"DistributedType.{expected.type}"
                assert run["wrapper"].startswith(expected.wrapper)
                assert (run["layer"], run["stage"]) == (expected.layer, expected.stage)
                assert run["held"] == pytest.approx(expected.held, abs=0.01)
                assert run["fallbacks"] == []
            assert_shared(kind, seen[padded], seen[shared])
        # In SFT, rank 1 has nothing to share: it runs padded while rank 0 runs packed.
        first, second = (seen[shared] for seen in outcome.ranks)
        assert sum(first["distinct"]) < 0.6 * sum(first["padded"])
        assert (second["distinct"] == second["padded"]) == (kind == "sft")

        # The same sums in another order: float32 values differ by about 1e-6 after six steps. With
        # half of the gradient of one rank missing, they would differ by 2e-2.
        curve = ddp.ranks[0][padded]
        assert len(curve["losses"]) == STEPS
        assert max(curve["losses"]) - min(curve["losses"]) > 0.01, (
            "a flat curve would prove nothing"
        )
        for seen in outcome.ranks:
            for run in (seen[padded], seen[shared]):
                assert run["losses"] == pytest.approx(curve["losses"], abs=1e-4, rel=0)
                assert run["margins"] == pytest.approx(curve["margins"], abs=1e-4, rel=0)
        for run in (outcome.weights[padded], outcome.weights[shared]):
            assert_close(run, ddp.weights[padded], rtol=0, atol=1e-4)


def assert_shared(kind: str, padded: dict[str, Any], shared: dict[str, Any]) -> None:
    """Check that the layers computed distinct tokens only, in every pass of every model."""
    for run, tokens in ((padded, padded["padded"]), (shared, padded["distinct"])):
        assert run["padded"] == padded["padded"]
        assert len(tokens) == STEPS
        assert run["computed"] == [
            [count for count in tokens for _ in range(passes)] for passes in PASSES[kind]
        ]
