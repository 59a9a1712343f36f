"""The sizes of the models that stages train, write and load, from files and from recipes.

No model is loaded. A size that is not known before another stage has run is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from align.config.base import NewModel
from align.config.inference_bill import StoredModel
from align.config.memory import ModelSize, new_model_size
from align.models import files, linear_layers
from align.models.gguf_files import GgufHeader
from align.pipeline.plan import PlannedStage

Known = Mapping[Path, StoredModel | None]
"""The models that earlier stages write and that GGUF files become, by folder."""


def trained_size(stage: PlannedStage, known: Known) -> ModelSize | None:
    """The size of the model that a stage trains, without an adapter."""
    model = getattr(stage.config, "model", None)
    if isinstance(model, NewModel):
        return new_model_size(model)
    source = _model(stage.inputs["model"], known)
    return None if source is None else source.size


def written_model(stage: PlannedStage, size: ModelSize | None) -> StoredModel | None:
    """What a stage writes that trains a model of this size."""
    if size is None:
        return None
    lora = getattr(stage.config, "lora", None)
    if lora is not None:
        return StoredModel(size, size.adapter_parameters(lora))
    if size.embeddings == 2 and not stage.config.writes_policy:
        # The head of a reward model replaces the output layer.
        outputs = (size.vocabulary - 1) * size.width
        return StoredModel(replace(size, parameters=size.parameters - outputs))
    return StoredModel(size)


def loaded_models(stage: PlannedStage, known: Known, *, policies: bool) -> list[StoredModel | None]:
    """The policies that a stage without gradients loads, or else its reward models."""
    sources = dict.fromkeys(_sources(stage, policies=policies))
    return [_model(source, known) for source in sources]


def _sources(stage: PlannedStage, *, policies: bool) -> Iterator[Path | str]:
    for key, source in stage.inputs.items():
        declared = stage.config.inputs[key.split(".")[0]]
        if declared.models and declared.policies == policies:
            yield source


def _model(source: Path | str, known: Known) -> StoredModel | None:
    if isinstance(source, str):
        return None
    return known[source] if source in known else _stored_model(source)


def gguf_model(header: GgufHeader) -> StoredModel:
    """The model that a GGUF file becomes."""
    embeddings = header.tensors.get("token_embd.weight", (0, 0))
    layers = linear_layers.of_gguf(header)
    return StoredModel(ModelSize(header.parameters, layers, int(embeddings[-1])))


def _stored_model(folder: Path) -> StoredModel | None:
    """The model of a folder, from its config and the headers of its weights."""
    base, adapter = folder, 0
    config = folder / files.ADAPTER_CONFIG
    if config.is_file():
        base = Path(files.read_adapter_base(config, folder).source)
        adapter = files.count_parameters(folder / files.ADAPTER_WEIGHTS)
    weights = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    if not weights:
        return None
    limits = files.read_limits(base)
    parameters = sum(map(files.count_parameters, weights))
    layers = linear_layers.of_folder(base)
    return StoredModel(ModelSize(parameters, layers, limits.vocabulary, limits.positions), adapter)
