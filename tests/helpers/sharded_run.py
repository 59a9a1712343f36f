"""Runs of recipes on two CPU processes under a launch configuration, and kills of one of them.

The ranks get the environment that accelerate's launcher gives them. Only what needs a GPU is
replaced: see :func:`call_script`.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers import distributed_training, forks, recipe_runs


def launcher_environment(configuration: Path) -> dict[str, str]:
    """The variables that ``accelerate launch --config_file`` sets for every rank."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", str(configuration), "--num_processes", "2", "script.py"]
    parsed, file, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(parsed)
    else:
        environment = prepare_multi_gpu_env(parsed)
    changed = {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    # always, since other tests of this process may set it
    return changed | {"ACCELERATE_USE_CPU": str(parsed.use_cpu).lower()}


def call_script(runs: Path, *arguments: str) -> None:
    """Run `align/run.py` in this process, with gloo where accelerate and DeepSpeed expect GPUs."""
    from accelerate import PartialState

    if distributed_training.is_enabled("FSDP"):
        distributed_training.fsdp_without_gpus()
        PartialState()  # before Align, which would refuse FSDP on a CPU
    elif distributed_training.is_enabled("DEEPSPEED"):
        # Communication in shared memory is compiled at the first use, for half a minute.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    recipe_runs.call_script(runs, *arguments)


@contextmanager
def running(configuration: Path, runs: Path, *arguments: str) -> Iterator[list[BaseProcess]]:
    """Both ranks of a run."""
    environment = launcher_environment(configuration)
    log = runs.parent / "log"
    with forks.ranks(call_script, runs, *arguments, log=log, environment=environment) as ranks:
        yield ranks


def run(configuration: Path, runs: Path, *arguments: str) -> int:
    """Run to the end. Returns the exit code of rank 0."""
    with running(configuration, runs, *arguments) as ranks:
        return forks.wait(ranks[0])


def stage_folder(runs: Path, stage: str) -> Path:
    """The only folder of a stage."""
    (folder,) = runs.glob(f"{stage}-*")
    return folder


def weights(runs: Path, stage: str) -> Path:
    """The file with the final weights of a stage."""
    (file,) = stage_folder(runs, stage).glob("*.safetensors")
    return file


def kill_and_resume(
    configuration: Path,
    runs: Path,
    stages: Sequence[str],
    steps: range,
    generator: random.Random,
    *,
    part: str,
) -> None:
    """Run stages again, kill a rank in each, and check that the same command ends in the same bits.

    ``steps`` come after the first checkpoint. ``part`` is a file that a checkpoint must have, such
    as the share of rank 1 in it.
    """
    expected = [weights(runs, stage).read_bytes() for stage in stages]
    for stage in stages:
        shutil.rmtree(stage_folder(runs, stage))
    for stage in stages:
        kill_one_rank(configuration, runs, stage, steps, generator)
        assert list(runs.glob(f"{stage}-*/checkpoint-*/**/{part}"))
    assert run(configuration, runs) == 0, recipe_runs.log(runs)
    log = recipe_runs.log(runs)
    assert re.findall(r"^(\w+): resuming", log, re.MULTILINE) == list(stages)
    assert log.count("resuming from step") == len(stages)
    assert [weights(runs, stage).read_bytes() for stage in stages] == expected


def kill_one_rank(
    configuration: Path, runs: Path, stage: str, steps: range, generator: random.Random
) -> None:
    """Run until a random rank is killed, at a random moment after a random one of a stage's steps.

    A stage that is faster is removed and runs again.
    """
    for _ in range(10):
        rank, step = generator.randrange(2), generator.choice(steps)
        reached = recipe_runs.logged_step(runs, stage, step)
        with running(configuration, runs, "--until", stage) as ranks:
            recipe_runs.wait_until(reached, ranks[rank], runs)
            time.sleep(generator.uniform(0, 0.3))
            pid = ranks[rank].pid
            assert pid is not None
            if ranks[rank].is_alive():
                os.kill(pid, signal.SIGKILL)
            killed = forks.wait(ranks[rank]) == -signal.SIGKILL
        folder = stage_folder(runs, stage)
        if killed and not (folder / "artifact.json").exists():
            print(f"{stage}: rank {rank} was killed after step {step}")
            return
        shutil.rmtree(folder)
    raise AssertionError(f"{stage} was faster than every kill")
