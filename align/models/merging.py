"""Merge an adapter into its base, and verify that the merged model computes the same.

Tied embeddings are untied first if the adapter changes one of them: with one shared tensor, the
update of the input embeddings would also enter the output layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.runtime.out_of_memory import shortage

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

PROBE_LENGTH = 16
TOLERANCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.1}
"""Largest relative difference of the logits before and after a merge, by the type of the weights.

It bounds rounding: a weight of bfloat16 has 8 bits.
"""


def merge_adapter(model: PeftModel, source: Path | str) -> PreTrainedModel:
    """Merge an adapter into its base; ``source`` names the adapter in error messages.

    Raises:
        UserError: The merged model computes other logits than the base with the adapter.
    """
    _untie_adapted_embeddings(model)
    before = probe(model)
    try:
        merged: Any = model.merge_and_unload()
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if shortage(error) is not None:
            raise
        text = " ".join(str(error).split())
        raise UserError(
            f"{source}: peft cannot merge this adapter into its base: {text[:300]}; set `lora`, "
            "so that the adapter is not merged"
        ) from None
    _separate_embeddings(merged)
    after = probe(merged)
    difference = float((after - before).norm() / (before - before.mean()).norm())
    if not difference <= TOLERANCE.get(str(merged.dtype), 0.1):
        raise UserError(
            f"{source}: merging this adapter into its base changes the logits by "
            f"{difference:.1%}; set `lora`, so that the adapter is not merged"
        )
    trainable: PreTrainedModel = merged.requires_grad_(True)  # peft has frozen the base
    return trainable


def probe(model: Any) -> Tensor:
    """Logits of one row of token ids that are spread over the vocabulary, the last one included.

    Of a classifier with one label, the hidden states of the last layer.
    """
    import torch

    embeddings = model.get_input_embeddings().weight
    ids = torch.linspace(0, embeddings.shape[0] - 1, PROBE_LENGTH).long()
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model(
            input_ids=ids[None].to(embeddings.device), use_cache=False, output_hidden_states=True
        )
    model.train(training)
    values: Tensor = output.logits if output.logits.shape[-1] > 1 else output.hidden_states[-1]
    return values.float()


def _untie_adapted_embeddings(model: PeftModel) -> None:
    """Give the output layer its own weights if an adapter changes the embeddings it shares."""
    import torch

    base: Any = model.get_base_model()
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    if outputs is None or not base.config.get_text_config().tie_word_embeddings:
        return
    layers = [_innermost(inputs), _innermost(outputs)]
    if layers == [inputs, outputs] or layers[0].weight is not layers[1].weight:
        return
    layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().clone())
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def _separate_embeddings(model: Any) -> None:
    """Give the output layer its own tensor if it is not tied, as peft may tie trained copies."""
    import torch

    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if outputs is not None and not tied and outputs.weight is inputs.weight:
        outputs.weight = torch.nn.Parameter(outputs.weight.detach().clone())


def _innermost(layer: Any) -> Any:
    """The layer below the wrappers of peft."""
    inner = next(
        (i for name in ("base_layer", "original_module") if (i := getattr(layer, name, None))), None
    )
    return layer if inner is None else _innermost(inner)
