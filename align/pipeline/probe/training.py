"""The time of the stages with a TRL trainer: ``sft``, ``dpo``, ``kto`` and ``reward``.

The trainer is the one that the stage builds, on a sample of its rows. The backward pass of a batch,
the optimizer step, the forward pass and the saving are measured one by one. Batches of a number of
tokens are measured as batches of as many rows as fit on average.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch

from align.config.training import DPO, KTO, Reward
from align.config.training_base import BATCH_SIZE, TRLStage
from align.models import tokenization
from align.models.logps import small_vocabulary_tiles
from align.pipeline.probe.data import SampledData
from align.pipeline.probe.timing import (
    LONGEST_FORWARD,
    Seconds,
    StageTime,
    Stopwatch,
    computed_tokens,
)
from align.pipeline.runner import stage_module
from align.training import reference_logps
from align.training.kto_batches import LabeledRows, MixedLabels

BATCHES = 32
"""Number of batches whose tokens are counted."""
CENTERED = 2_048
"""Demonstrations whose scores center a reward model."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A collated batch."""

    inputs: dict[str, Any]
    tokens: int
    """Token positions that its forward pass computes."""


def measure(
    config: TRLStage,
    kind: str,
    inputs: dict[str, Path | str],
    data: SampledData,
    output_dir: Path,
    watch: Stopwatch,
) -> StageTime:
    """Measure a stage; its model is written to ``output_dir``, where later stages find it."""
    config = config.model_copy(update={"trainer": config.trainer | {"report_to": "none"}})
    probe = _TrainerProbe(config, kind, inputs, data, output_dir, watch)
    with small_vocabulary_tiles():
        return probe.measure()


class _TrainerProbe:
    """A built trainer and what is measured of it."""

    def __init__(
        self,
        config: TRLStage,
        kind: str,
        inputs: dict[str, Path | str],
        data: SampledData,
        output_dir: Path,
        watch: Stopwatch,
    ) -> None:
        self.config, self.data, self.output_dir, self.watch = config, data, output_dir, watch
        module = stage_module(kind)
        with _mapped_rows(watch) as mapped:
            seconds, self.trainer = watch.result(lambda: module.build(config, inputs, output_dir))
        self.load = seconds - mapped.seconds
        self.tokenize = mapped.seconds
        trainer = self.trainer
        self.references = isinstance(config, DPO) and reference_logps.can_precompute(trainer)
        if self.references:
            for column in reference_logps.LOGPS:
                values = [0.0] * len(trainer.train_dataset)
                trainer.train_dataset = trainer.train_dataset.add_column(column, values)
        # Set by `train`, and the divisor of the loss in `training_step`.
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        if getattr(config, "tokens_per_batch", None) is not None:
            self.config = self._with_batches_of_rows(config)
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)

    def measure(self) -> StageTime:
        """The parts of the stage's time."""
        growth = self._growth()
        rows = round(len(self.trainer.train_dataset) * growth)
        table = self.config.reads[0].kind
        steps = self.config.workload({table: {"train": rows}}, 1).steps or 0
        parts = {"load": Seconds.exactly(self.load)}
        parts["tokenize"] = Seconds.exactly(self.tokenize * growth)
        size = int(self.config.trl_value(BATCH_SIZE))
        typical = self._mean_tokens(size)
        evaluations = self._count_evaluations(steps)
        forward = 0.0
        if self.references or evaluations or isinstance(self.config, Reward):
            forward = self._forward_seconds_per_token()
        per_row = typical / size
        if self.references:
            parts["reference"] = Seconds.exactly(forward * per_row * rows)
            self.trainer.precompute_ref_logps = True
        measured, backward = self._step_seconds(size, typical)
        step = self._optimizer_seconds()
        accumulation = self.trainer.args.gradient_accumulation_steps
        parts["train"] = Seconds.exactly(steps * (backward * accumulation + step))
        if evaluations:
            kind = self.config.reads[0].kind
            held_out = self.data.count(kind, "validation") * evaluations
            parts["evaluate"] = Seconds.exactly(forward * per_row * held_out)
        parts["save"] = self._saving(steps)
        if isinstance(self.config, Reward):
            parts["score"] = Seconds.exactly(self.load + forward * self._scored_tokens())
        return StageTime(parts, measured)

    def _with_batches_of_rows(self, config: TRLStage) -> TRLStage:
        """The stage with a number of rows in place of ``tokens_per_batch``, and the trainer too."""
        sizes = [len(batch) for batch in self.trainer.token_batches.batches]
        self.trainer.token_batches = None
        fitting = config.tokens_per_batch / self._mean_tokens(sizes[0])  # type: ignore[attr-defined]
        size = max(self._least, rows_per_batch(sizes, fitting))
        self.trainer.args.per_device_train_batch_size = size
        trainer = config.trainer | {BATCH_SIZE: size}
        return config.model_copy(update={"trainer": trainer, "tokens_per_batch": None})

    def _growth(self) -> float:
        """Rows of the data per sampled row; a pair is two rows of KTO."""
        kinds = [table.kind for table in self.config.reads if self.data.count(table.kind)]
        if not isinstance(self.config, KTO):
            kinds = kinds[:1]
        weights = {kind: 1 + (kind == "pairs") for kind in kinds}
        rows = sum(weight * self.data.count(kind) for kind, weight in weights.items())
        sampled = sum(weight * len(self.data.sampled(kind)) for kind, weight in weights.items())
        return rows / sampled

    def _batches(self, size: int) -> Iterator[Batch]:
        """Batches of ``size`` rows, as the trainer makes them."""
        trainer = self.trainer
        trainer._train_batch_size = size
        if isinstance(trainer.train_dataset, LabeledRows):  # their order depends on the batches
            rows = trainer.train_dataset.rows
            trainer.train_dataset = MixedLabels(rows, batch_size=size, seed=self.config.seed)
        for inputs in trainer.get_train_dataloader():
            tokens = 0
            for key in inputs:
                if key.endswith("input_ids"):
                    mask = inputs.get(key.replace("input_ids", "attention_mask"))
                    tokens += self._computed(inputs[key], mask)
            yield Batch(inputs, tokens)

    def _computed(self, ids: torch.Tensor, mask: torch.Tensor | None) -> int:
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        return computed_tokens(rows, shared=self.config.prefix_sharing)

    def _mean_tokens(self, size: int) -> float:
        """Mean number of token positions of a batch of ``size`` rows."""
        sampled = len(self.trainer.train_dataset)
        size_of_sample = min(size, sampled)
        counts = [
            batch.tokens
            for _, batch in zip(range(BATCHES), self._batches(size_of_sample), strict=False)
        ]
        full = counts[: max(1, sampled // size_of_sample)]
        return fmean(full) * size / size_of_sample

    def _typical(self, size: int) -> Batch:
        """Of the first batches of a size, the one whose length is closest to the mean."""
        batches = [batch for _, batch in zip(range(8), self._batches(size), strict=False)]
        mean = fmean(batch.tokens for batch in batches)
        return min(batches, key=lambda batch: abs(batch.tokens - mean))

    def _forward_seconds_per_token(self) -> float:
        """Seconds of a loss without gradients, per token position."""
        last: dict[str, Batch] = {}

        def loss(size: int) -> float:
            batch = last["batch"] = self._typical(size)

            def call() -> None:
                inputs = self.trainer._prepare_inputs(dict(batch.inputs))
                if self.references:
                    self.trainer.compute_ref_log_probs(self._reference, inputs)
                else:
                    self.trainer.compute_loss(self.model, inputs)

            with torch.no_grad():
                return self.watch.settled(call)

        size = int(self.config.trl_value(BATCH_SIZE))
        _, seconds = self.watch.largest(
            loss, self._most(size), first=self._least, longest=LONGEST_FORWARD
        )
        return seconds / last["batch"].tokens

    @property
    def _reference(self) -> Any:
        return self.trainer.ref_model or self.trainer.model

    def _step_seconds(self, size: int, typical: float) -> tuple[str, float]:
        """What was measured in words, and the seconds of the passes of a batch of ``size`` rows."""
        last: dict[str, Batch] = {}

        def passes(size: int) -> float:
            batch = last["batch"] = self._typical(size)
            return self.watch.settled(
                lambda: self.trainer.training_step(self.model, dict(batch.inputs))
            )

        n, seconds = self.watch.largest(passes, self._most(size), first=self._least)
        tokens = last["batch"].tokens
        return f"{n} of {size} rows, {tokens} tokens", seconds * typical / tokens

    def _most(self, size: int) -> int:
        return min(size, len(self.trainer.train_dataset))

    @property
    def _least(self) -> int:
        """Fewest rows of a batch: each row of KTO needs a completion of another prompt."""
        return 2 if self.config.labels_per_batch else 1

    def _optimizer_seconds(self) -> float:
        """Seconds of clipping the gradients and of one optimizer step."""
        limit = self.trainer.args.max_grad_norm

        def step() -> None:
            if limit:
                self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()

        self.watch.once(step)  # the first one allocates its state
        seconds = self.watch.settled(step)
        self.optimizer.zero_grad()
        return seconds

    def _saving(self, steps: int) -> Seconds:
        """Seconds of all checkpoints and of the trained model."""
        trainer = self.trainer
        states = sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")
        seconds = self.watch.once(lambda: trainer.save_model(str(self.output_dir)))
        if isinstance(self.config, Reward):
            tokenization.save_end_tokens(trainer.processing_class, self.output_dir)
        weights = sum(file.stat().st_size for file in self.output_dir.glob("*.safetensors"))
        checkpoint = seconds * (1 + states / max(weights, 1))
        return Seconds.exactly(seconds + checkpoint * self._count_checkpoints(steps))

    def _count_checkpoints(self, steps: int) -> int:
        arguments = self.trainer.args
        strategy = str(arguments.save_strategy.value)
        if strategy == "epoch":
            return int(arguments.num_train_epochs)
        return _occasions(arguments.save_steps, steps) if strategy == "steps" else 0

    def _count_evaluations(self, steps: int) -> int:
        """The number of evaluations of the validation split during training."""
        arguments = self.trainer.args
        strategy = str(arguments.eval_strategy.value)
        at_start = int(bool(arguments.eval_on_start))
        if strategy == "epoch":
            return at_start + int(arguments.num_train_epochs)
        if strategy != "steps":
            return at_start
        return at_start + _occasions(arguments.eval_steps or arguments.logging_steps, steps)

    def _scored_tokens(self) -> float:
        """Token positions that center and measure a reward model, one completion a row."""
        kind, column = "demonstrations", "completion"
        if not self.data.count(kind):
            kind, column = "pairs", "chosen"
        centered = min(self.data.count(kind), CENTERED)
        tokens = centered * self._mean_length(self.data.sampled(kind), column)
        split = next((s for s in ("test", "validation") if self.data.count("pairs", s)), None)
        if split is not None:
            pairs = self.data.sampled("pairs", split)
            sides = (self._mean_length(pairs, side) for side in ("chosen", "rejected"))
            tokens += self.data.count("pairs", split) * sum(sides)
        return tokens

    def _mean_length(self, rows: list[dict[str, Any]], column: str) -> float:
        """Mean tokens of prompts with the completions of a column, as a reward model reads them."""
        prompts, completions = [row["prompt"] for row in rows], [row[column] for row in rows]
        tokenizer = self.trainer.processing_class
        ids = tokenization.tokenize_for_reward(tokenizer, prompts, completions)
        return fmean(map(len, ids))


def rows_per_batch(sizes: Sequence[int], fitting: float) -> int:
    """Mean rows of a full batch, given the rows of batches, of which the last may not be full.

    A single batch may not be full either; ``fitting`` is how often its tokens fit into a batch.

    >>> rows_per_batch([6, 8, 1], 1.0), rows_per_batch([6], 2.5)
    (7, 15)
    """
    if len(sizes) == 1:
        return round(sizes[0] * max(1.0, fitting))
    return round(fmean(sizes[:-1]))


def _occasions(interval: float, steps: int) -> int:
    """How often something is done every ``interval`` steps and after the last one.

    An interval below 1 is a share of all steps.
    """
    every = interval if interval >= 1 else max(1, math.ceil(interval * steps))
    return math.ceil(steps / every)


@dataclass(slots=True)
class _Mapped:
    """Seconds of the operations on rows, which grow with their number."""

    seconds: float = field(default=0.0)


@contextlib.contextmanager
def _mapped_rows(watch: Stopwatch) -> Iterator[_Mapped]:
    """Inside this block, the time of ``Dataset.map`` and ``Dataset.filter`` is added up."""
    from datasets import Dataset

    mapped = _Mapped()
    depth = 0

    def timed(original: Any) -> Any:
        def call(self: Dataset, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                seconds, result = watch.result(lambda: original(self, *args, **kwargs))
            finally:
                depth -= 1
            mapped.seconds += seconds * (depth == 0)
            return result

        return call

    with (
        mock.patch.object(Dataset, "map", timed(Dataset.map)),
        mock.patch.object(Dataset, "filter", timed(Dataset.filter)),
    ):
        yield mapped
