"""Prefix sharing for a model: a forward pass without padding that computes a shared prefix once.

:func:`enable_prefix_sharing` wraps the forward pass of a model's backbone. A padded batch ``[batch,
time]`` becomes one sequence ``[1, N]`` of its distinct prefixes, the layers run once, and the
hidden states are scattered back to ``[batch, time, hidden]``. Losses and metrics above the backbone
remain TRL's code. TRL's fused LM head receives the labeled positions only, on every device.

The new tokens of a row attend along its path, causal from the bottom right (see
:mod:`align.models.prefix_sharing.trie`). The gradient of a shared token is the sum over the rows
that share it.

If the result would not be exact (a key/value cache, soft-capping, layers other than softmax
attention, prompt tuning, a mask with holes, NEFTune or another hook on the embeddings), the padded
forward pass runs instead, and the reason is logged once. Dropout draws other random numbers than in
a padded batch, and the same ones for all rows that share a token. Left out: models on several
devices (``device_map``), ``torch.compile`` of the whole model, adapters that differ between rows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from align.models.prefix_sharing import attention
from align.models.prefix_sharing.attention import IGNORED_ARGUMENTS, CannotShare, intercept
from align.models.prefix_sharing.trie import Layout, build_layout, copy_to_device, copy_to_host

LOGGER = logging.getLogger("align.prefix_sharing")
LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Types of layers that can be shared."""
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Rotary embeddings that depend on the longest row of a batch."""
IGNORED_LABEL = -100
EXACT_HOOKS = "make_inputs_require_grad"
"""Beginning of the names of hooks on embeddings that change no value: gradient checkpointing of
adapters registers them."""
SHARDING_LIBRARIES = ("torch.distributed.", "deepspeed.")
"""Modules whose hooks gather sharded weights and change no value."""
KEY_VALUE_CACHE = "the call uses a key/value cache"
"""Reason of the fallback in every generation, which is expected and logged at level DEBUG."""


class _State:
    """State of a wrapped backbone: its fallbacks, and the positions that a call has to return."""

    def __init__(self) -> None:
        self.logged: set[str] = set()
        self.obstacle: str | None = None
        """The reason for which the model can never share; None if there is none, or none is known
        yet."""
        self.proven = False
        """Whether a packed forward pass has succeeded."""
        self.positions: Tensor | None = None
        """Positions of the flattened batch that the next call returns; None for all."""
        self.labeled: Tensor | None = None
        """Mask ``[batch, time - 1]`` of labels; None outside a call with labels."""
        self.copies: dict[Tensor, Tensor] = {}
        """Arguments of the next call with their copies on the CPU."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        copy = _State()
        copy.obstacle = self.obstacle
        return copy

    def log_fallback(self, reason: str) -> None:
        """Log the reason of a fallback to the padded forward pass, once per reason."""
        if reason not in self.logged:
            self.logged.add(reason)
            level = logging.DEBUG if reason == KEY_VALUE_CACHE else logging.WARNING
            LOGGER.log(level, "prefix sharing is off, the padded forward pass runs: %s", reason)


# The model ---------------------------------------------------------------------------------------


def enable_prefix_sharing(*models: nn.Module | None) -> None:
    """Enable prefix sharing for causal language models and sequence classifiers, also inside peft.

    Call it with the object that is called in training: ``trainer.model``, after peft has wrapped
    it. A second call has no effect, and None is ignored. If a batch cannot be shared, its padded
    forward pass runs, and a warning of the logger ``align.prefix_sharing`` gives the reason, once
    per reason and model.
    """
    model: Any
    for model in filter(None, models):
        backbone = _backbone(model)
        if not hasattr(backbone, "prefix_sharing"):
            backbone.prefix_sharing = _State()
            backbone.padded_forward = backbone.forward
            backbone_class: Any = type(backbone)
            backbone.forward = types.MethodType(_wrapper(backbone_class), backbone)
            backbone.prefix_sharing.obstacle = _obstacle(model, backbone)
            if backbone.prefix_sharing.obstacle is None:
                intercept(backbone.config._attn_implementation)
        if not hasattr(model, "prefix_sharing_hooks") and not _has_prompt_learning(model):
            state = backbone.prefix_sharing
            model.prefix_sharing_hooks = [
                model.register_forward_pre_hook(
                    functools.partial(_select_labeled, state), with_kwargs=True
                ),
                model.register_forward_hook(functools.partial(_scatter_labeled, state)),
            ]


@torch.no_grad()
def prove(model: nn.Module) -> None:
    """Check with two short rows that every layer of a model with prefix sharing attends along them.

    The first call does this otherwise, and runs without compiled layers. It would do so after a
    resume too, whose rounding would then differ from that of a run without interruption.
    """
    backbone = _backbone(model)
    ids = torch.tensor([[0, 1], [0, 2]], device=backbone.device)
    backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def disable_prefix_sharing(*models: nn.Module | None) -> None:
    """Undo :func:`enable_prefix_sharing`; models without prefix sharing and None are ignored."""
    model: Any
    for model in filter(None, models):
        backbone = _backbone(model)
        if hasattr(backbone, "prefix_sharing"):
            del backbone.prefix_sharing, backbone.padded_forward, backbone.forward
        for hook in getattr(model, "prefix_sharing_hooks", ()):
            hook.remove()
        if hasattr(model, "prefix_sharing_hooks"):
            del model.prefix_sharing_hooks


@contextlib.contextmanager
def prefix_sharing(*models: nn.Module | None) -> Iterator[None]:
    """Enable prefix sharing inside the block, for models that do not have it yet."""
    unwrapped = [
        model
        for model in models
        if model is not None and not hasattr(_backbone(model), "prefix_sharing")
    ]
    enable_prefix_sharing(*unwrapped)
    try:
        yield
    finally:
        disable_prefix_sharing(*unwrapped)


def _backbone(model: Any) -> Any:
    """The decoder layers below the head of a model; peft's wrapper is removed first."""
    # The model below an adapter also has a `peft_config`, but no `get_base_model`.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def _obstacle(model: Any, backbone: Any) -> str | None:
    """The property of a model that makes prefix sharing inexact; None if there is none."""
    config = backbone.config
    layer_types = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    adapters = getattr(model, "peft_config", {}).values()
    if layer_types:
        return f"the model has layers of type {', '.join(sorted(layer_types))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "the attention logits are soft-capped"
    if not (hasattr(backbone, "rotary_emb") or hasattr(backbone, "wpe")):
        return "the positions are neither rotary nor embedded as in GPT-2"
    if any(each.get("rope_type") in LENGTH_DEPENDENT_ROPE for each in ropes):
        return "the rotary embeddings depend on the longest row of a batch"
    if config.get_text_config() is not config:
        return "the model has other inputs than text"
    if _has_prompt_learning(model) or any(
        getattr(adapter, "alora_invocation_tokens", 0) for adapter in adapters
    ):
        return "the adapter depends on the row"
    if not backbone._can_set_attn_implementation():
        return "the layers do not use transformers' attention interface"
    if config._attn_implementation not in AttentionInterface._global_mapping:
        return f"the attention implementation is `{config._attn_implementation}`"
    return None


def _has_prompt_learning(model: Any) -> bool:
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


@functools.cache
def _wrapper(backbone_class: Any) -> Callable[..., Any]:
    @functools.wraps(backbone_class.forward)
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, input_ids, args, kwargs)

    return forward


def _forward(self: Any, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a backbone packed, or padded if the batch cannot be shared."""
    state: _State = self.prefix_sharing
    positions, state.positions = state.positions, None
    copies, state.copies = state.copies, {}
    try:
        layout = _layout(self, ids, args, kwargs, copies)
        if layout is not None:
            return _packed(self, layout, kwargs, positions, ids.shape)  # type: ignore[union-attr]
    except CannotShare as reason:
        state.log_fallback(str(reason))
    outputs = self.padded_forward(ids, *args, **kwargs)
    if positions is not None:
        hidden = outputs.last_hidden_state.flatten(0, 1)
        outputs.last_hidden_state = hidden.index_select(0, positions)[None]
    return outputs


def _layout(
    self: Any,
    ids: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    copies: dict[Tensor, Tensor],
) -> Layout | None:
    """The layout of a call; None if packing would save nothing.

    ``copies`` has the arguments that are already on the CPU.

    Raises:
        CannotShare: The model, or an argument of the call, does not allow it.
    """

    def argument(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(self.config, name, None) if value is None else value

    if self.prefix_sharing.obstacle:
        raise CannotShare(self.prefix_sharing.obstacle)
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise CannotShare(KEY_VALUE_CACHE)
    if argument("use_cache"):
        raise CannotShare("the model's config enables a key/value cache; pass `use_cache=False`")
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if argument(name):
            raise CannotShare(f"the call has `{name}`")
    mask = kwargs.get("attention_mask")
    known = (IGNORED_ARGUMENTS | {"attention_mask"}) - {"position_ids"}
    unknown = [key for key, value in kwargs.items() if value is not None and key not in known]
    if unknown:
        raise CannotShare(f"the call has the argument `{unknown[0]}`")
    if hook := _inexact_hook(self.get_input_embeddings()):
        # NEFTune's noise, for example, depends on the length of the row.
        raise CannotShare(f"the embeddings have the hook `{hook}`")
    if ids is None or args or kwargs.get("return_dict") is False:
        raise CannotShare("the call has no token ids, positional arguments, or `return_dict=False`")
    if mask is not None and mask.shape != ids.shape:
        raise CannotShare("the shape of the attention mask is not [batch, time]")
    tensors = [ids] if mask is None else [ids, mask]
    if not all(tensor in copies for tensor in tensors):
        copies = copy_to_host(tensors)
    layout = build_layout(
        *(copies[tensor] for tensor in tensors), absolute=not hasattr(self, "rotary_emb")
    )
    if layout is None:
        raise CannotShare("the attention mask has holes")
    layout.to(ids.device)
    # All ranks must run the layers equally often, or those that gather sharded weights wait for
    # each other. So until a model has proven that it can share, every rank packs every batch, and
    # all of them learn about an obstacle in the same call.
    must_prove = not self.prefix_sharing.proven and several_processes()
    saves_tokens = len(layout.tokens) < ids.numel()
    return layout if len(layout.tokens) and (saves_tokens or must_prove) else None


def _inexact_hook(embeddings: nn.Module | None) -> str | None:
    """The name of a hook on the embeddings that may change their output; None if there is none."""
    for module in embeddings.modules() if embeddings is not None else ():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            function: Any = getattr(hook, "func", hook)  # of a partial
            name = str(getattr(function, "__qualname__", function)).rpartition(".")[2]
            library = str(getattr(function, "__module__", ""))
            if not name.startswith(EXACT_HOOKS) and not library.startswith(SHARDING_LIBRARIES):
                return name
    return None


def several_processes() -> bool:
    """Whether this process belongs to a group of several."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return initialized and torch.distributed.get_world_size() > 1


def has_compiled_layers(model: nn.Module) -> bool:
    """Whether a part of a model runs as a compiled graph (``layer.compile()``)."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


def _packed(
    self: Any, layout: Layout, kwargs: dict[str, Any], positions: Tensor | None, shape: torch.Size
) -> Any:
    """Run the layers on the packed sequence and scatter the hidden states back.

    Raises:
        CannotShare: A layer did not attend along the layout; the model will not share again.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.tokens.device)  # never read
    packed = {
        "attention_mask": mask,
        "position_ids": layout.positions[None],
        "prefix_layout": layout,
    }
    layout.varlen = attention.varlen_function()
    compiled, proven = has_compiled_layers(self), self.prefix_sharing.proven
    # Compiled layers are not counted, so the first call runs without compilation.
    uncompiled: Any = contextlib.nullcontext()
    if compiled and not proven:
        uncompiled = torch.compiler.set_stance("force_eager")
    try:
        with uncompiled:
            outputs = self.padded_forward(layout.tokens[None], **kwargs | packed)
        counted = not (compiled and proven)
        if counted and layout.layers_run != self.config.num_hidden_layers:
            raise CannotShare("the layers do not use transformers' attention interface")
    except CannotShare as reason:
        self.prefix_sharing.obstacle = str(reason)
        raise
    self.prefix_sharing.proven = True
    hidden = pad(outputs.last_hidden_state[0], (0, 0, 0, 1))  # [N + 1, hidden]; zeros for the pads
    places = layout.places if positions is None else layout.places[positions]
    selected = hidden.index_select(0, places)
    outputs.last_hidden_state = selected.view(*shape, -1) if positions is None else selected[None]
    return outputs


# The head ----------------------------------------------------------------------------------------


def _select_labeled(
    state: _State, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Request hidden states of labeled positions, and pass shifted labels to TRL's fused head.

    Without Triton, TRL 1.16 scores every position. It accepts labels that are already shifted.
    """
    if kwargs.get("shift_labels") is not None:
        return None
    state.positions = state.labeled = None
    labels = kwargs.get("labels")
    if not kwargs.get("fused_lm_head") or labels is None:
        return None
    tensors = [labels]
    for tensor in (kwargs.get("input_ids"), kwargs.get("attention_mask")):
        if isinstance(tensor, Tensor) and tensor.shape == labels.shape:
            tensors.append(tensor)
    state.copies = copy_to_host(tensors)
    labeled = pad(state.copies[labels][:, 1:] != IGNORED_LABEL, (0, 1))
    state.positions = copy_to_device(labeled.flatten().nonzero()[:, 0], labels.device)
    state.labeled = labels[:, 1:] != IGNORED_LABEL
    shifted = labels.flatten().index_select(0, state.positions + 1)
    return args, kwargs | {"labels": None, "shift_labels": shifted[None]}


def _scatter_labeled(state: _State, model: nn.Module, args: Any, outputs: Any) -> Any:
    """Scatter the head's outputs to ``[batch, time - 1]``, with zeros at unlabeled positions."""
    labeled, state.labeled = state.labeled, None
    if labeled is not None:
        for name, value in outputs.items():
            if isinstance(value, Tensor) and value.dim() == 2:
                outputs[name] = value.new_zeros(labeled.shape).masked_scatter(labeled, value)
    return outputs
