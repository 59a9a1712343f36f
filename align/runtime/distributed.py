"""The processes of one launch: who is the main one, waiting for all, memory, and a clean state between stages.

Light to import: nothing here touches torch until a stage really runs.
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

R = TypeVar("R")
T = TypeVar("T")
_ASKED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}


def world_size() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that prints and writes what is written once."""
    return rank() == 0


def init_process_group() -> None:
    """Join the process group that the launcher asked for, and make sure that it is that one.

    Raises:
        UserError: The launcher started several processes and each would run alone, believing itself the only one.
    """
    import torch
    from accelerate import PartialState

    # `accelerate launch` hands `use_cpu: true` on only to a single process; several must be told again.
    told = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    several = world_size() > 1 and not torch.accelerator.is_available()
    state = PartialState(
        cpu=told or several,
        **({"timeout": timedelta(days=1)} if world_size() > 1 else {}),
    )
    if state.num_processes != world_size():
        raise UserError(
            f"the launcher started {world_size()} processes and they do not see each other "
            f"(accelerate found {state.distributed_type}); set ACCELERATE_USE_CPU=true, or use one of "
            "accelerate_configs/ that fits this machine"
        )
    for variable, name in _ASKED.items():
        asked = os.environ.get(variable, "false").lower() == "true"
        if asked and name not in str(state.distributed_type):
            # accelerate turns FSDP without a GPU into plain data parallelism, and says nothing.
            raise UserError(
                f"the launch configuration asks for {name} and accelerate runs {state.distributed_type}; "
                "use one of accelerate_configs/ that fits this machine"
            )


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def broadcast_from_main(value: T) -> T:
    """The main process's ``value``, on every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def map_rows(
    rows: Sequence[R],
    fn: Callable[[list[R]], Sequence[T]],
    *,
    size: int | None = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[T]:
    """``fn(rows)``, with the rows shared over the ranks. Every rank returns the results of all rows, in row order.

    ``fn`` maps a list of rows to as many results. It is called with ``size`` consecutive rows at a time; chunk k is computed
    by rank k modulo the number of ranks. With ``size=None`` each rank makes one call with every ``world_size``-th row.
    ``progress`` is called after each chunk with the number of finished chunks and of all chunks of this rank.
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
    if world_size() > 1:
        from accelerate.utils import gather_object

        results = gather_object(results)
    by_row = dict(results)
    return [by_row[i] for i in range(len(rows))]


def reset_process_state(seed: int) -> None:
    """Give back what the last stage held, and start the next as if it were the first in its process.

    Random states, accelerate's plugins and gradient state, DeepSpeed's and bitsandbytes' process-wide config, and memory.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from transformers import set_seed

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    if "deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager._instance = None  # else the last stage's 32-bit overrides stay
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
        with contextlib.suppress(
            OSError
        ):  # the peak of resident memory starts anew, where that is allowed
            Path("/proc/self/clear_refs").write_text("5")
    set_seed(seed)


def peak_memory_bytes() -> int | None:
    """The peak since :func:`clean_state`: of GPU memory, else of resident memory; None where nothing tells."""
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
    """Whether any process was asked to stop: all must stop at the same step."""
    if world_size() == 1:
        return requested
    import torch
    from accelerate import PartialState

    flag = torch.tensor(float(requested), device=PartialState().device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())
