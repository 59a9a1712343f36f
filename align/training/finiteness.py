"""Stops a TRL trainer as soon as a loss, a gradient or a weight is not a finite number.

transformers logs a loss of 0 in place of NaN, continues, and saves what it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.errors import UserError
from align.models.finite_weights import first_not_finite
from align.runtime import distributed, stopped_batch

REPAIR = "nothing is saved; lower `learning_rate`"
SHOWN_TOKENS = 24


@contextmanager
def stop_unless_finite(trainer: Trainer) -> Iterator[None]:
    """Inside the block, the trainer raises a ``UserError`` that names the step and the batch.

    The batch itself is written to :data:`align.runtime.stopped_batch.FILE`.
    """
    stopped_batch.remove(Path(trainer.args.output_dir))
    check = _FiniteCheck()
    training_step, prediction_step = trainer.training_step, trainer.prediction_step

    def observed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(model, inputs, *args, **kwargs)
        check.losses.append((inputs, loss))
        return loss

    def observed_prediction(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = prediction_step(model, inputs, *args, **kwargs)
        check.add_validation(inputs, outputs[0])
        return outputs

    trainer.training_step = observed
    trainer.prediction_step = observed_prediction
    check.scales_losses = trainer.accelerator.scaler is not None
    trainer.add_callback(check)
    try:
        yield
    finally:
        trainer.remove_callback(check)
        del trainer.training_step, trainer.prediction_step


def check_weights(model: nn.Module, *, place: str) -> None:
    """Check that all weights are finite, on all ranks. A collective call.

    Raises:
        UserError: One of them is not.
    """
    name = first_not_finite(model)
    _raise_on_all_ranks(name and f"{place}: the weight `{name}` is not finite; {REPAIR}")


class _FiniteCheck(TrainerCallback):
    """Checks the losses and the gradients of a step before the optimizer uses them."""

    def __init__(self) -> None:
        self.losses: list[tuple[Any, torch.Tensor]] = []
        """Inputs and loss of each micro-batch of the step."""
        self.last: list[tuple[Any, torch.Tensor]] = []
        """Those of the last step whose gradients were checked."""
        self.validation: list[tuple[Any, torch.Tensor]] = []
        """The first batch of an evaluation whose loss is not finite."""
        self.scales_losses = False
        """Whether losses are scaled for float16; then a step with infinite gradients is skipped."""

    def add_validation(self, inputs: Any, loss: torch.Tensor | None) -> None:
        """Keep a batch of an evaluation, if it is the first whose loss is not finite."""
        if not self.validation and loss is not None and not bool(loss.isfinite().all()):
            self.validation = [(inputs, loss)]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses, self.losses = self.losses, []
        step, tokenizer = f"step {state.global_step + 1}", kwargs.get("processing_class")
        self.last, error = losses, None
        for number, (inputs, loss) in enumerate(losses, 1):
            if not bool(loss.isfinite().all()):
                place = f"micro-batch {number} of {len(losses)}, {_beginning(inputs, tokenizer)}"
                error = f"{step}: the loss is {loss.mean().item()} ({place}); {REPAIR}"
                break
        is_finite = error is None and (self.scales_losses or _gradients_are_finite(kwargs["model"]))
        if not distributed.any_rank(not is_finite):
            return
        if distributed.any_rank(error is not None):
            # Then the gradients of all ranks are not finite: only the bad batches are saved.
            _raise_on_all_ranks(error and error + _saved(error, losses, args, tokenizer))
        place = _beginning(losses[0][0], tokenizer)
        error = f"{step}: a gradient is not finite ({place}); {REPAIR}"
        end = _saved(error, losses, args, tokenizer) + stopped_batch.beside()
        _raise_on_all_ranks(error + end)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The norm overflows before its gradients do; clipped by it, they are all 0.
        norm = kwargs.get("logs", {}).get("grad_norm", 0.0)
        if not self.scales_losses and not math.isfinite(norm):
            error = f"step {state.global_step}: the gradients have norm {norm}; {REPAIR}"
            end = _saved(error, self.last, args, kwargs.get("processing_class"))
            raise UserError(error + end + stopped_batch.beside())

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = kwargs.get("metrics", {}).get("eval_loss")
        batches, self.validation = self.validation, []
        if loss is not None and not math.isfinite(loss):
            error = f"step {state.global_step}: the loss of the validation rows is {loss}; {REPAIR}"
            own = None
            if batches:
                own = error + _saved(error, batches, args, kwargs.get("processing_class"))
            _raise_on_all_ranks(own)
            raise UserError(error)  # each batch has a finite loss, and their sum is too large

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_weights(kwargs["model"], place=f"step {state.global_step}")


def _gradients_are_finite(model: nn.Module) -> bool:
    gradients: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    return not local or bool(torch.nn.utils.get_total_norm(local).isfinite())


def _beginning(inputs: Mapping[str, Any], tokenizer: Any) -> str:
    """The beginning of the first row of a batch, in words."""
    ids = next((v for k, v in inputs.items() if k.endswith("input_ids")), None)
    if ids is None or tokenizer is None:
        return "in its batch"
    mask = inputs.get("attention_mask")
    row = ids[0] if mask is None else ids[0][mask[0].bool()]
    return f"in a batch that begins with {tokenizer.decode(row[:SHOWN_TOKENS])!r}"


def _saved(
    error: str,
    losses: list[tuple[Any, torch.Tensor]],
    args: TrainingArguments,
    tokenizer: Any,
) -> str:
    """Write the micro-batches of a step, with the loss of each; returns the end of the message."""
    batches = [
        {"loss": loss.mean().item(), **_columns(inputs, tokenizer)} for inputs, loss in losses
    ]
    content = {"error": error, "micro_batches": batches}
    file = stopped_batch.save(Path(args.output_dir or ""), content)
    return f", or look for the cause in {file}, which has the batch"


def _columns(inputs: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The lengths, texts and tensors of a batch, without padding; a list has an entry per row."""
    lengths: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim > 2:
            continue
        mask = _mask_of(name, inputs)
        is_masked = mask is not None and mask.shape == tensor.shape
        rows = [row[own.bool()] for row, own in zip(tensor, mask, strict=True)] if is_masked else []
        if name.endswith("attention_mask"):
            lengths[name.removesuffix("attention_mask") + "lengths"] = tensor.sum(-1).tolist()
        else:
            values[name] = [row.tolist() for row in rows] if is_masked else tensor.tolist()
        if name.endswith("input_ids") and tokenizer is not None:
            texts[name.removesuffix("input_ids") + "text"] = [
                tokenizer.decode(row) for row in (rows if is_masked else tensor)
            ]
    return lengths | texts | values


def _mask_of(name: str, inputs: Mapping[str, Any]) -> Any:
    """The attention mask of a tensor of a batch: `KL_attention_mask` is that of `KL_input_ids`."""
    suffix = "attention_mask"
    prefixes = [key.removesuffix(suffix) for key in inputs if key.endswith(suffix)]
    prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
    return None if prefix is None else inputs[prefix + suffix]


def _raise_on_all_ranks(error: str | None) -> None:
    """Raise the first error of any rank on all of them, so that none waits for another."""
    if distributed.any_rank(error is not None):
        raise UserError(next(line for line in distributed.gather([error]) if line is not None))
