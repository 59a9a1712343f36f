"""One forward without padding, every shared prompt computed once: a preference batch holds each prompt twice.

:func:`share` wraps the forward of a model's backbone. A padded batch ``[batch, time]`` becomes one sequence ``[1, N]`` of
its distinct prefixes, the layers run once, and the hidden states go back to ``[batch, time, hidden]``. The losses and the
metrics on top stay TRL's own code. TRL's fused LM head gets the labelled positions alone, on every device.

Attention of a row's new tokens runs over its path, causal from the bottom right (see :mod:`align.models.prefix_sharing.trie`). Gradients
of a shared token sum over the rows that share it, as they must.

Where the result would not be exact (a key/value cache, soft-capping, layers other than softmax attention, prompt tuning, a
mask with holes) the padded forward runs instead, and that is said once. Dropout draws other numbers than in a padded
batch, and one for all rows that share a token. Left out: several models a device (``device_map``), ``torch.compile`` of
the whole model, per-row adapters.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from align.models.prefix_sharing.attention import IGNORED_ARGUMENTS, CannotShare, intercept
from align.models.prefix_sharing.trie import Layout, lay_out

KINDS = {"full_attention", "sliding_attention"}  # of layers that are shared
LENGTH_DEPENDENT_ROPE = {
    "dynamic",
    "longrope",
}  # rotary embeddings that look at a batch's longest row
IGNORED_LABEL = -100


# The model ---------------------------------------------------------------------------------------


class _Sharing:
    """What a backbone remembers: what it said, and which positions the call in progress is asked for."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.said: set[str] = set()
        self.never: str | None = None
        self.proven = False  # a packed forward came through
        self.wanted: Tensor | None = None
        self.scored: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sharing:
        return _Sharing(self.say)

    def tell(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            self.say(f"prefix sharing steps aside: {reason}")


def enable_prefix_sharing(
    *models: nn.Module | None, say: Callable[[str], None] | None = None
) -> None:
    """Share prefixes in the forward of each model: a causal language model, a classifier, or peft's wrapper of one.

    Call it on what is called: on ``trainer.model``, after peft has wrapped it. A second call changes nothing; None is no
    model. ``say`` hears why sharing steps aside, once for each reason.
    """
    model: Any
    for model in filter(None, models):
        # What stands under an adapter has a `peft_config` as well, and no base of its own.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        backbone = inner.base_model
        if not hasattr(backbone, "prefix_sharing"):
            backbone.prefix_sharing = _Sharing(say or logging.getLogger(__name__).warning)
            backbone.padded_forward = backbone.forward
            kind: Any = type(backbone)
            backbone.forward = types.MethodType(_wrapper(kind), backbone)
            backbone.prefix_sharing.never = _obstacle(model, backbone)
            if backbone.prefix_sharing.never is None:
                intercept(backbone.config._attn_implementation)
        if not hasattr(model, "scores_labelled_positions") and not _learns_prompts(model):
            model.scores_labelled_positions = True
            model.register_forward_pre_hook(
                functools.partial(_keep_labelled, backbone.prefix_sharing), with_kwargs=True
            )
            model.register_forward_hook(functools.partial(_spread, backbone.prefix_sharing))


def _obstacle(model: Any, backbone: Any) -> str | None:
    """What about a model makes sharing inexact; None where nothing does."""
    config = backbone.config
    kinds = set(getattr(config, "layer_types", None) or ()) - KINDS
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    adapters = getattr(model, "peft_config", {}).values()
    if kinds:
        return f"layers of {', '.join(sorted(kinds))}"
    if getattr(config, "attn_logit_softcapping", None):
        return "soft-capped attention"
    if not (hasattr(backbone, "rotary_emb") or hasattr(backbone, "wpe")):
        return "positions that are neither rotary nor those of GPT-2"
    if any(each.get("rope_type") in LENGTH_DEPENDENT_ROPE for each in ropes):
        return "rotary embeddings that depend on the batch"
    if config.get_text_config() is not config:
        return "a model of more than text"
    if _learns_prompts(model) or any(getattr(a, "alora_invocation_tokens", 0) for a in adapters):
        return "an adapter that depends on the row"
    if not backbone._can_set_attn_implementation():
        return "layers that do not attend through transformers' interface"
    if config._attn_implementation not in AttentionInterface._global_mapping:
        return f"`{config._attn_implementation}` attention"
    return None


def _learns_prompts(model: Any) -> bool:
    return any(each.is_prompt_learning for each in getattr(model, "peft_config", {}).values())


@functools.cache
def _wrapper(kind: Any) -> Callable[..., Any]:
    @functools.wraps(kind.forward)
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, input_ids, args, kwargs)

    return forward


def _forward(self: Any, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    sharing: _Sharing = self.prefix_sharing
    wanted, sharing.wanted = sharing.wanted, None
    try:
        layout = _layout(self, ids, args, kwargs)
        if layout is not None:
            return _packed(self, layout, kwargs, wanted, ids.shape)  # type: ignore[union-attr]
    except CannotShare as why:
        sharing.tell(str(why))
    outputs = self.padded_forward(ids, *args, **kwargs)
    if wanted is not None:
        flat = outputs.last_hidden_state.flatten(0, 1)
        outputs.last_hidden_state = flat.index_select(0, wanted)[None]
    return outputs


def _layout(
    self: Any, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Layout | None:
    """The layout of a call; None where packing would gain nothing."""

    def asked(name: str) -> Any:
        given = kwargs.get(name)
        return getattr(self.config, name, None) if given is None else given

    if self.prefix_sharing.never:
        raise CannotShare(self.prefix_sharing.never)
    if kwargs.get("past_key_values") is not None or asked("use_cache"):
        raise CannotShare("a key/value cache")
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if asked(name):
            raise CannotShare(f"`{name}`")
    mask = kwargs.get("attention_mask")
    odd = [
        k
        for k, v in kwargs.items()
        if v is not None and k not in (IGNORED_ARGUMENTS | {"attention_mask"}) - {"position_ids"}
    ]
    if ids is None or args or odd or kwargs.get("return_dict") is False:
        raise CannotShare(f"a call with `{odd[0]}`" if odd else "a call without token ids")
    if mask is not None and mask.shape != ids.shape:
        raise CannotShare("an attention mask that is not [batch, time]")
    layout = lay_out(ids, mask, absolute=not hasattr(self, "rotary_emb"))
    if layout is None:
        raise CannotShare("an attention mask with holes")
    # Several processes must run the layers equally often, or those that gather weights wait for each other. So while a
    # model may yet turn out to be one that cannot share, all of them find out in the same call.
    finding_out = not self.prefix_sharing.proven and _several_processes()
    gains = len(layout.tokens) < ids.numel()
    return layout if len(layout.tokens) and (gains or finding_out) else None


def _several_processes() -> bool:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def _packed(
    self: Any, layout: Layout, kwargs: dict[str, Any], wanted: Tensor | None, shape: torch.Size
) -> Any:
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.tokens.device)  # goes by unread
    packed = {
        "attention_mask": seen,
        "position_ids": layout.positions[None],
        "prefix_layout": layout,
    }
    try:
        outputs = self.padded_forward(layout.tokens[None], **kwargs | packed)
        if layout.readers != self.config.num_hidden_layers:
            raise CannotShare("layers that do not attend through transformers' interface")
    except CannotShare as why:
        self.prefix_sharing.never = str(why)  # a trait of the model: do not try again
        raise
    self.prefix_sharing.proven = True
    hidden = pad(outputs.last_hidden_state[0], (0, 0, 0, 1))  # a row of zeros for the pads
    places = layout.places if wanted is None else layout.places[wanted]
    chosen = hidden.index_select(0, places)
    outputs.last_hidden_state = chosen[None] if wanted is not None else chosen.view(*shape, -1)
    return outputs


# The head ----------------------------------------------------------------------------------------


def _keep_labelled(
    sharing: _Sharing, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Ask the backbone for labelled positions alone, and give TRL's fused head their labels, already shifted.

    TRL 1.16 scores every position where there is no Triton; labels that are already shifted it takes as they come.
    """
    if kwargs.get("shift_labels") is not None:
        return None
    sharing.wanted = sharing.scored = None
    labels = kwargs.get("labels")
    if not kwargs.get("fused_lm_head") or labels is None:
        return None
    scored = labels[:, 1:] != IGNORED_LABEL
    sharing.scored = scored
    sharing.wanted = pad(scored, (0, 1)).flatten().nonzero()[:, 0]
    return args, kwargs | {"labels": None, "shift_labels": labels[:, 1:][scored][None]}


def _spread(sharing: _Sharing, model: nn.Module, args: Any, outputs: Any) -> Any:
    """Put what the head found back to ``[batch, time - 1]``, zero where there is no label."""
    scored, sharing.scored = sharing.scored, None
    if scored is not None:
        for name, value in outputs.items():
            if isinstance(value, Tensor) and value.dim() == 2:
                outputs[name] = value.new_zeros(scored.shape).masked_scatter(scored, value)
    return outputs
