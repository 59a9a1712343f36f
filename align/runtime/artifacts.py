"""What a stage leaves behind: a folder, and in it ``artifact.json``, written last. Without it the stage did not finish.

Also what makes a stage's digest: its config, the digests of its inputs, and its code version.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError

FILE = "artifact.json"
WORKING = ".working"  # stands while a stage is not complete; locked while it runs
_PACKAGES = (
    "align",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
)


@dataclass(frozen=True, slots=True)
class Artifact:
    """One finished stage. ``inputs`` holds, by role, the folder (or Hub id) and digest of what was read.

    ``seconds`` are those of the process that finished the stage; ``peak_memory_bytes`` is the GPU's where there is one
    and the process's resident memory otherwise.
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


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Declare a folder finished."""
    write_json(folder / FILE, asdict(artifact))


def read_artifact(folder: Path) -> Artifact | None:
    """The artifact in ``folder``; None where the stage did not finish there.

    Raises:
        UserError: The file is there and is none of ours.
    """
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / FILE}: cannot be read: {error}") from None
    try:
        return Artifact(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder / FILE}: not an artifact of this version of Align ({error}); "
            f"move {folder} away, or run its stage with --force"
        ) from None


def write_json(path: Path, data: object) -> None:
    """Write JSON whole or not at all: a temporary name in the same folder, flushed to the disk, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# Digests -------------------------------------------------------------------------------------------------------------


def digest(data: object) -> str:
    """SHA-256 of JSON data in one canonical form, in hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_files(files: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files, in their order; where they lie does not matter."""
    return digest([[file.name, digest_file(file)] for file in files])


def digest_folder(folder: Path) -> str:
    """The digest of a folder: its artifact's where it has one, and else that of the files directly in it.

    An adapter's is that of its base as well, where that lies on this disk.
    """
    artifact = read_artifact(folder)
    if artifact is not None:
        return artifact.digest
    own = digest_files(p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != ".")
    config = folder / "adapter_config.json"
    if config.is_file():
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base and Path(base).is_dir():
            return digest([own, digest_folder(Path(base))])
    return own


# Where a number comes from -------------------------------------------------------------------------------------------


@functools.cache
def versions() -> dict[str, str]:
    """The versions that made a result: Python's and those of the libraries that compute."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            from align import __version__

            found[package] = __version__  # a plain checkout, not installed
    return found


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that runs, with ``+changes`` where it has uncommitted ones; None outside of git."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent.resolve():
            return None  # installed below somebody else's checkout
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def make_readable(folder: Path) -> None:
    """Give weights the usual permissions: safetensors writes through a private temporary file."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)
