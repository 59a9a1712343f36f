"""The memory of each stage on a device, for `align plan --config FILE` and `--gpu-memory SIZE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from align.config.base import Lora, NewModel
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
    from align.pipeline.estimates import Estimate
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
LEGEND = (
    "memory of a device for the longest rows of stages that train; sample, label and evaluate are "
    "not billed; the peak is the largest sum that is in memory at one time, without libraries and "
    "fragmentation; frozen: reference, reward models, base of adapters; acts.: activations; layer: "
    "the backward pass of a layer; embed.: a further gradient of the embeddings; exch.: gradients "
    "and layers that processes exchange"
)


def print_bills(
    console: Any,
    stages: Sequence[PlannedStage],
    estimates: Mapping[str, Estimate],
    sharding: Sharding,
    limit: int | None,
) -> None:
    """Print the parts of each stage's memory, and what would lower a peak above ``limit``."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("stage", no_wrap=True)
    lines: list[str] = []
    bills: dict[str, Bill] = {}
    for stage in stages:
        if not stage.config.trains_model:
            continue
        estimate = estimates[stage.name]
        size, work = estimate.size, estimate.forward
        if size is None or not size.linear:
            lines.append(f"{stage.name}: memory unknown before the model that it reads")
            continue
        if work is None:
            repair = (
                f"run `{stage.config.prompts}` with this version of Align"
                if isinstance(stage.config, OnlineRL)
                else "set `trainer.max_length`"
            )
            lines.append(f"{stage.name}: memory unknown: longest row unknown; {repair}")
            continue
        trained = trained_weights(size, stage.config, estimate.work, sharded=sharding.stage > 0)
        own = bill(size, trained, work, sharding, limit)
        bills[stage.name] = own
        if work.reserved and limit is None:
            share = f"{100 * work.reserved:g} % of the device"
            lines.append(f"{stage.name}: without vLLM, which has {share} while it samples")
        if limit is not None:
            changes = _changes(stage.config, estimate, trained, sharding, limit)
            lines += _verdict(stage.name, own, limit, changes)
    if bills:
        parts = {name: own.parts() | {"peak": own.peak} for name, own in bills.items()}
        columns = [
            part for part in next(iter(parts.values())) if any(p[part] for p in parts.values())
        ]
        for part in columns:
            table.add_column(NAMES.get(part, part), justify="right", no_wrap=True)
        for name, own_parts in parts.items():
            table.add_row(name, *(_size(own_parts[part]).replace(" ", "") for part in columns))
        console.print(table)
        console.print(LEGEND, style="dim", width=min(console.width, 80))
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _verdict(
    name: str, own: Bill, limit: int, changes: Iterator[tuple[str, Bill]]
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
    config: Any, estimate: Estimate, trained: Trained, sharding: Sharding, limit: int
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
