"""online_rl.checkpoint"""

from __future__ import annotations

import torch

TRAINABLE, OPTIMIZER, STATE = "weights.safetensors", "optimizer.pt", "state.json"


def without_shared_memory(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied weights once more: safetensors refuses to write two names for one memory."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found
