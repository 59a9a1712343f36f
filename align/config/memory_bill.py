"""The memory of a stage on each device, part by part, and what would lower it.

Activations are those of a decoder with gated feed-forward layers, as of Llama and Qwen, in which
the backward pass of a token needs, for each layer, 8 vectors of the width, 2 of keys and values and
4 of the feed-forward layer. Left out: libraries and fragmentation.
``benchmarks/plan_memory.py`` compares the bill with the tensors of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from align.config.base import Workload
from align.config.memory import BYTES_PER_PARAMETER, ModelSize, training_bytes
from align.errors import RecipeError

HEAD_COLUMNS = 2**15
"""Columns of the buffer in which TRL's output layer computes logits, of a smaller vocabulary too.
"""
HEAD_ROWS = {"cpu": 256, "cuda": 4096}
"""Tokens whose logits are in memory at one time, by the kind of device."""
HEAD_COPIES = 7.25
"""Further tensors of the size of these logits in the backward pass on a CPU: seven in float32, and
one of a byte per logit. On a GPU, TRL's kernel replaces the logits by their gradient."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a launch configuration divides a model over its processes."""

    processes: int = 1
    stage: int = 0
    """That of ZeRO: 0 for whole models, 2 for gradients and optimizer, 3 for weights as well."""
    device: Literal["cpu", "cuda"] = "cuda"
    needs_deepspeed: bool = False

    def share(self, number: float, stage: int) -> int:
        """The share of one process of what is divided from this stage on."""
        return round(number / self.processes if self.stage >= stage else number)


@dataclass(frozen=True, slots=True)
class Work:
    """The tensors of a stage that depend on its settings, apart from the shape of its model."""

    tokens: int
    """Tokens of a forward pass with gradients."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass."""
    accumulates: bool = False
    """Whether gradients of earlier forward passes are in memory during a forward pass."""
    activation_bytes: int = 4
    has_logits: bool = True
    sampled: tuple[int, int] | None = None
    """Rows that are sampled at once, and their tokens at the end; None for no sampling. Without
    rows, another program samples."""
    copied: int = 0
    """Bytes of the weights that are copied while completions are sampled."""
    reserved: float = 0.0
    """Share of the device that vLLM has while completions are sampled."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained and what is frozen, in numbers of parameters and bytes."""

    parameters: int
    optimizer_bytes: int
    """Bytes of the optimizer for each trained parameter."""
    frozen: int
    """Bytes of frozen weights and copies."""
    embeddings: int = 0
    """Trained matrices of the size of the vocabulary: 1 if the output layer is that of the input, 2
    if it is another, 0 with adapters."""

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and optimizer in one process, and what is frozen."""
        return (4 + 4 + self.optimizer_bytes) * self.parameters + self.frozen


@dataclass(frozen=True, slots=True)
class Bill:
    """Bytes on each device. Not all parts are in memory at the same time."""

    weights: int
    gradients: int
    optimizer: int
    frozen: int
    exchange: int
    """Buckets in which processes add up their gradients, or layers that are gathered."""
    activations: int
    """What a forward pass stores for the backward pass."""
    layer: int
    """What the backward pass of one layer needs besides."""
    logits: int
    embedding: int
    """The gradient of the output layer or of the embeddings that arises before the others, or is
    added to an earlier one."""
    sampling: int
    """Keys and values of sampled tokens, the logits of the last ones, or the memory of vLLM; copies
    of weights, and those that are gathered from all processes."""
    accumulates: bool = False
    adds_embedding: bool = False
    """Whether a whole second gradient of the embeddings is added to the first one."""

    @property
    def peak(self) -> int:
        """The largest sum: in sampling, or at the begin or the end of a backward pass.

        Activations are freed while gradients arise, so both are complete only if earlier passes
        have left gradients. The gradient of the output layer arises first.
        """
        held = self.weights + self.optimizer + self.frozen + self.exchange
        begin = self.activations + max(self.layer, self.logits) + self.embedding
        begin += self.gradients * self.accumulates
        end = self.gradients + self.embedding * self.adds_embedding
        return held + max(begin, end, self.sampling)

    def parts(self) -> dict[str, int]:
        """The parts by name."""
        flags = ("accumulates", "adds_embedding")
        names = [field.name for field in fields(self) if field.name not in flags]
        return {name: getattr(self, name) for name in names}


def bill(
    size: ModelSize,
    trained: Trained,
    work: Work,
    sharding: Sharding,
    device_bytes: int | None = None,
) -> Bill:
    """The bill of a stage that trains models of one size.

    Without ``device_bytes``, the memory of a device, the share that vLLM has of it is left out.
    """
    shape = Shape.of(size)
    layer = 8 * shape.width + 2 * shape.key_value + 4 * shape.inner
    per_token = shape.layers * (shape.width if work.checkpointing else layer) + 2 * shape.width
    # Gradients of the three vectors of the feed-forward layer, and a layer that is computed again.
    of_layer = 3 * shape.inner + layer * work.checkpointing
    embedding = 0
    if trained.embeddings and (work.has_logits or work.accumulates):
        embedding = 4 * size.vocabulary * shape.width
    sampling = work.copied + round(work.reserved * (device_bytes or 0))
    if work.sampled is not None:
        rows, tokens = work.sampled
        sampling += sampling_bytes(size, rows, rows * tokens, work.activation_bytes)
        if sharding.stage >= 2:  # all weights beside the parts of this process
            all_weights = 4 * trained.parameters + trained.frozen
            sampling += all_weights if sharding.stage == 3 else sharding.share(all_weights, 2)
    gradients = 4 * trained.parameters
    return Bill(
        weights=sharding.share(4 * trained.parameters, 3),
        gradients=sharding.share(gradients, 2),
        optimizer=sharding.share(trained.optimizer_bytes * trained.parameters, 2),
        frozen=sharding.share(trained.frozen, 3),
        exchange=_exchange(size, shape, trained, sharding),
        activations=work.tokens * per_token * work.activation_bytes,
        layer=work.tokens * of_layer * work.activation_bytes,
        logits=_logits(work, size.vocabulary, sharding.device) if work.has_logits else 0,
        embedding=embedding,
        sampling=sampling,
        accumulates=work.accumulates,
        adds_embedding=work.accumulates or (trained.embeddings == 1 and work.has_logits),
    )


def sampling_bytes(
    size: ModelSize, rows: int, tokens: int, activation_bytes: int, copies: int = 4
) -> int:
    """Bytes of the keys and values of all tokens, and of the last logits of each row.

    ``copies`` are the tensors of the size of these logits, in float32: the logits, probabilities,
    and random numbers twice. Where heads share keys and values, those of a layer are repeated.
    """
    shape = Shape.of(size)
    repeated = 2 * shape.width * (shape.key_value < shape.width)
    cached = tokens * (shape.layers * 2 * shape.key_value + repeated) * activation_bytes
    return cached + copies * rows * size.vocabulary * 4


def _exchange(size: ModelSize, shape: Shape, trained: Trained, sharding: Sharding) -> int:
    """Bytes of the gradients or the weights that processes exchange.

    DDP has a bucket for every gradient. With divided weights, the embeddings, a layer and the next
    one are gathered, and the gradient of a layer is whole before it is divided.
    """
    if sharding.processes == 1 or sharding.stage == 2:
        return 0
    if sharding.stage == 0:
        return 4 * trained.parameters
    layer = sum(outputs * inputs for outputs, inputs in size.linear.values()) // shape.layers
    gathered = size.embeddings * size.vocabulary * shape.width + 2 * layer
    whole = trained.embeddings > 0
    per_weight = 4.0 if whole else trained.frozen / size.parameters
    return round(per_weight * gathered) + 4 * layer * whole


def _logits(work: Work, vocabulary: int, device: str) -> int:
    """Bytes of the output layer: a tile of logits, and copies of it on a CPU."""
    rows = min(work.tokens, HEAD_ROWS[device])
    buffer = rows * HEAD_COLUMNS * work.activation_bytes
    if device == "cuda":
        return buffer
    copies = HEAD_COPIES + (work.activation_bytes < 4)
    return buffer + round(rows * min(vocabulary, HEAD_COLUMNS) * copies * 4)


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of the vectors of a decoder, from the shapes of its linear layers."""

    layers: int
    width: int
    inner: int
    key_value: int

    @classmethod
    def of(cls, size: ModelSize) -> Shape:
        """The widths of a model whose linear layers are known."""
        numbers = {next(filter(str.isdigit, name.split(".")), "") for name in size.linear}
        inputs = [shape[1] for shape in size.linear.values()]
        outputs = [shape[0] for shape in size.linear.values()]
        return cls(len(numbers), min(inputs), max(inputs), min(outputs))


def read_sharding(file: Path) -> Sharding:
    """The sharding of a launch configuration of accelerate.

    Raises:
        RecipeError: The file is missing, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror}; accelerate_configs/ has examples") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise RecipeError(f"{file}: expected a mapping; accelerate_configs/ has examples")
    processes = content.get("num_processes", 1)
    if not isinstance(processes, int) or processes < 1:
        raise RecipeError(f"{file}: num_processes: expected a whole number from 1, got {processes}")
    on_cpu = str(content.get("use_cpu", False)).lower() == "true"
    is_deepspeed = content.get("distributed_type") == "DEEPSPEED"
    return Sharding(processes, _stage(content), "cpu" if on_cpu else "cuda", is_deepspeed)


def _stage(content: Mapping[str, Any]) -> int:
    kind = str(content.get("distributed_type", "NO"))
    if kind == "FSDP":
        options = content.get("fsdp_config") or {}
        reshards = str(options.get("fsdp_reshard_after_forward", True)).lower()
        return 2 if reshards in ("false", "shard_grad_op") else 3
    if kind == "DEEPSPEED":
        stage = (content.get("deepspeed_config") or {}).get("zero_stage", 2)
        return int(stage) if stage in (2, 3) else 0
    return 0


def parse_bytes(text: str) -> int:
    """A size such as ``24GB`` or ``80GiB`` in bytes.

    Raises:
        RecipeError: It is no size.

    >>> parse_bytes("24GB"), parse_bytes("1.5 GiB")
    (24000000000, 1610612736)
    """
    compact = text.replace(" ", "").upper()
    for unit, factor in UNITS.items():
        number = compact.removesuffix(unit)
        if number != compact and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return round(float(number) * factor)
    raise RecipeError(f"--gpu-memory {text}: expected a size such as 24GB or 80GiB")


def reductions(work: Work, sharding: Sharding) -> Iterator[tuple[str, Work, Sharding]]:
    """Changes of a launch and a batch that lower the peak, each alone, with its name."""
    if not work.checkpointing:
        yield "gradient checkpointing", replace(work, checkpointing=True), sharding
    if work.tokens > 1:
        yield "half the rows in a forward pass", replace(work, tokens=work.tokens // 2), sharding
    if work.copied:
        yield "merge_adapter: false", replace(work, copied=0), sharding
    if work.reserved:
        half = replace(work, reserved=work.reserved / 2)
        yield f"vllm_gpu_memory_utilization: {half.reserved:g}", half, sharding
    if sharding.processes > 1 and sharding.stage < 3:
        yield "ZeRO-3 or FSDP2", work, replace(sharding, stage=3)


def trained_weights(size: ModelSize, config: Any, workload: Workload, *, sharded: bool) -> Trained:
    """What a stage with ``config`` and ``workload`` trains, and what it holds besides."""
    optimizer = training_bytes(config.optimizer_name) - 8
    if config.lora:
        parameters = size.adapter_parameters(config.lora) * config.trained_models
        return Trained(parameters, optimizer, size.weight_bytes(config.dtype, config.quantization))
    copies = config.frozen_models(workload, sharded=sharded) * BYTES_PER_PARAMETER[config.dtype]
    parameters = size.parameters
    if size.embeddings == 2 and not config.writes_policy:  # a score head replaces the output layer
        parameters -= size.vocabulary * size.width
    return Trained(
        parameters * config.trained_models, optimizer, size.parameters * copies, size.embeddings
    )
