"""The stages that a finished stage was made from, read from the records in their folders.

A record that is missing, because its folder was removed or is elsewhere, is left out: its name and
digest are known from the stage that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from align.errors import ArtifactError
from align.runtime import artifacts
from align.runtime.artifacts import Artifact

HUB = "hub:"
"""Prefix of the digests of models on the Hub, as the plan writes them: ``hub:<id>@<revision>``."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A stage, a model from elsewhere or a Hub id in the lineage of a stage."""

    name: str
    """Name of the stage in its recipe; of a model from elsewhere, its folder's name or Hub id."""
    digest: str
    folder: Path | None
    """None if the folder is not on this disk."""
    artifact: Artifact | None
    """None for models that no stage has written, and for removed folders."""
    inputs: Mapping[str, str]
    """Digest of each input by the key of the stage that names it."""

    @property
    def hub_id(self) -> str:
        """The id of a model on the Hub; empty for others."""
        return self.digest.removeprefix(HUB).rpartition("@")[0] if self._is_on_hub else ""

    @property
    def _is_on_hub(self) -> bool:
        return self.digest.startswith(HUB)


def lineage(folder: Path, artifact: Artifact) -> dict[str, Origin]:
    """The origins of a stage by digest, each after those that it was made from; itself last.

    The digest of a record counts, where there is one: a stage without prompts stores another digest
    of its data, which leaves out the keys of the prompts.
    """
    origins: dict[str, Origin] = {}
    _add(origins, Origin(artifact.name, artifact.digest, folder, artifact, {}))
    return origins


def _add(origins: dict[str, Origin], origin: Origin) -> None:
    inputs: dict[str, str] = {}
    if origin.artifact is not None and origin.folder is not None:
        for key, entry in origin.artifact.inputs.items():
            source = _origin(entry, beside=origin.folder)
            inputs[key] = source.digest
            if source.digest not in origins:
                _add(origins, source)
    origins[origin.digest] = replace(origin, inputs=inputs)


def _origin(entry: Mapping[str, str], *, beside: Path) -> Origin:
    """The origin that an input names, without its inputs. A folder of runs may have been moved."""
    target, digest = Path(entry["folder"]), entry["digest"]
    if digest.startswith(HUB):
        return Origin(entry["folder"], digest, None, None, {})
    folder = target if target.is_dir() else beside.resolve().parent / target.name
    if not folder.is_dir():
        return Origin(target.name, digest, None, None, {})
    try:
        artifact = artifacts.read_artifact(folder)
    except ArtifactError:
        artifact = None
    if artifact is None:
        return Origin(folder.name, digest, folder, None, {})
    return Origin(artifact.name, artifact.digest, folder, artifact, {})
