"""Checkpoints of an online-RL run: trainable weights, optimizer state, KL coefficient and step.

With a stop rule also its comparisons so far, and the weights of the best policy. Nothing else
changes between steps: all seeds are derived from the step number.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.online_rl.models import OnlineRLModels
from align.online_rl.sharding import divided_like, load_whole_state, whole_on_main, whole_state
from align.online_rl.stopping import StopRule
from align.runtime import artifacts, checkpoints, distributed

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.pt", "state.json"
BEST = "best.safetensors"
"""The weights of the best policy so far, if there is a stop rule."""
N_KEPT = 2
"""Checkpoints that are kept; older ones are deleted."""


def save(
    output_dir: Path,
    step: int,
    models: OnlineRLModels,
    optimizer: torch.optim.Optimizer,
    kl_coef: float,
    stop_rule: StopRule | None = None,
) -> None:
    """Write the checkpoint after ``step`` steps. The main process writes, and all ranks wait."""
    weights = {k: whole_on_main(p.detach()).contiguous() for k, p in models.weights().items()}
    optimizer_state = whole_state(optimizer)
    if distributed.is_main():
        folder = output_dir / f"checkpoint-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(without_shared_memory(weights), folder / WEIGHTS)
        torch.save(optimizer_state, folder / OPTIMIZER)
        state: dict[str, Any] = {"step": step, "kl_coef": kl_coef}
        if stop_rule is not None:
            state["stop"] = stop_rule.state()
            best = {str(i): weight.contiguous() for i, weight in enumerate(stop_rule.best)}
            save_file(without_shared_memory(best), folder / BEST)
        artifacts.write_json(folder / STATE, state)
        checkpoints.mark_complete(folder, world_size=distributed.world_size())
        for old in checkpoints.list_checkpoints(output_dir)[:-N_KEPT]:
            shutil.rmtree(old)
    distributed.barrier()


def load(
    checkpoint: Path,
    models: OnlineRLModels,
    optimizer: torch.optim.Optimizer,
    stop_rule: StopRule | None = None,
) -> tuple[int, float]:
    """Restore weights and optimizer; returns the steps done and the KL coefficient."""
    state = artifacts.read_json(checkpoint / STATE)
    weights = load_file(checkpoint / WEIGHTS)
    with torch.no_grad():
        for name, p in models.weights().items():
            p.copy_(divided_like(weights[name], p))
    load_whole_state(
        optimizer, torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    )
    if stop_rule is not None:
        best = load_file(checkpoint / BEST)
        stop_rule.restore(state["stop"], [best[str(i)] for i in range(len(best))])
    return int(state["step"]), float(state["kl_coef"])


def without_shared_memory(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tied weights: safetensors refuses two names for the same memory."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in weights.items():
        unshared[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return unshared
