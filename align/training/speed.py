"""What makes the passes of a TRL trainer faster: shared prefixes, adapter inputs, compiled layers.

None of it changes the result by more than rounding. It is applied to a built trainer, whose model
has its adapters.
"""

from __future__ import annotations

import warnings
from typing import Any

from align.config.training_base import TRLStage
from align.errors import UserError
from align.models import adapters
from align.models.prefix_sharing import wrapper


def speed_up(trainer: Any, config: TRLStage) -> None:
    """Apply what ``config`` enables to the policy of a trainer and to its reference.

    Raises:
        UserError: ``compile_layers`` is set, and the layers cannot be compiled.
    """
    models = (trainer.model, getattr(trainer, "ref_model", None))
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(*models)
    if trainer.accelerator.mixed_precision != "no":
        adapters.leave_casts_to_autocast(trainer.model)
    if config.compile_layers is not None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UserError(
                "compile_layers: layers with sharded weights are not compiled; remove it, or "
                "launch without FSDP and DeepSpeed"
            )
        for model in filter(None, models):
            if config.prefix_sharing:
                with trainer.accelerator.autocast():
                    wrapper.prove(model)
            compile_layers(model, backend=config.compile_layers)


def compile_layers(model: Any, *, backend: str) -> None:
    """Compile each decoder layer of a model by itself, with one graph for all layers and lengths.

    Names of weights do not change, so neither do checkpoints and saved models.

    Raises:
        UserError: The model has no layers of the usual class.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"compile_layers: the layers of {type(model).__name__} are not of the class that "
            "transformers' decoder layers share; remove it"
        )
    # The compiler reads .grad of every layer's input, which torch then warns of.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
