"""``artifact.json``, which is written last into a stage's folder; digests, versions, commit.

A folder without ``artifact.json`` is a stage that did not finish.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align import __version__
from align.errors import ArtifactError
from align.runtime import checksums
from align.runtime.checksums import digest_file

FILE = "artifact.json"
SUMMARY = "summary.json"
"""Name of the record of a run, in its folder."""
CONVERTED = "gguf"
"""The kind of a folder that was converted from a GGUF file: no stage wrote it."""
HELD_OUT = "held_out.jsonl"
"""Name of the file of an online-RL stage with a line for each held-out prompt."""
TEMPORARY = ".*.json.*"
"""Pattern of the names that JSON files have while they are written."""
WORKING = ".working"  # exists until a stage is finished; locked while it runs
TRACKER_FILES = "events.out.tfevents."  # TensorBoard writes these until the process ends
LOADED_SUFFIXES = (".json", ".jinja", ".safetensors", ".parquet")
"""Suffixes of files that a later stage would load from a folder although no stage wrote them."""
FILE_SUFFIXES = (*LOADED_SUFFIXES, ".jsonl", ".png", ".md", ".bin", ".tmp")
"""Suffixes of the files of stages; a folder of such a name would be in their way."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True, slots=True)
class Artifact:
    """The record of a finished stage.

    ``inputs`` has the folder (or Hub id) and the digest of each input by its name. ``seconds`` is
    the duration of the run that finished the stage, without earlier interrupted runs.
    ``peak_memory_bytes`` is GPU memory on a machine with a GPU and resident memory otherwise.
    ``headline``, ``remarks`` and ``tables`` are those of the stage's result. ``files`` has the size
    and the SHA-256 of every file of the stage. ``order`` is larger than that of each stage in the
    runs folder that had finished before; 0 in artifacts of earlier versions. :func:`write_artifact`
    adds both.
    """

    stage: str
    name: str
    digest: str
    recipe: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    metrics: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    seed: int | None
    world_size: int
    seconds: float
    peak_memory_bytes: int | None
    headline: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    order: int = 0


def write_artifact(folder: Path, artifact: Artifact, *, runs: Path | None = None) -> None:
    """Write ``artifact.json``, which marks a stage's folder as finished.

    All files of the stage are flushed to the disk before, so that a power cut cannot leave a
    finished stage with lost weights. ``runs`` is the folder of the stages before it, by default
    that of ``folder``.
    """
    files = checksums.record_files(folder, stage_files(folder))
    runs = folder.absolute().parent if runs is None else runs
    order = 1 + max(map(_order, runs.glob(f"*/{FILE}")), default=0)
    record = replace(artifact, files=files, order=order)
    write_json(folder / FILE, checksums.seal(asdict(record)))


def _order(file: Path) -> int:
    """The order in an artifact; 0 if it is damaged or of an earlier version."""
    try:
        order = checksums.read_sealed(file).get("order", 0)
    except (OSError, ArtifactError):
        return 0
    return order if isinstance(order, int) else 0


def finish_order(folder: Path, artifact: Artifact) -> tuple[float, float]:
    """Sorts the finished stages of a runs folder, the last one last, whatever the clock was.

    Only among artifacts without an order, and in copies, the time of the file decides.
    """
    return artifact.order, (folder / FILE).lstat().st_mtime


def without_credentials(recipe: dict[str, Any]) -> dict[str, Any]:
    """A stage's configuration without user names and passwords in addresses."""
    text = re.sub(r"://[^/@\s\"]+@", "://", json.dumps(recipe))
    cleaned: dict[str, Any] = json.loads(text)
    return cleaned


def stage_files(folder: Path) -> list[Path]:
    """The files of a finished stage: all but its artifact, checkpoints and temporary files."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / FILE
        and not path.name.startswith(TRACKER_FILES)
        and not path.relative_to(folder).parts[0].startswith((".", "checkpoint-", "damaged-"))
    ]


def read_artifact(folder: Path) -> Artifact | None:
    """The artifact in ``folder``; None if the stage did not finish there.

    Raises:
        ArtifactError: The file exists, but cannot be read or is not an artifact of this version.
    """
    try:
        data = checksums.read_sealed(folder / FILE)
    except FileNotFoundError:
        return None
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {_repair(folder)}") from None
    try:
        artifact: Artifact = TypeAdapter(Artifact).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{folder / FILE}: not an artifact of this version of Align ({place}: {first['msg']}); "
            f"{_repair(folder)}"
        ) from None
    return artifact


def check_identity(folder: Path, artifact: Artifact, kind: str, digest: str) -> None:
    """Check that an artifact is the one of a planned stage.

    Raises:
        ArtifactError: It is of another kind of stage, or has another digest.
    """
    if (artifact.stage, artifact.digest) != (kind, digest):
        raise ArtifactError(
            f"{folder / FILE}: of a `{artifact.stage}` stage with digest {artifact.digest[:12]}, "
            f"expected `{kind}` with {digest[:12]}; {_repair(folder, artifact.stage)}"
        )


def check_folder(folder: Path) -> None:
    """Check the contents of a finished stage; a folder without an artifact has no checksums.

    Raises:
        ArtifactError: As :func:`check_contents`.
    """
    artifact = read_artifact(folder)
    if artifact is not None:
        check_contents(folder, artifact)


def check_kinds(folder: Path) -> None:
    """Check that an unfinished stage can write its files: no folder or link has one of their names.

    Raises:
        ArtifactError: One line for each path of the wrong kind.
    """
    lines = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.suffix in FILE_SUFFIXES:
            lines.append(f"{path}: a folder, expected a file; move it away")
        elif not (path.is_dir() or path.is_file()):
            lines.append(f"{path}: neither a file nor a folder; move it away")
    if lines:
        raise ArtifactError(*lines)


def check_sizes(folder: Path, artifact: Artifact) -> None:
    """Check that all files of a finished stage exist with their sizes; reads none of them.

    Raises:
        ArtifactError: One line for each file that is missing, of another size or added.
    """
    _raise_problems(folder, artifact, checksums.size_problems(folder, artifact.files))


def check_contents(folder: Path, artifact: Artifact) -> None:
    """Check that all files of a finished stage have the content that the stage wrote.

    Raises:
        ArtifactError: One line for each file that is missing, different or added.
    """
    _raise_problems(folder, artifact, checksums.content_problems(folder, artifact.files))


def _raise_problems(folder: Path, artifact: Artifact, problems: list[str]) -> None:
    lines = [f"{line}; {_repair(folder, artifact.stage)}" for line in problems]
    lines += [
        f"{path}: a file that the stage did not write; move it away"
        for path in added_files(folder, artifact.files)
    ]
    if lines:
        raise ArtifactError(*lines)


def added_files(folder: Path, written: Collection[str]) -> list[Path]:
    """Files that a later stage would load from a folder, although they are not among ``written``.

    ``written`` are paths relative to the folder.
    """
    return [
        path
        for path in stage_files(folder)
        if path.suffix in LOADED_SUFFIXES and path.relative_to(folder).as_posix() not in written
    ]


def _repair(folder: Path, kind: str = "") -> str:
    """The repair of a damaged folder; ``kind`` is that of its artifact, if it can be read."""
    if (kind or folder.name.rpartition("-")[0]) == CONVERTED:
        return f"delete {folder} or move it away, and its GGUF file is converted again"
    return f"restore it from a copy, move {folder} away, or run its stage with --force"


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically: to a temporary file, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    checksums.flush(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def digest(data: object) -> str:
    """SHA-256 of JSON data in canonical form, in hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_files(files: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files in the given order, in hex.

    Their folders do not count.
    """
    return digest([[file.name, digest_file(file)] for file in files])


def digest_folder(folder: Path) -> str:
    """The digest in the folder's artifact, or else a digest of the files directly in it.

    The latter covers the base model of an adapter as well, if the base model is a folder on this
    disk.
    """
    base = _base_folder(folder)
    digests = [_digest_one_folder(each) for each in (folder, base) if each is not None]
    return digests[0] if len(digests) == 1 else digest(digests)


def _digest_one_folder(folder: Path) -> str:
    artifact = read_artifact(folder)
    if artifact is not None:
        return artifact.digest
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."]
    return digest([[file.name, checksums.digest_once(file)] for file in files])


def _base_folder(folder: Path) -> Path | None:
    """The base model of an adapter from elsewhere, if it is a folder on this disk."""
    if (folder / FILE).is_file():
        return None  # its digest covers its inputs
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"])
        return base if base.is_dir() else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None  # not an adapter; what is wrong with a damaged one is reported elsewhere


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of Align and of the libraries that compute."""
    libraries = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "align": __version__, **libraries}


@functools.cache
def commit() -> str | None:
    """The git commit of this checkout, with ``+changes`` if tracked files differ from it.

    None outside a checkout.
    """
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent.resolve():
            return None  # installed inside another project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(package))
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def make_readable(folder: Path) -> None:
    """Give the weights in a folder the usual permissions.

    safetensors writes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)
