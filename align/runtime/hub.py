"""Whether the Hugging Face Hub can be reached, and whether a model is in its local cache."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from align.errors import ArtifactError

SECONDS = 5
CONFIGS = ("config.json", "adapter_config.json")
NOT_REACHABLE = (
    "no such folder, not in the cache, and the Hub cannot be reached; "
    "name a folder, or download the model first"
)


def model_is_reachable(model: str, *, revision: str | None = None) -> bool:
    """Whether a Hub model is in the local cache, or else whether the Hub can be reached."""
    cached = cached_folder(model, revision=revision) is not None
    return cached or (not is_offline() and hub_is_reachable())


def cached_folder(
    model: str, *, revision: str | None = None, containing: Sequence[str] = CONFIGS
) -> Path | None:
    """The folder of a Hub model in the local cache; None unless it contains one of these files."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in containing:
        try:
            file = try_to_load_from_cache(model, name, revision=revision)
        except HFValidationError:
            return None  # a missing path
        if isinstance(file, str):
            return Path(file).parent
    return None


def check_model(model: str) -> None:
    """Check that a Hub model is cached or reachable; loading would retry for a minute.

    Raises:
        ArtifactError: It is neither.
    """
    if not model_is_reachable(model):
        raise ArtifactError(f"{model}: {NOT_REACHABLE}")


def is_offline() -> bool:
    """Whether the user has set ``HF_HUB_OFFLINE``."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_is_reachable() -> bool:
    """Whether the Hub's endpoint accepts a connection; assumed behind a proxy.

    Without this check, a machine without network spends 23 seconds in five retries of the Hub's
    client.
    """
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
