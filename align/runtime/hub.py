"""runtime.hub"""

from __future__ import annotations

import os
import socket
import urllib.request


def model_is_reachable(model: str) -> bool:
    """Whether a model of the Hub is in the cache, or the Hub is there to be asked for it."""
    from huggingface_hub import try_to_load_from_cache

    configs = ("config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(model, name), str) for name in configs):
        return True
    return not is_offline() and hub_is_reachable()


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_is_reachable() -> bool:
    # without this, no network means five retries and 23 seconds of warnings
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True
