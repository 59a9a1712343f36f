"""What `align export` does with a written folder: a GGUF file, and a repository on the Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from align.cli.export import check_target
from align.errors import Problems, UserError
from align.runtime import hub

SCRIPTS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""Names of llama.cpp's converter, in its sources and in its Python package."""
FOLDER = "LLAMA_CPP"
"""Variable with the folder of llama.cpp's sources."""


def find_converter() -> list[str]:
    """The command of llama.cpp's converter.

    Raises:
        UserError: It is neither on the path nor in the folder that ``LLAMA_CPP`` names.
    """
    folder = os.environ.get(FOLDER)
    if folder and (script := Path(folder).expanduser() / SCRIPTS[0]).is_file():
        return [sys.executable, str(script)]
    for name in SCRIPTS:
        if found := shutil.which(name):
            return [sys.executable, found] if name.endswith(".py") else [found]
    raise UserError(
        f"--gguf: no {SCRIPTS[0]} on the path; install llama.cpp, or name the folder of its "
        f"sources in the variable {FOLDER}"
    )


def check_gguf_target(file: Path) -> None:
    """Check that a GGUF file can be written here.

    Raises:
        UserError: It exists, has another ending, or its folder does not exist.
    """
    if file.suffix != ".gguf" or not file.absolute().parent.is_dir():
        raise UserError(
            f"--gguf {file}: expected a file name ending in .gguf, in an existing folder"
        )
    if file.exists():
        raise UserError(f"--gguf {file}: exists already; name a new file")


def write_gguf(converter: list[str], folder: Path, file: Path) -> None:
    """Convert a model folder; the type of the weights is that of the folder.

    Raises:
        UserError: The converter fails; the line has the last one that it printed.
    """
    partial = file.with_name(f".{file.name}.partial")
    command = [*converter, str(folder), "--outfile", str(partial), "--outtype", "auto"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not partial.is_file():
        partial.unlink(missing_ok=True)
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
        reason = lines[-1] if lines else f"exit code {result.returncode}"
        raise UserError(
            f"--gguf {file}: llama.cpp's converter failed: {reason}; {folder} is complete"
        )
    partial.replace(file)


def check_places(target: Path, gguf: Path | None, repository: str | None) -> list[str]:
    """Check the places that a model will be written to; return the command of the converter.

    The command is empty without ``gguf``.

    Raises:
        UserError: One line for each place that cannot be written, and for a missing converter.
    """
    problems, converter = Problems(), list[str]()
    with problems.collected():
        check_target(target)
    if gguf is not None:
        with problems.collected():
            check_gguf_target(gguf)
        with problems.collected():
            converter = find_converter()
    if repository is not None:
        with problems.collected():
            check_repository(repository)
    problems.raise_any()
    return converter


def check_repository(repository: str) -> None:
    """Check that a repository can be written before anything is merged.

    Raises:
        UserError: The id is malformed, no token is stored, or the Hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    place = f"--push-to-hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(f"{place}: expected OWNER/NAME") from None
    if hub.is_offline() or not hub.hub_is_reachable():
        raise UserError(f"{place}: the Hub cannot be reached; `hf upload` uploads the folder later")
    if get_token() is None:
        raise UserError(f"{place}: no token is stored; log in with `hf auth login`")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder; returns the address of the commit.

    Raises:
        UserError: The Hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model of Align"
        )
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push-to-hub {repository}: {reason}; {folder} is complete, `hf upload` uploads it"
        ) from None
    return str(commit.commit_url)
