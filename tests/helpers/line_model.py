"""A model with one weight, whose loss is a multiple of its input, and its training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from align.errors import UserError
from align.runtime import distributed
from align.training import finiteness


class Line(nn.Module):
    """Loss ``weight * x``, summed over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x).sum()}


def trained(model: nn.Module, values: list[float], folder: Path, **arguments: Any) -> None:
    """Train on one value per micro-batch, two of them per step."""
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 1, "logging_steps": 1,
        "gradient_accumulation_steps": 2, "report_to": "none", "save_strategy": "no",
        "train_sampling_strategy": "sequential", "use_cpu": True, "learning_rate": 0.1,
        "disable_tqdm": True, "num_train_epochs": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    rows: Any = [{"x": torch.tensor([value])} for value in values]
    trainer = Trainer(
        model,
        TrainingArguments(**defaults | arguments),
        train_dataset=rows,
        eval_dataset=[{"x": torch.tensor([torch.nan]), "labels": torch.zeros(1)}],  # type: ignore[arg-type]
    )
    with finiteness.stop_unless_finite(trainer):
        trainer.train()
    finiteness.check_weights(model, place=f"step {trainer.state.global_step}")


def train_on_this_rank(values: list[float], folder: Path) -> None:
    """Train as one process of a launch; an error is printed and ends it with exit code 2."""
    distributed.init_process_group()
    try:
        trained(Line(), values, folder)
    except UserError as error:
        print(f"rank {distributed.rank()}: {error}", flush=True)
        sys.exit(2)
