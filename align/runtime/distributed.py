"""The ranks of a launch: collectives, sharing rows, memory, a clean state between stages.

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from align.errors import UserError
from align.runtime import sharding

R = TypeVar("R")
T = TypeVar("T")
_STARTERS = dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"), "mpirun")
_STARTERS |= {"SLURM_STEP_NUM_TASKS": "srun"}  # that of the job counts tasks that may not run


def world_size() -> int:
    """Number of processes that the launcher started."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Index of this process, from 0."""
    return _number("RANK", 0)


def _number(variable: str, default: int) -> int:
    """The value of a variable of the launcher; ``check_launch`` refuses what is no number."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default


def is_main() -> bool:
    """Whether this is rank 0, which prints, and writes what is written once."""
    return rank() == 0


def check_launch() -> None:
    """Check that the launcher started as many processes as it was configured for.

    Raises:
        UserError: It started one process, or several that are not connected, or its variables are
            wrong, or it was configured for a kind of sharding that is not supported.
    """
    sharding.check()
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(variable, "0")
        if not value.isdecimal():
            raise UserError(
                f"the environment variable {variable} is no whole number: {value[:40]!r}; unset it"
            )
    if "WORLD_SIZE" in os.environ:
        if world_size() > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(
                f"the environment variable WORLD_SIZE is {world_size()}, but RANK, MASTER_ADDR or "
                "MASTER_PORT is not set; start with accelerate launch, or unset WORLD_SIZE"
            )
        return
    # On a CPU, `accelerate launch --num_processes 2` starts one process, which gets the port for
    # several.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate was configured for several processes, but started one; choose a launch "
            "configuration such as accelerate_configs/cpu.yaml (--config_file in accelerate "
            "launch, --config in align run), or unset MASTER_PORT for one process"
        )
    for variable, starter in _STARTERS.items():
        if _number(variable, 1) > 1:
            raise UserError(
                f"{starter} started {os.environ[variable]} processes ({variable}), which are not "
                "connected; start them with accelerate launch and a file in accelerate_configs/"
            )


def init_process_group() -> None:
    """Join the launcher's process group, and check that it is the one that was configured.

    Raises:
        UserError: The launcher started several processes that would each run alone, or it was
            configured for FSDP or DeepSpeed, and accelerate uses neither.
    """
    import torch
    from accelerate import DistributedType, PartialState

    # `accelerate launch` passes `use_cpu: true` on to a single process only, not to several.
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    several_on_cpu = world_size() > 1 and not torch.accelerator.is_available()
    kind = sharding.kind() or ""
    if use_cpu and kind.startswith("ZeRO"):
        # accelerate would silently replace DeepSpeed by plain data parallelism.
        raise UserError(
            f"the launch configuration requires {kind}, which accelerate drops where "
            "ACCELERATE_USE_CPU (`use_cpu: true`) is set; unset it"
        )
    if several_on_cpu and kind.startswith("ZeRO"):
        import deepspeed  # joins the processes itself, so that its collectives are those of gloo

        deepspeed.init_distributed(
            dist_backend="gloo", auto_mpi_discovery=False, timeout=timedelta(days=1)
        )
    state = PartialState(
        cpu=use_cpu or several_on_cpu,
        **({"timeout": timedelta(days=1)} if world_size() > 1 else {}),
    )
    if state.num_processes != world_size():
        raise UserError(
            f"the launcher started {world_size()} processes, but accelerate does not connect them "
            f"({state.distributed_type}); set ACCELERATE_USE_CPU=true, or use the file in "
            "accelerate_configs/ that fits this machine"
        )
    on_cpu = state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if kind.startswith("FSDP") and on_cpu:
        # accelerate silently replaces FSDP without a GPU by plain data parallelism.
        raise UserError(
            f"the launch configuration requires FSDP, but accelerate uses {state.distributed_type}; "
            "use the file in accelerate_configs/ that fits this machine"
        )


def barrier() -> None:
    """Wait until all ranks have reached this call."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def broadcast_from_main(value: T) -> T:
    """Rank 0's ``value``, on every rank."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gather(values: list[T]) -> list[T]:
    """The values of all ranks, in the order of the ranks. A collective call."""
    if world_size() == 1:
        return values
    from accelerate.utils import gather_object

    gathered: list[T] = gather_object(values)
    return gathered


def raise_together(error: UserError | None) -> None:
    """Raise the error of any rank on all ranks; without one, nothing happens. A collective call.

    Otherwise the others would wait for a rank that has ended, and nothing would say why.

    Raises:
        UserError: A rank has an error; the first such rank is named, unless it is rank 0.
    """
    for number, each in enumerate(gather([None if error is None else error.lines])):
        if each is not None:
            raise UserError(*(f"process {number}: {line}" if number else line for line in each))


def map_rows(
    rows: Sequence[R],
    fn: Callable[[list[R]], Sequence[T]],
    *,
    size: int | None = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[T]:
    """``fn(rows)``, with the rows shared over the ranks.

    Every rank returns the results of all rows, in row order.

    ``fn`` maps a list of rows to as many results. It is called with ``size`` consecutive rows at a
    time; chunk k is computed by rank k modulo the number of ranks. With ``size=None`` each rank
    makes one call with every ``world_size``-th row. ``progress`` is called after each chunk with
    the number of finished chunks and of all chunks of this rank.
    """
    if size is None:
        chunks = [range(first, len(rows), world_size()) for first in range(world_size())]
    else:
        chunks = [range(i, min(i + size, len(rows))) for i in range(0, len(rows), size)]
    own_chunks = [chunk for chunk in chunks[rank() :: world_size()] if chunk]
    results: list[tuple[int, T]] = []
    for done, chunk in enumerate(own_chunks, 1):
        results += zip(chunk, fn([rows[i] for i in chunk]), strict=True)
        progress(done, len(own_chunks))
    by_row = dict(gather(results))
    return [by_row[i] for i in range(len(rows))]


def reset_process_state(seed: int) -> None:
    """Free what the last stage held: the next one starts as if it were the first.

    Resets random states, the state of accelerate, the process-wide configs of DeepSpeed and
    bitsandbytes, and memory.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import set_seed  # that of transformers imports peft: 5 seconds

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    if "deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager._instance = None  # it holds the last stage's 32-bit overrides
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
        with contextlib.suppress(OSError):  # not allowed in every container
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    set_seed(seed)


def peak_memory_bytes() -> int | None:
    """Peak GPU memory since :func:`reset_process_state`, else resident memory; None if unknown."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def any_rank(requested: bool) -> bool:
    """Whether ``requested`` is true on any rank. A collective call: all ranks return the same."""
    if world_size() == 1:
        return requested
    import torch
    from accelerate import PartialState

    flag = torch.tensor(float(requested), device=PartialState().device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())
