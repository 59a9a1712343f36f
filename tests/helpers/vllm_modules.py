"""Modules in place of the package ``vllm``, with the names and signatures of vLLM 0.31 and 0.33.

Weights pass through a queue in place of NCCL, or through a socket to a server of another process.
As with NCCL, both sides wait for each other: when a group is made, and for each tensor.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

HOST = "127.0.0.1"
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


@dataclass
class RemoteGroup:
    """One side of a group of two processes."""

    connection: Connection

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor, and wait until the worker has it."""
        self.connection.send(tensor.detach().numpy())
        self.connection.recv()

    def receive(self) -> Tensor:
        """The next tensor."""
        tensor = torch.from_numpy(self.connection.recv())
        self.connection.send(None)
        return tensor


class ServerGroups:
    """Groups of a server whose trainer is another process."""

    def join(self, port: int) -> RemoteGroup:
        """The group at a port, once the trainer has joined it."""
        with Listener((HOST, port)) as listener:
            return RemoteGroup(listener.accept())


class TrainerGroups:
    """Groups of a trainer whose server is another process."""

    def join(self, port: int) -> RemoteGroup:
        """The group at a port, once the server has joined it."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return RemoteGroup(Client((HOST, port)))
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "no server joins the group"
                time.sleep(0.05)


AnyGroups = Groups | ServerGroups | TrainerGroups


def call_script(runs: Path) -> None:
    """Run `align/run.py` as a rank whose server is in another process."""
    from align.online_rl.vllm import weights
    from helpers import recipe_runs

    install(pytest.MonkeyPatch(), TrainerGroups())
    weights.DEVICE = "cpu"
    recipe_runs.call_script(runs)


def open_port() -> int:
    """A port that nothing uses."""
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        return int(unused.getsockname()[1])


def install(monkeypatch: pytest.MonkeyPatch, groups: AnyGroups | None = None) -> AnyGroups:
    """Put the modules for weight transfer into ``sys.modules`` until the test ends."""
    groups = groups or Groups()

    def trainer_init(init_info: dict[str, Any], rank: int = 0) -> Group | RemoteGroup:
        assert rank == 0
        assert init_info["master_address"] == HOST
        assert init_info["world_size"] == 2  # the trainer and one worker
        return groups.join(init_info["master_port"])

    def packed_nccl_broadcast_producer(
        iterator: Iterator[tuple[str, Tensor]],
        group: Group | RemoteGroup,
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
            "get_ip": lambda: HOST,
            "get_open_port": open_port,
        },
    }
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return groups
