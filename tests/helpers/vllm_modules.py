"""Modules in place of the package ``vllm``, with the names and signatures of vLLM 0.31 and 0.33.

Weights pass through a queue in place of NCCL. As with NCCL, both sides wait for each other: when a
group is made, and for each tensor.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

SECONDS = 20.0
"""How long one side waits for the other."""


@dataclass
class Group:
    """A trainer, and one worker of a server."""

    ready: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=SECONDS))
    sent: queue.Queue[Tensor] = field(default_factory=lambda: queue.Queue(1))
    received: queue.Queue[None] = field(default_factory=lambda: queue.Queue(1))

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor, and wait until the worker has it."""
        self.sent.put(tensor.clone(), timeout=SECONDS)
        self.received.get(timeout=SECONDS)

    def receive(self) -> Tensor:
        """The next tensor."""
        tensor = self.sent.get(timeout=SECONDS)
        self.received.put(None)
        return tensor


@dataclass
class Groups:
    """The groups by port, and the lock under which they are made."""

    by_port: dict[int, Group] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self, port: int) -> Group:
        """The group at a port, once both sides have joined it."""
        with self.lock:
            group = self.by_port.setdefault(port, Group())
        group.ready.wait()
        return group


def install(monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Put the modules for weight transfer into ``sys.modules`` until the test ends."""
    groups = Groups()
    ports = iter(range(29500, 30000))

    def trainer_init(init_info: dict[str, Any], rank: int = 0) -> Group:
        assert rank == 0
        assert init_info["master_address"] == "127.0.0.1"
        assert init_info["world_size"] == 2  # the trainer and one worker
        return groups.join(init_info["master_port"])

    def packed_nccl_broadcast_producer(
        iterator: Iterator[tuple[str, Tensor]],
        group: Group,
        src: int,
        post_iter_func: Callable[[tuple[str, Tensor]], Tensor],
        buffer_size_bytes: int = 2**30,
        num_buffers: int = 2,
    ) -> None:
        assert src == 0
        for item in iterator:
            group.broadcast(post_iter_func(item))

    names = {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": trainer_init},
        "vllm.distributed.weight_transfer.packed_tensor": {
            "packed_nccl_broadcast_producer": packed_nccl_broadcast_producer
        },
        "vllm.utils": {},
        "vllm.utils.network_utils": {
            "get_ip": lambda: "127.0.0.1",
            "get_open_port": lambda: next(ports),
        },
    }
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return groups
