"""The key ``tokens_per_batch`` of the stages whose batches may have a number of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from align.config.base import Problem, Stage, Workload
from align.config.training_base import BATCH_SIZE, TOKENS_PER_WORD, TRLStage

EXCLUDED = (
    BATCH_SIZE,
    "train_sampling_strategy",
    "packing",
    "padding_free",
    "dataloader_drop_last",
)
"""Fields of TRL that decide otherwise which rows form a batch."""


class TokenBatchStage(TRLStage):
    """A stage whose batches have a number of rows or of tokens."""

    later_keys: ClassVar = {"tokens_per_batch": None}
    loss_is_mean_over_rows: ClassVar[bool] = True
    """Whether the loss is a mean over rows; otherwise it is a mean over tokens."""

    tokens_per_batch: int | None = Field(None, ge=1)
    """Tokens of a batch on each process, in place of ``trainer.per_device_train_batch_size``:
    distinct ones with ``prefix_sharing``, otherwise those of the padded batch. A longer row forms a
    batch alone, as do the rows of ``kto`` that both labels need. The loss of a step is the mean
    over its rows, or tokens in ``sft``, whatever their division."""

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Fields of TRL that contradict ``tokens_per_batch``."""
        yield from super().problems(stages)
        if self.tokens_per_batch is None:
            return
        for field in EXCLUDED:
            if field in self.trainer:
                yield Problem(
                    ("tokens_per_batch",),
                    f"`trainer.{field}` and `tokens_per_batch` both decide which rows form a "
                    "batch; remove one of them",
                )
        losses = self.trainer.get("loss_type") or ()
        if self.loss_is_mean_over_rows and "sft" in (
            [losses] if isinstance(losses, str) else losses
        ):
            yield Problem(
                ("tokens_per_batch",),
                "the loss `sft` is a mean over tokens, all others over rows; set "
                f"`trainer.{BATCH_SIZE}` instead",
            )

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """Rows, steps and tokens; steps from the median words of a row, without sharing."""
        words = self.words_per_row(statistics)
        work = super().workload(statistics, world_size)
        if self.tokens_per_batch is None:
            return work
        steps = self.trl_value("max_steps")
        tokens = None
        if work.rows is not None and words is not None:
            tokens = round(work.rows * words * TOKENS_PER_WORD * self.trl_value("num_train_epochs"))
            tokens_per_step = self.tokens_per_batch * world_size
            tokens_per_step *= self.trl_value("gradient_accumulation_steps")
            if steps > 0:
                tokens = steps * tokens_per_step
            else:
                steps = max(1, math.ceil(tokens / tokens_per_step))
        return replace(work, steps=int(steps) if steps > 0 else None, tokens=tokens)
