"""Weights, gradients and optimizer state of an online-RL run, divided among processes.

A step has two phases. While completions are sampled, scored and evaluated, every process holds all
weights, so ranks may generate completions of different lengths without waiting for each other. In
the update, torch's ``fully_shard`` gathers a layer when it is needed and sums its gradients over
the processes; weights, gradients and optimizer state are divided. The launch configuration chooses:

| configuration | during the update every process has |
|---|---|
| FSDP2, ZeRO-3 | its part of all weights, and one whole layer at a time |
| ZeRO-2 | all weights from the forward pass of a minibatch until its backward pass |

DeepSpeed itself is not used here: one of its engines trains one model, and PPO trains two in one
step, with one optimizer and, with LoRA, on one backbone. Frozen models are divided as well.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align.models.adapters import BACKBONE
from align.online_rl.models import OnlineRLModels
from align.runtime import distributed, sharding


def divide(models: OnlineRLModels, announce: Callable[[str], None]) -> None:
    """Divide all models among the processes, where the launch configuration requires it.

    Parameters become DTensors, so an optimizer is built afterwards. Layers are gathered one by one.
    ``announce`` is called with a line that says how much is left on this process.
    """
    if sharding.kind() is None:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(models.device.type, (distributed.world_size(),))
    for model in models.models():
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=mesh, reshard_after_forward=_frees_layers())
        fully_shard(model, mesh=mesh, reshard_after_forward=_frees_layers())
        # Critic and reward models call the layers without the head, which the root gathers too.
        setattr(model, BACKBONE, types.MethodType(_backbone, model))
        register_fsdp_forward_method(model, BACKBONE)
    if models.critic is not None and models.critic.head is not None:
        fully_shard(models.critic.head, mesh=mesh, reshard_after_forward=_frees_layers())
    every = [p for model in models.models() for p in model.parameters()]
    own, total = (sum(t.numel() for t in each) for each in (map(own_part, every), every))
    announce(f"{sharding.kind()}: this process holds {own:,} of {total:,} parameters")


def _frees_layers() -> bool:
    """Whether a layer is divided again between its forward and its backward pass."""
    return sharding.kind() != "ZeRO-2"


def _backbone(model: Any, *args: Any, **kwargs: Any) -> Any:
    output = model.base_model(*args, **kwargs)
    # A view would lose the hook that gathers weights for the backward pass if it were changed.
    output.last_hidden_state = output.last_hidden_state.clone()
    return output


@contextlib.contextmanager
def gathered(models: OnlineRLModels) -> Iterator[None]:
    """Inside this block every process has all weights, as plain tensors, and trains none of them.

    Entering and leaving wait for the other processes; what happens inside does not.
    """
    units = _units(models)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(_frees_layers(), recurse=False)
            unit.reshard()


def _units(models: OnlineRLModels) -> list[Any]:
    """The modules that are gathered at once, a model before its layers."""
    if sharding.kind() is None:
        return []
    heads = [] if models.critic is None or models.critic.head is None else [models.critic.head]
    every = [module for model in [*models.models(), *heads] for module in model.modules()]
    from torch.distributed.fsdp import FSDPModule

    return [module for module in every if isinstance(module, FSDPModule)]


def is_divided(tensor: Tensor) -> bool:
    """Whether every process has a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided. Every process has to call."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def whole_on_main(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU of the main process if it is divided. Every process has to call.

    Other processes take part, and keep nothing of a tensor that is divided.
    """
    if not is_divided(tensor):
        return tensor
    gathered = whole(tensor)
    return gathered.cpu() if distributed.is_main() else gathered.new_empty(0)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be divided."""
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def divided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every process, divided as ``other`` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    local = tensor.to(other.to_local().device)
    return distribute_tensor(local, other.device_mesh, other.placements, src_data_rank=None)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with :func:`whole_on_main` of its tensors."""
    state = optimizer.state_dict()
    return state | {
        "state": {
            place: {
                key: whole_on_main(value) if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }
            for place, entries in state["state"].items()
        }
    }


def load_whole_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what :func:`whole_state` returned; each process keeps its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        place: {
            key: divided_like(value, parameters[place]) if isinstance(value, Tensor) else value
            for key, value in each.items()
        }
        for place, each in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers of gathered models; ``state_dict`` would divide them."""
    weights: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, each in module.named_modules():
        for name, buffer in each.named_buffers(recurse=False):
            if name not in each._non_persistent_buffers_set:
                weights[f"{prefix}.{name}" if prefix else name] = buffer
    return weights
