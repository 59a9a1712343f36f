"""Errors that mean a lack of memory, of a GPU or of the machine, described in one phrase."""

from __future__ import annotations

import errno
import os
import re
import sys
from dataclasses import dataclass

from align.runtime.terminal import with_unit

_TEXT = re.compile(
    r"out of memory|can't allocate memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_HOST = re.compile(r"DefaultCPUAllocator|can't allocate memory")
_REQUEST = re.compile(r"to allocate ([\d.]+) ?([A-Za-z]+)")


@dataclass(frozen=True, slots=True)
class Shortage:
    """A failed allocation: which memory, its size, and what was asked for."""

    device: str
    """The name of a GPU, such as ``cuda:0``, or ``the machine``."""
    capacity: int | None
    """All memory of the device, in bytes; None if unknown."""
    request: str
    """The size of the failed allocation with its unit; empty if unknown."""

    def __str__(self) -> str:
        size = "" if self.capacity is None else f", which has {with_unit(self.capacity)}B"
        request = f" ({self.request} more were asked for)" if self.request else ""
        return f"out of memory on {self.device}{size}{request}"


def shortage(error: BaseException) -> Shortage | None:
    """The shortage that an error, or its cause, is about; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        is_of_python = isinstance(cause, MemoryError) or getattr(cause, "errno", 0) == errno.ENOMEM
        if is_of_python or _is_of_torch(cause, text):
            on_host = is_of_python or _HOST.search(text) is not None
            return Shortage(*(_machine() if on_host else _gpu()), _request(text))
        cause = cause.__cause__
    return None


def _is_of_torch(error: BaseException, text: str) -> bool:
    torch = sys.modules.get("torch")  # without it, the error is not torch's
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or _TEXT.search(text) is not None


def _gpu() -> tuple[str, int | None]:
    import torch

    if not torch.cuda.is_available():
        return "the device", None
    index = torch.cuda.current_device()
    return f"cuda:{index}", int(torch.cuda.get_device_properties(index).total_memory)


def _machine() -> tuple[str, int | None]:
    try:
        return "the machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system without these names
        return "the machine", None


def _request(text: str) -> str:
    match = _REQUEST.search(text)
    if match is None:
        return ""
    number, unit = match.groups()
    return f"{with_unit(float(number))}B" if unit == "bytes" else f"{number} {unit}"
