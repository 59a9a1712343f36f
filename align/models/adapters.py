"""LoRA adapters: load a policy with its reference for training, and activate adapters.

An adapter is trained further, never stacked: a policy that is an adapter stays that adapter, and
its reference is a frozen copy of it. With full fine-tuning, the adapter is first merged into its
base, and the reference is the same merge. A new policy therefore equals its reference exactly.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from align.errors import UserError
from align.models.files import matches_module
from align.models.loading import (
    adapter_base,
    check_vocabulary,
    load_adapter,
    load_base,
    load_merged,
    pinned_revision,
)
from align.models.tokenization import load_tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch.nn import Parameter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BACKBONE = "divided_backbone"
"""Method of a model whose weights are divided: its layers without the head."""
EMBEDDINGS_MULTIPLE = 64
"""TRL extends the embeddings to a multiple of this where it takes over a chat template."""


class LoadConfig(Protocol):
    """The keys of a training stage that decide how its model is loaded."""

    @property
    def dtype(self) -> str:
        """Name of the torch type of the weights."""

    @property
    def revision(self) -> str | None:
        """Commit, branch or tag of a model on the Hub."""

    @property
    def quantization(self) -> str | None:
        """``nf4`` if the linear layers are stored in 4 bits."""

    @property
    def lora_dict(self) -> dict[str, Any] | None:
        """``r``, ``alpha``, ``dropout`` and ``target_modules``; None for full fine-tuning."""


@dataclass(frozen=True, slots=True)
class PolicyAndReference:
    """Arguments of a TRL trainer: the policy, its reference, and the tokenizer of both."""

    policy: PreTrainedModel | PeftModel
    reference: PreTrainedModel | None
    """None where TRL derives the reference from the policy: the base of a new adapter, or a copy of
    a trained adapter."""
    new_adapter: LoraConfig | None
    """Configuration of the adapter that TRL has to create; None for full fine-tuning or an existing
    adapter."""
    tokenizer: PreTrainedTokenizerBase


def load_policy_and_reference(config: LoadConfig, source: Path | str) -> PolicyAndReference:
    """Load the policy to train and its reference, equal to the last bit.

    A policy with full fine-tuning gets a second model, loaded in the same way. TRL's default would
    load ``config._name_or_path`` instead, which for a merged adapter is the base without the
    adapter.

    Raises:
        UserError: The model or its tokenizer cannot be loaded, or an existing adapter differs from
            ``config.lora``.
    """
    tokenizer = load_tokenizer(source, revision=config.revision)
    policy, new_adapter = load_for_training(
        source,
        lora=config.lora_dict,
        dtype=config.dtype,
        revision=config.revision,
        quantization=config.quantization,
    )
    check_vocabulary(source, policy, tokenizer)
    reference = None
    if config.lora_dict is None:
        reference = load_merged(source, dtype=config.dtype, revision=config.revision)
    return PolicyAndReference(policy, reference, new_adapter, tokenizer)


def load_for_training(
    source: Path | str,
    *,
    lora: dict[str, Any] | None,
    dtype: str,
    revision: str | None = None,
    quantization: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """Load the model to train, and the configuration of a new adapter if one has to be created.

    ``lora`` has ``r``, ``alpha``, ``dropout`` and ``target_modules``; None means full fine-tuning.
    An existing adapter is trained further and must have the shape that ``lora`` describes. Its
    dropout is that of ``lora``. ``quantization`` requires ``lora``.

    Raises:
        UserError: The model cannot be loaded, or an existing adapter has another shape.
    """
    if lora is None:
        return load_merged(source, dtype=dtype, revision=revision), None
    if adapter_base(source, revision=revision) is None:
        model = load_base(source, dtype=dtype, revision=revision, quantization=quantization)
        check_target_modules(source, model, lora)
        pinned = pinned_revision(source, revision=revision)
        return model, lora_config(lora, revision=pinned)
    model = load_adapter(source, dtype=dtype, revision=revision, quantization=quantization)
    check_lora(source, model, lora)
    set_dropout(model, lora["dropout"])
    return model, None


def check_target_modules(source: Path | str, model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Check that each entry of ``target_modules`` is a part of the model, as peft matches it.

    Raises:
        UserError: An entry matches nothing, or is no regular expression.
    """
    targets = lora["target_modules"]
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    try:
        unmatched = [target for target in targets if not matches_module(target, names)]
        if isinstance(targets, str):
            unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    except re.error as error:
        raise UserError(
            f"lora.target_modules: no regular expression: {targets} ({error})"
        ) from None
    if unmatched:
        linear = {
            n.rpartition(".")[2] for n, m in model.named_modules() if "Linear" in str(type(m))
        }
        raise UserError(
            f"lora.target_modules: {source} has no {unmatched[0]}; its linear layers are "
            f"{', '.join(sorted(linear))}"
        )


def check_no_new_tokens(
    tokenizer: PreTrainedTokenizerBase, template: PreTrainedTokenizerBase
) -> None:
    """Check that taking over a chat template adds no token, which an adapter could not store.

    TRL adds the tokens that ``template`` has besides, and others until the number of embeddings is
    a multiple of 64. An adapter is loaded on the base model, which has no embeddings for them.

    Raises:
        UserError: Tokens would be added.
    """
    vocabulary = tokenizer.get_vocab()
    added = [str(token) for token in template.added_tokens_decoder.values()]
    new = [token for token in added if token not in vocabulary]
    if new or len(vocabulary) % EMBEDDINGS_MULTIPLE:
        example = new[0] if new else "<extra_id_0>"
        raise UserError(
            f"trainer.chat_template_path: {template.name_or_path} adds tokens such as {example}, "
            "whose embeddings an adapter does not store; remove `lora`, or name a Jinja file "
            "whose tokens the model has (with `eos_token` for the end of a turn)"
        )


@contextlib.contextmanager
def peft_errors_as_user_errors(source: Path | str) -> Iterator[None]:
    """Re-raise errors of peft about layers that it cannot adapt as ``UserError``."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"lora: peft cannot adapt {source}: {text[:300]}") from None


def lora_config(lora: dict[str, Any], **overrides: Any) -> LoraConfig:
    """Return peft's configuration of an adapter, by default of a policy's adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        **{"task_type": "CAUSAL_LM", **overrides},
    )


def check_lora(source: Path | str, model: PeftModel, lora: dict[str, Any]) -> None:
    """Check that an adapter which is trained further has the shape that the recipe describes.

    Raises:
        UserError: It is no LoRA adapter, its rank or alpha differ, or it adapts other layers than
            those listed.
    """
    trained = model.peft_config["default"]
    kind = str(getattr(trained.peft_type, "value", trained.peft_type))
    if kind != "LORA":
        raise UserError(
            f"{source}: an adapter of the kind {kind}, which `lora` cannot train further; remove "
            "`lora` to merge it and train all weights, or start from a model without an adapter"
        )
    listed = lora["target_modules"]
    if isinstance(listed, list) and set(listed) != set(trained.target_modules):
        raise UserError(
            f"{source}: this adapter has target_modules={sorted(trained.target_modules)}, but "
            f"`lora` has {sorted(listed)}; an existing adapter keeps its layers: list these in "
            "`lora`, or remove `lora` to merge the adapter and train all weights"
        )
    actual = f"r={trained.r}, alpha={trained.lora_alpha}"
    configured = f"r={lora['r']}, alpha={lora['alpha']}"
    if actual != configured:
        raise UserError(
            f"{source}: this adapter has {actual}, but `lora` has {configured}; an existing "
            "adapter keeps its shape: set these values in `lora`, or remove `lora` to merge the "
            "adapter and train all weights"
        )


def set_dropout(model: PeftModel, probability: float) -> None:
    """Set the dropout of all adapters of a model, as peft does when it creates one."""
    from torch import nn

    for config in model.peft_config.values():
        config.lora_dropout = probability
    for layer in adapter_layers(model):
        dropouts = getattr(layer, "lora_dropout", {})  # a copy of a trained part has none
        for name in dropouts:
            dropouts[name] = nn.Dropout(probability) if probability else nn.Identity()


def backbone(model: Any) -> Any:
    """The layers of a model without its head, to call.

    Where weights are divided, every call has to pass the root of the model first, or its layers
    would be taken for models by themselves: torch initializes them at the first call.
    """
    return getattr(model, BACKBONE, model.base_model)


@contextlib.contextmanager
def active_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Activate one adapter of a model inside the block; None disables all of them.

    peft's ``set_adapter`` would also set ``requires_grad`` to False for the other adapters, whose
    graph may still be needed by a backward pass.
    """
    layers = adapter_layers(model)
    states = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        if adapter is not None:
            layer._active_adapter = [adapter]
        layer._disable_adapters = adapter is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, states, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def leave_casts_to_autocast(model: Any) -> None:
    """Let adapters read their inputs as they are, in a model that always runs under autocast.

    peft casts each input to the float32 of the adapter's weights, and autocast casts it back for
    the matrix product. Without both the result is the same to the last bit. Adapters with dropout,
    which draws in the type of its input, and those of other kinds than plain LoRA stay as they are.
    """
    for layer in adapter_layers(model):
        dropouts = getattr(layer, "lora_dropout", {}).values()
        is_plain = bool(dropouts) and not getattr(layer, "lora_variant", {})
        if is_plain and not any(getattr(dropout, "p", 0.0) for dropout in dropouts):
            layer.cast_input_dtype_enabled = False


def adapter_layers(model: Any) -> list[Any]:
    """List the layers of a model that peft has wrapped: adapted, or trained as a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [layer for layer in model.modules() if isinstance(layer, wrappers)]


def adapter_parameters(model: Any, adapter: str) -> dict[str, Parameter]:
    """The parameters of one adapter by name, in the order of the model.

    The name alone does not identify them: a part of the model may have the adapter's name, and the
    adapter of an embedding ends in it.
    """
    members: set[int] = set()
    for layer in adapter_layers(model):
        for attribute in layer.adapter_layer_names:
            container = getattr(layer, attribute, {})
            if adapter in container:
                part = container[adapter]
                members |= {id(p) for p in ([part] if hasattr(part, "data") else part.parameters())}
    return {name: p for name, p in model.named_parameters() if id(p) in members}


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Copy the weights of an adapter to another one with the same configuration."""
    weights = adapter_parameters(model, source).values()
    for parameter, weight in zip(adapter_parameters(model, target).values(), weights, strict=True):
        parameter.data.copy_(weight.data)
