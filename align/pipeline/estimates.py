"""Estimates of the work and the memory of each stage before it runs. No model is loaded.

Tokens are words times 1.35, the usual ratio of subword vocabularies in English. Memory excludes
activations, which depend on the batch. An unknown number is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from align.config.base import Workload
from align.config.completions import Sample
from align.config.data import Prepare
from align.config.inference_bill import InferenceWork, StoredModel
from align.config.memory import ModelSize
from align.config.memory_bill import Work
from align.data import sources, statistics
from align.data.prepare import PreparedData, prepare
from align.models.gguf_files import read_header
from align.pipeline import model_sizes
from align.pipeline.plan import PlannedStage
from align.runtime import artifacts, sharding

LARGEST_SOURCE = 8 * 2**20  # bytes; larger sources are not read for a plan


@dataclass(frozen=True, slots=True)
class Inference:
    """The models and the batches of a stage without gradients; None is unknown."""

    policies: list[StoredModel | None]
    judges: list[StoredModel | None]
    """Reward models."""
    work: InferenceWork | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated work and memory of one stage; None is unknown."""

    work: Workload
    memory_bytes: int | None = None
    """Weights, gradients, optimizer states and frozen models of one process."""
    size: ModelSize | None = None
    """The model that the stage trains; None if there is none or it is unknown."""
    forward: Work | None = None
    """The size of a forward pass in training."""
    inference: Inference | None = None
    """What a stage without gradients loads and computes; None if it loads no model."""


def prepare_small(stages: Sequence[PlannedStage]) -> dict[Path, PreparedData]:
    """Prepare the data of unfinished ``prepare`` stages in memory, if their sources are small."""
    prepared = {}
    for stage in stages:
        if not stage.config.prepares_data or artifacts.read_artifact(stage.folder) is not None:
            continue
        read = [s for s in stage.config.external_sources() if s.split]
        files = [sources.source_files(s.name, split=s.split) for s in read]
        size = sum(file.stat().st_size for each in files for file in each)
        if all(files) and size <= LARGEST_SOURCE:
            prepared[stage.folder] = prepare(cast(Prepare, stage.config))
    return prepared


def estimate(
    stages: Sequence[PlannedStage],
    *,
    world_size: int,
    prepared: Mapping[Path, PreparedData] | None = None,
    lost: Mapping[str, int] | None = None,
) -> dict[str, Estimate]:
    """Estimate each stage, by name. ``world_size`` processes share the batches.

    ``prepared`` are the data of :func:`prepare_small`, and ``lost`` the numbers of training rows
    that stages lose, by name.
    """
    prepared = prepare_small(stages) if prepared is None else prepared
    known: dict[Path, Mapping[str, Any]] = {}  # statistics of prepared data and of completions
    models: dict[Path, StoredModel | None] = {
        folder: model_sizes.gguf_model(read_header(file))
        for stage in stages
        for folder, file in stage.gguf_files.items()
    }
    estimates = {}
    for stage in stages:
        if stage.config.prepares_data:
            known[stage.folder] = _data_statistics(stage, prepared)
            rows = sum(known[stage.folder].get("rows", {}).values()) or None
            estimates[stage.name] = Estimate(Workload(rows=rows))
            continue
        data = {**_input_statistics(stage, known), "lost_rows": (lost or {}).get(stage.name, 0)}
        work = stage.config.workload(data, world_size)
        if isinstance(stage.config, Sample) and work.rows is not None:
            known[stage.folder] = stage.config.written(work.rows, data)
        memory = size = forward = inference = None
        if stage.config.trains_model:
            size = model_sizes.trained_size(stage, models)
            models[stage.folder] = model_sizes.written_model(stage, size)
            sharded = sharding.kind() is not None
            if size is not None:
                memory = stage.config.memory_bytes(size, work, sharded=sharded)
                forward = stage.config.forward_work(size, data, world_size)
        else:
            inference = _inference(stage, models, stage.config.inference_work(data, world_size))
        estimates[stage.name] = Estimate(work, memory, size, forward, inference)
    return estimates


def _inference(
    stage: PlannedStage, known: model_sizes.Known, work: InferenceWork | None
) -> Inference | None:
    """The models of a stage without gradients; None if it loads none."""
    policies, judges = (
        model_sizes.loaded_models(stage, known, policies=policies) for policies in (True, False)
    )
    return Inference(policies, judges, work) if policies or judges else None


def count_requests(
    stages: Sequence[PlannedStage], estimates: Mapping[str, Estimate]
) -> Iterator[str]:
    """A line for each judge behind an API, with the largest number of its requests.

    Raises:
        UserError: A rubric cannot be used.
    """
    for stage in stages:
        work = estimates[stage.name].work
        pairs = work.rows if work.pairs is None else work.pairs
        for judge in stage.config.server_judges.values():
            from align.judges import server_check  # only where there is such a judge

            if pairs is None or stage.status == "reused":
                continue
            requests = server_check.count_requests(judge, pairs)
            yield (
                f"{stage.name}: at most {requests:,} requests to {judge.name}, without further "
                "attempts; stored verdicts are not requested again"
            )


def _data_statistics(
    stage: PlannedStage, prepared: Mapping[Path, PreparedData]
) -> Mapping[str, Any]:
    """The statistics of a ``prepare`` stage: of its artifact, or of its small local source."""
    artifact = artifacts.read_artifact(stage.folder)
    if artifact is not None:
        return artifact.metrics
    if stage.folder not in prepared:
        return {}
    return statistics.collect(prepared[stage.folder]).summary()


def _input_statistics(
    stage: PlannedStage, known: Mapping[Path, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """The statistics of the data that a stage reads; empty if unknown."""
    tables = stage.config.required_tables()
    if not tables or tables[0].input not in stage.inputs:
        return {}
    data = Path(stage.inputs[tables[0].input])
    if data in known:
        return known[data]
    artifact = artifacts.read_artifact(data)
    return artifact.metrics if artifact is not None else {}
