"""What a stage will take, estimated before it runs: rows, steps, tokens, memory. Light: nothing is loaded.

Tokens are words times 1.35, English's usual ratio in subword vocabularies. Memory is what does not depend on the batch:
weights, gradients and Adam's two moments, and the reference where it stays (KTO's, and DPO's where it cannot be asked ahead); activations come on top. What is not known is None, not a guess.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import trl_fields
from align.config.base import NewModel
from align.config.control import Control
from align.config.data import Prepare, Sample
from align.config.ppo import PPO
from align.config.training import DPO, KTO, SFT, Reward, TRLStage
from align.config.validation import FUNCTION
from align.data import prepare, sources, statistics
from align.models.files import weights_header
from align.pipeline.plan import PlannedStage
from align.runtime import artifacts

TOKENS_A_WORD = 1.35
LARGEST_READ = 8 * 2**20  # bytes of a source that is read for a plan
NF4 = 0.55  # bytes a parameter, its scales included
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one stage; None is unknown. ``steps`` are the optimizer's; of ``control`` the environments', of all seeds."""

    rows: int | None = None
    steps: int | None = None
    tokens: int | None = None
    memory_bytes: int | None = None


def estimate(steps: Sequence[PlannedStage], *, world_size: int) -> dict[str, Estimate]:
    """An estimate for each stage by name. ``world_size`` processes share the batches."""
    prepared: dict[Path, dict[str, Any]] = {}
    parameters: dict[Path, int | None] = {}
    found = {}
    for step in steps:
        config = step.config
        if isinstance(config, Prepare):
            prepared[step.folder] = _prepared(step)
            found[step.name] = Estimate(
                rows=sum(prepared[step.folder].get("rows", {}).values()) or None
            )
        elif isinstance(config, PPO):
            parameters[step.folder] = _parameters(step, parameters)
            found[step.name] = _ppo(config, parameters[step.folder])
        elif isinstance(config, SFT | DPO | KTO | Reward):
            parameters[step.folder] = _parameters(step, parameters)
            found[step.name] = _training(
                step, config, prepared, parameters[step.folder], world_size
            )
        elif isinstance(config, Sample):
            prompts = _figures(step, "prompts", prepared).get("prompts", {}).get(config.split)
            if prompts is not None:
                prompts = min(prompts, config.n_prompts or prompts) * config.n_completions
            found[step.name] = Estimate(rows=prompts)
        elif isinstance(config, Control):
            found[step.name] = Estimate(steps=config.steps * len(config.seeds))
        else:
            found[step.name] = Estimate()
    return found


def _prepared(step: PlannedStage) -> dict[str, Any]:
    """The figures of a ``prepare`` stage: those it left, else those of a small local source read now."""
    made = artifacts.read_artifact(step.folder)
    if made is not None:
        return made.metrics
    assert isinstance(step.config, Prepare)
    config = step.config
    read = [sources.source_files(name, split=split) for name, split, _ in config.sources()]
    size = sum(file.stat().st_size for files in read for file in files)
    if not all(read) or size > LARGEST_READ:
        return {}
    rows = prepare.prepare_rows(**config.model_dump(exclude={"stage"}))
    return statistics.describe(rows)


def _training(
    step: PlannedStage,
    config: SFT | DPO | KTO | Reward,
    prepared: dict[Path, dict[str, Any]],
    parameters: int | None,
    world_size: int,
) -> Estimate:
    role = next(role for role in config.inputs if role != "model")
    told = _figures(step, role, prepared)
    rows, sides = _rows(config, told)
    batch = _knob(config, "per_device_train_batch_size") * world_size
    accumulate = _knob(config, "gradient_accumulation_steps")
    steps = _knob(config, "max_steps")
    if steps <= 0 and rows is not None:
        each_epoch = max(1, math.ceil(math.ceil(rows / batch) / accumulate))
        steps = math.ceil(each_epoch * _knob(config, "num_train_epochs"))
    words = told.get("words", {})
    tokens = None
    if steps > 0 and all(f"{side}_median" in words for side in sides):
        row = sum(words["prompt_median"] + words[f"{side}_median"] for side in sides)
        row *= TOKENS_A_WORD / (len(sides) if isinstance(config, KTO) else 1)
        tokens = round(row * steps * batch * accumulate)
    memory = _memory(config, parameters) if parameters is not None else None
    return Estimate(rows, int(steps) if steps > 0 else None, tokens, memory)


def _ppo(config: PPO, parameters: int | None) -> Estimate:
    """Rows are completions. Memory is that of all four roles: on one backbone its weights, else each role's own."""
    steps = config.steps * config.epochs * config.minibatches
    memory = None
    if parameters is not None:
        each = parameters * _BYTES[config.dtype]
        critic = config.advantages == "gae"
        models = sum(not FUNCTION.match(name) for name in config.rewards)
        learning, frozen = 1 + critic, 1 + models
        memory = each * (4 * learning + frozen)
        if config.lora is not None:  # reward models that stand elsewhere come on top
            memory = round(parameters * NF4) if config.quantization else each
    return Estimate(rows=config.steps * config.batch_size, steps=steps, memory_bytes=memory)


def _figures(step: PlannedStage, role: str, prepared: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """What is known of the data that a stage reads."""
    data = Path(step.inputs[role])
    if data in prepared:
        return prepared[data]
    made = artifacts.read_artifact(data)
    return made.metrics if made is not None else {}


def _rows(
    config: SFT | DPO | KTO | Reward, figures: dict[str, Any]
) -> tuple[int | None, tuple[str, ...]]:
    """How many rows a stage trains on, and which lengths they have."""
    counts = {
        kind: splits.get("train")
        for kind, splits in figures.items()
        if kind in ("demonstrations", "pairs", "unpaired")
    }
    if isinstance(config, SFT):
        return counts.get("demonstrations"), ("completion",)
    if isinstance(config, DPO | Reward):
        return counts.get("pairs"), ("chosen", "rejected")
    both = [n * k for kind, k in (("unpaired", 1), ("pairs", 2)) if (n := counts.get(kind))]
    return sum(both) or None, ("chosen", "rejected") if "pairs" in counts else ("completion",)


def _knob(config: TRLStage, word: str) -> Any:
    """A trainer's setting: the recipe's, else the default of TRL's class."""
    if word in config.trainer:
        return config.trainer[word]
    default = trl_fields.trl_fields(str(config.trainer_config))[word].default
    return json.loads(str(default))


def _memory(config: SFT | DPO | KTO | Reward, parameters: int) -> int:
    weights = parameters * _BYTES[config.dtype]
    if config.lora is not None:
        # Adapters are a few per cent of the weights; their gradients and moments are not counted.
        return weights
    copies = 4  # weights, gradients, two moments
    sharded = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys()
    asked = isinstance(config, DPO) and (sharded or config.trainer.get("sync_ref_model"))
    if asked or isinstance(config, KTO):
        copies += 1
    return weights * copies


def _parameters(step: PlannedStage, known: dict[Path, int | None]) -> int | None:
    model = getattr(step.config, "model", None)
    if isinstance(model, NewModel):
        return _new_parameters(model)
    source = step.inputs["model"]
    if isinstance(source, str):
        return None  # on the Hub
    if source in known:
        return known[source]
    return _stored_parameters(source)


def _new_parameters(model: NewModel) -> int:
    """Parameters of a Llama of this shape, as transformers builds it (RMS norms, no biases)."""
    width, heads = model.hidden_size, model.num_attention_heads
    key_value = width // heads * (model.num_key_value_heads or heads)
    layer = (
        2 * width * width + 2 * width * key_value + 3 * width * model.intermediate_size + 2 * width
    )
    embeddings = model.vocab_size * width * (1 if model.tie_word_embeddings else 2)
    return model.num_hidden_layers * layer + embeddings + width


def _stored_parameters(folder: Path) -> int | None:
    base = folder
    config = folder / "adapter_config.json"
    if config.is_file():
        base = Path(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
    files = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    if not files:
        return None
    tensors = [t for file in files for t in weights_header(file)[1].values()]
    return sum(math.prod(tensor["shape"]) for tensor in tensors)
