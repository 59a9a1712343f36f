"""The models of PPO: policy, reference, reward models and critic.

A :class:`ModelView` is a model with the adapter to activate, so several views can share one frozen
backbone. :mod:`align.online_rl.build` loads the models.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align.models.adapters import active_adapter, adapter_layers, adapter_parameters, backbone
from align.rewards.reward_model import RewardModel

POLICY, REFERENCE, VALUE = "default", "reference", "value"
"""Names of adapters. peft saves ``default`` at the top of a folder."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model with the adapter to activate (None: base model only) and an optional scalar head."""

    model: Any
    adapter: str | None = None
    head: nn.Module | None = None

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states of the last layer, ``[batch, time, hidden]``."""
        with active_adapter(self.model, self.adapter):
            output = backbone(self.model)(input_ids=ids, attention_mask=mask, use_cache=False)
        return output.last_hidden_state

    def logps(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each label after the tokens before it, and the entropy there.

        Both are ``[batch, time - 1]`` in float32, and 0 where there is no label. TRL's fused head
        computes them one tile of logits at a time.
        """
        with active_adapter(self.model, self.adapter):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
        return output.log_probs, output.entropy

    def values(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Value of the state before each token but the first, ``[batch, time - 1]``."""
        assert self.head is not None
        states = self.hidden(ids, mask)[:, :-1]
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float())[..., 0]


@dataclass(frozen=True, slots=True)
class OnlineRLModels:
    """All models of an online-RL run."""

    policy: ModelView
    reference: ModelView
    rewards: list[RewardModel]
    critic: ModelView | None
    savable: Any
    """The object whose ``save_pretrained`` writes the policy: peft's wrapper, or the model."""
    tokenizer: Any
    compute_dtype: torch.dtype | None = None
    """Type of matrix products in mixed precision; None for the type of the weights."""

    def mixed_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Inside this block, matrix products are computed in :attr:`compute_dtype`, if it is set.

        Backward passes stay outside: they use the types of the forward pass.
        """
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    @property
    def device(self) -> torch.device:
        """Device of the policy."""
        device: torch.device = self.policy.model.device
        return device

    def parameters(self, view: ModelView) -> list[nn.Parameter]:
        """Trainable parameters of a view: its adapter, or all weights of the model.

        For the critic, its head replaces the model's own.
        """
        layers = view.model if view.head is None else view.model.base_model
        parameters = (
            list(layers.parameters())
            if view.adapter is None
            else list(adapter_parameters(layers, view.adapter).values())
        )
        return parameters + (list(view.head.parameters()) if view.head is not None else [])

    def models(self) -> list[Any]:
        """The distinct models behind the views."""
        views: list[ModelView | RewardModel] = [self.policy, self.reference, *self.rewards]
        views += [] if self.critic is None else [self.critic]
        return list({id(view.model): view.model for view in views}.values())

    def weights(self) -> dict[str, Tensor]:
        """All trainable parameters by name, as a checkpoint stores them."""
        weights: dict[str, Tensor] = {
            f"policy.{i}": p for i, p in enumerate(self.parameters(self.policy))
        }
        if self.critic is not None:
            weights |= {f"critic.{i}": p for i, p in enumerate(self.parameters(self.critic))}
        return weights


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off in train mode as well: in layers, attention and adapters.

    With dropout, the ratio of the policy to itself would not be 1.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in list(vars(layer).items()):
            if "drop" in name and isinstance(value, float):  # OPT and BLOOM store a number
                setattr(layer, name, 0.0)


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, with the adapter of the forward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = functools.partial(_checkpoint, model)


def _checkpoint(model: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    layers = adapter_layers(model)
    active = layers[0]._active_adapter[0] if layers and not layers[0]._disable_adapters else None

    def recompute(*args: Any, **kwargs: Any) -> Any:
        with active_adapter(model, active):
            return function(*args, **kwargs)

    return torch.utils.checkpoint.checkpoint(recompute, *args, use_reentrant=False, **kwargs)
