"""The memory of each stage on a device, for `align plan --config FILE` and `--gpu-memory SIZE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from align.config.base import Lora, NewModel
from align.config.completions import Label
from align.config.inference_bill import (
    InferenceBill,
    InferenceWork,
    inference_bill,
    inference_reductions,
)
from align.config.memory_bill import (
    Bill,
    Sharding,
    Trained,
    bill,
    reductions,
    trained_weights,
)
from align.config.online_rl import OnlineRL
from align.runtime.terminal import with_unit

if TYPE_CHECKING:
    from rich.table import Table

    from align.pipeline.estimates import Estimate, Inference
    from align.pipeline.plan import PlannedStage

NAMES = {
    "activations": "acts.",
    "embedding": "embed.",
    "exchange": "exch.",
    "gradients": "grads",
    "optimizer": "optim.",
    "sampling": "sampl.",
}
"""Shorter names of columns: 80 columns suffice."""
UNKNOWN_MODEL = " before the model that it reads"
UNKNOWN_ROW = ": longest row unknown; run `{}` with this version of Align"
LEGEND = (
    "memory of a device for the longest rows; the peak is the largest sum that is in memory at one "
    "time, without libraries and fragmentation; frozen: reference, reward models, base of adapters; "
    "acts.: activations; layer: the backward pass of a layer, or its forward pass in sample, label "
    "and evaluate, whose weights are those of the largest policy; embed.: a further gradient of the "
    "embeddings; exch.: gradients and layers that processes exchange"
)
COLUMNS = [field.name for field in fields(Bill)]
"""Names of parts in their order."""

Bills = Bill | InferenceBill


def print_bills(
    console: Any,
    stages: Sequence[PlannedStage],
    estimates: Mapping[str, Estimate],
    sharding: Sharding,
    limit: int | None,
) -> None:
    """Print the parts of each stage's memory, and what would lower a peak above ``limit``."""
    lines: list[str] = []
    bills: dict[str, Bills] = {}
    own: Bills
    changes: Iterator[tuple[str, Bills]]
    for stage in stages:
        estimate = estimates[stage.name]
        if stage.config.trains_model:
            obstacle = _training_obstacle(stage, estimate)
        elif estimate.inference is not None:
            obstacle = _inference_obstacle(stage, estimate.inference)
        else:
            continue
        if obstacle:
            lines.append(f"{stage.name}: memory unknown{obstacle}")
            continue
        if stage.config.trains_model:
            own, changes = _training(stage.config, estimate, sharding, limit)
            reserved = 0.0 if estimate.forward is None else estimate.forward.reserved
            if reserved and limit is None:
                share = f"{100 * reserved:g} % of the device"
                lines.append(f"{stage.name}: without vLLM, which has {share} while it samples")
        else:
            own, changes = _inference(stage.config, estimate)
        bills[stage.name] = own
        if limit is not None:
            lines += _verdict(stage.name, own, limit, changes)
    if bills:
        console.print(_table(bills))
        console.print(LEGEND, style="dim", width=min(console.width, 80))
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _table(bills: Mapping[str, Bills]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("stage", no_wrap=True)
    parts = {name: own.parts() for name, own in bills.items()}
    columns = [part for part in COLUMNS if any(own.get(part) for own in parts.values())]
    for part in (*columns, "peak"):
        table.add_column(NAMES.get(part, part), justify="right", no_wrap=True)
    for name, own in parts.items():
        numbers = [*(own.get(part, 0) for part in columns), bills[name].peak]
        table.add_row(name, *(_size(number).replace(" ", "") for number in numbers))
    return table


def _training_obstacle(stage: PlannedStage, estimate: Estimate) -> str:
    """Why the bill of a stage that trains a model is unknown; empty if it is known."""
    if estimate.size is None or not estimate.size.linear:
        return UNKNOWN_MODEL
    if estimate.forward is not None:
        return ""
    if isinstance(stage.config, OnlineRL):
        return UNKNOWN_ROW.format(stage.config.prompts)
    return ": longest row unknown; set `trainer.max_length`"


def _inference_obstacle(stage: PlannedStage, inference: Inference) -> str:
    """Why the bill of a stage without gradients is unknown; empty if it is known."""
    models = (*inference.policies, *inference.judges)
    if any(model is None or not model.size.linear for model in models):
        return UNKNOWN_MODEL
    if inference.work is not None:
        return ""
    if isinstance(stage.config, Label):
        return ": longest row unknown; plan it in the recipe of its `sample` stage, after `prepare`"
    return UNKNOWN_ROW.format(getattr(stage.config, "prompts", "prepare"))


def _training(
    config: Any, estimate: Estimate, sharding: Sharding, limit: int | None
) -> tuple[Bill, Iterator[tuple[str, Bill]]]:
    """The bill of a stage that trains a model, and those of changes."""
    assert estimate.size is not None and estimate.forward is not None
    trained = trained_weights(estimate.size, config, estimate.work, sharded=sharding.stage > 0)
    own = bill(estimate.size, trained, estimate.forward, sharding, limit)
    return own, _changes(config, estimate, trained, sharding, limit)


def _inference(
    config: Any, estimate: Estimate
) -> tuple[InferenceBill, Iterator[tuple[str, InferenceBill]]]:
    """The bill of a stage without gradients, and those of changes."""
    inference = estimate.inference
    assert inference is not None and inference.work is not None
    policies = [model for model in inference.policies if model is not None]
    judges = [model for model in inference.judges if model is not None]

    def planned(work: InferenceWork, dtype: str, quantization: str | None) -> InferenceBill:
        return inference_bill(policies, judges, work, dtype=dtype, quantization=quantization)

    own = planned(inference.work, config.dtype, config.quantization)
    changes = inference_reductions(config, inference.work)
    changed = ((name, planned(work, dtype, bits)) for name, work, dtype, bits in changes)
    # Logits are in float32: those of a bfloat16 model exist in both types.
    return own, ((name, smaller) for name, smaller in changed if smaller.peak < own.peak)


def _verdict(
    name: str, own: Bills, limit: int, changes: Iterator[tuple[str, Bills]]
) -> Iterator[str]:
    """Whether a stage fits, and otherwise what each change of it reaches."""
    if own.peak <= limit:
        yield f"{name}: fits: {_size(own.peak)}B of {_size(limit)}B"
        return
    yield f"{name}: does not fit: {_size(own.peak)}B of {_size(limit)}B; with"
    for change, changed in changes:
        fits = "fits" if changed.peak <= limit else "does not fit"
        yield f"  {change}: {_size(changed.peak)}B, {fits}"


def _changes(
    config: Any, estimate: Estimate, trained: Trained, sharding: Sharding, limit: int | None
) -> Iterator[tuple[str, Bill]]:
    """Changes of a stage, each alone, and the bills that they reach."""
    size, work = estimate.size, estimate.forward
    assert size is not None and work is not None
    for name, smaller, divided in reductions(work, sharding):
        yield name, bill(size, trained, smaller, divided, limit)
    if trained.optimizer_bytes > 2:
        eight_bits = replace(trained, optimizer_bytes=2)
        yield "an 8-bit optimizer", bill(size, eight_bits, work, sharding, limit)
    if isinstance(config.model, NewModel):
        return
    update: dict[str, Any] = {"lora": config.lora or Lora.model_validate({})}
    changes = [("lora", update)] if config.lora is None else []
    if config.quantization is None and not work.reserved:  # vLLM needs unquantized weights
        changes.append(("lora and quantization: nf4", update | {"quantization": "nf4"}))
    for name, update in changes:
        changed = config.model_copy(update=update)
        weights = trained_weights(size, changed, estimate.work, sharded=False)
        yield name, bill(size, weights, work, sharding, limit)


def _size(number: float) -> str:
    """Three digits and a prefix: ``1.23 G``; 0 is a dash."""
    return with_unit(number) if number else "–"
