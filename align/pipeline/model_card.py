"""Model card: the README.md of a model folder, from the record of its stage and of its ancestors.

Its layout is the template ``model_card.md.jinja``. The card has no dates and durations, so the same
run writes the same card on the same machine. What it reads beside the records differs elsewhere:
the license in the card of the base model, which may be in the cache or not; whether folders of the
lineage still exist; whether the name of a source is that of a local file. Its metrics are those of
:mod:`align.pipeline.card_metrics`. Left out: results of ``evaluate``, which are written after the
card.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import catalog
from align.config.methods import method
from align.config.online_rl_keys import ENVIRONMENTS
from align.config.shipped import EMBEDDED
from align.config.stages import ONLINE_RL, STAGES
from align.errors import counted
from align.models import gguf_files
from align.models.files import ADAPTER_CONFIG
from align.pipeline import card_metrics
from align.pipeline.lineage import Origin, lineage
from align.runtime.artifacts import Artifact
from align.runtime.markdown import load_template

FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE_KEYS = ("license", "license_name", "license_link")


def write_model_card(folder: Path, artifact: Artifact, *, stage: Path | None = None) -> None:
    """Write the card of the model in a folder, as :func:`model_card` renders it."""
    (folder / FILE).write_text(model_card(folder, artifact, stage=stage), encoding="utf-8")


def model_card(folder: Path, artifact: Artifact, *, stage: Path | None = None) -> str:
    """The card of the model in a folder; its header is the metadata that the Hub reads.

    ``artifact`` is the record of the stage that trained it. ``stage`` is the folder of that stage,
    if the model in ``folder`` was exported from it.
    """
    import yaml

    origins = lineage(stage or folder, artifact)
    base = _base(origins, artifact.digest)
    adapter = _adapter_config(folder)
    datasets = list(_data_sources(origins))
    license = _license(base)
    writes_policy = STAGES[artifact.stage].writes_policy
    header = {
        **license,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation" if writes_policy else "text-classification",
        "base_model": _hub_base(base, adapter),
        "base_model_relation": "adapter" if adapter else "finetune",
        "datasets": [each.name for each in datasets if each.is_on_hub],
        "tags": [
            "align",
            artifact.stage,
            *([str(adapter.get("peft_type")).lower()] if adapter else []),
        ],
    }
    if not header["base_model"]:
        del header["base_model_relation"]
    return load_template(_TEMPLATE).render(
        header=yaml.safe_dump(
            {key: value for key, value in header.items() if value},
            sort_keys=False,
            allow_unicode=True,
        ),
        artifact=artifact,
        writes_policy=writes_policy,
        adapter=adapter,
        is_merged=stage is not None and _adapter_config(stage) is not None,
        adapter_base=_adapter_base(adapter),
        gguf_base=_gguf_base(base, _adapter_base(adapter)),
        base=_described(base),
        has_base=base is not None,
        license=license.get("license", "unknown"),
        methods=method(artifact.stage, artifact.recipe),
        rows=list(_lineage_rows(origins)),
        datasets=datasets,
        settings=dict(_settings(artifact)),
        environment=_environment(artifact),
        metrics=list(card_metrics.rows(stage or folder, artifact)),
    )


def _base(origins: Mapping[str, Origin], digest: str) -> Origin | None:
    """The model at the root of the lineage, which no stage has trained; None for a new model."""
    origin = origins[digest]
    if origin.artifact is None or origin.artifact.stage == gguf_files.KIND:
        return origin
    model = origin.inputs.get("model", "")
    return _base(origins, model) if model in origins else None


def _described(base: Origin | None) -> str:
    """The base model in words."""
    if base is None:
        return "none: the weights were initialized at random"
    if base.hub_id:
        return f"[{base.hub_id}](https://huggingface.co/{base.hub_id})"
    if base.artifact is not None:
        file = base.artifact.recipe.get("file", base.name)
        return f"the GGUF file `{file}`"
    return f"`{base.name}`, a local folder"


def _hub_base(base: Origin | None, adapter: Mapping[str, Any] | None) -> str:
    """The Hub id that ``base_model`` may name: of an adapter, only what it is loaded on."""
    if adapter is None:
        return base.hub_id if base is not None else ""
    name = str(adapter.get("base_model_name_or_path"))
    return name if base is not None and name == base.hub_id else ""


def _license(base: Origin | None) -> dict[str, str]:
    """The license of the base model as the Hub writes it, if it is known on this machine.

    It is read from the record of a GGUF file, or from the model's own card.
    """
    if base is None:
        return {}
    if base.artifact is not None:
        license = str(base.artifact.recipe.get("license") or "")
        return {"license": license} if license else {}
    file = _cached_card(base)
    if file is None or not file.is_file():
        return {}
    import yaml
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}  # a card without valid metadata states no license
    values = {key: getattr(data, key, None) for key in _LICENSE_KEYS}
    return {key: value for key, value in values.items() if value and isinstance(value, str)}


def _cached_card(base: Origin) -> Path | None:
    """The card of a base model: in its folder, or in the cache of the Hub."""
    if base.folder is not None:
        return base.folder / FILE
    from huggingface_hub import try_to_load_from_cache

    revision = base.digest.rpartition("@")[2]
    file = try_to_load_from_cache(base.hub_id, FILE, revision=revision) if base.hub_id else None
    return Path(file) if isinstance(file, str) else None


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of an adapter; None for a folder with full weights."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def _adapter_base(adapter: Mapping[str, Any] | None) -> str:
    """The folder's name of the base that an adapter names; empty for a base on the Hub."""
    base = Path(str((adapter or {}).get("base_model_name_or_path", "")))
    return base.name if base.is_absolute() else ""


@dataclass(frozen=True, slots=True)
class _GgufBase:
    """The GGUF file that the base of an adapter was converted from."""

    file: str
    command_file: str
    """Its name as a word of a command."""
    sha256: str
    """Empty for conversions of earlier versions."""
    transformers: str
    """The version that converted it."""


def _gguf_base(base: Origin | None, folder: str) -> _GgufBase | None:
    """The file of the base called ``folder``; None if that is no converted folder."""
    artifact = base.artifact if base is not None else None
    if base is None or base.folder is None or artifact is None or base.folder.name != folder:
        return None
    file = str(artifact.recipe.get("file", artifact.name))
    return _GgufBase(
        file,
        shlex.quote(file),
        str(artifact.recipe.get("sha256", "")),
        artifact.versions.get("transformers", ""),
    )


def _lineage_rows(origins: Mapping[str, Origin]) -> Iterator[tuple[str, str, str, str]]:
    """Name, kind, digest and inputs of each origin."""
    for digest, origin in origins.items():
        kind = "model" if origin.hub_id or origin.folder else "removed"
        kind = kind if origin.artifact is None else origin.artifact.stage
        inputs = ", ".join(
            f"{key}: {origins[each].name}" for key, each in origin.inputs.items() if each in origins
        )
        shown = digest if origin.hub_id else digest[:16]
        yield origin.name, kind, shown.removeprefix("hub:"), inputs


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of prepared data, and the SHA-256 of its files by name; a Hub id has none."""

    name: str
    license: str
    files: Mapping[str, str]
    is_on_hub: bool


def _data_sources(origins: Mapping[str, Origin]) -> Iterator[_Source]:
    """The sources of all prepared data in the lineage, each once."""
    seen: set[str] = set()
    for origin in origins.values():
        artifact = origin.artifact
        if artifact is None or not getattr(STAGES.get(artifact.stage), "prepares_data", False):
            continue
        recipe = artifact.recipe
        sources = [recipe.get("source"), recipe.get("demonstrations")]
        sources += [entry.get("source") for entry in recipe.get("mixture", ())]
        for source in dict.fromkeys(map(str, filter(None, sources))):
            prefix = f"data/{source}/" if source in EMBEDDED else source
            files = {
                Path(file).name: digest
                for file, digest in artifact.metrics.get("files", {}).items()
                if file.startswith(prefix)
            }
            is_file = bool(files) or Path(source).exists()
            is_on_hub = _HUB_ID.fullmatch(source) is not None and not is_file
            if source not in seen:
                seen.add(source)
                license = catalog.license_of(source)[1]
                yield _Source(_without_folders(source), license, files, is_on_hub)


def _settings(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """The settings that differ from their defaults, without inputs; nested keys with dots."""
    stage = STAGES[artifact.stage]
    for key, value in artifact.recipe.items():
        field = stage.model_fields.get(key)
        if field is None or key in ("stage", "seed"):
            continue
        if key in stage.inputs:  # what names an input is in the lineage, others are settings
            named = {name.partition(".")[2] for name in artifact.inputs if "." in name}
            items = enumerate(value) if isinstance(value, list) else ()
            value = [item for i, item in items if str(i) not in named] or (
                value if isinstance(value, dict) else None
            )
            if not value:
                continue
        elif value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, dict):
            for name, each in value.items():
                yield f"{key}.{name}", _shown(each)
        else:
            yield key, _shown(value)


def _shown(value: Any) -> str:
    text = _without_folders(value) if isinstance(value, str) else value
    return json.dumps(text, ensure_ascii=False)


def _without_folders(text: str) -> str:
    """The name of a file with an absolute path; another text as it is."""
    return Path(text).name if Path(text).is_absolute() else text


def _environment(artifact: Artifact) -> str:
    """The class that answered the turns of the policy, with the number of turns; empty without."""
    name = artifact.recipe.get("environment")
    if name is None or artifact.stage not in ONLINE_RL:
        return ""
    place = f"`{ENVIRONMENTS[name]}`, `{name}`" if name in ENVIRONMENTS else f"`{name}`"
    turns = artifact.recipe["max_turns"]
    return f"{place}; episodes of at most {counted(turns, 'turn')}"
