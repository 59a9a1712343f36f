"""Tests of a process's state between stages, and of the checks of the process group."""

from __future__ import annotations

import gc
import random
import sys
import weakref

import numpy as np
import pytest
import torch

from align.errors import UserError
from align.runtime import distributed


class Holder:
    """Holds memory in a cycle, as trainers and their callbacks do."""

    def __init__(self, megabytes: int) -> None:
        self.weights = torch.ones(megabytes * 2**18)
        self.cycle = self


def test_the_memory_of_the_last_stage_is_freed():
    gc.disable()
    try:
        reference = weakref.ref(Holder(1))
        assert reference() is not None
        distributed.reset_process_state(0)
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak in /proc")
def test_peak_memory_is_that_of_the_stage_alone():
    large = Holder(400)
    before = distributed.peak_memory_bytes()
    del large
    distributed.reset_process_state(0)
    after = distributed.peak_memory_bytes()
    assert before is not None
    assert after is not None
    assert after < before - 300 * 2**20


def test_every_stage_starts_from_its_seed_whatever_ran_before():
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    distributed.reset_process_state(7)
    first = draws()
    torch.rand(100)
    distributed.reset_process_state(7)
    assert draws() == first
    distributed.reset_process_state(8)
    assert draws() != first


def test_the_state_of_accelerate_does_not_leak_into_the_next_stage():
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, GradientState

    Accelerator(gradient_accumulation_steps=4, cpu=True)
    assert GradientState().num_steps == 4
    distributed.reset_process_state(0)
    assert AcceleratorState._shared_state == {}
    assert GradientState._shared_state == {}
    assert PartialState._shared_state != {}  # the process group stays


def test_the_overrides_of_an_8_bit_optimizer_do_not_leak_into_the_next_stage():
    optim = pytest.importorskip("bitsandbytes").optim
    embedding = torch.nn.Embedding(64, 64)
    # transformers' Trainer does this for every embedding where the optimizer has 8 bits.
    manager = optim.GlobalOptimManager.get_instance()
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})

    def state_of_embedding() -> torch.dtype:
        optimizer = optim.AdamW8bit(embedding.parameters(), lr=1e-3)
        embedding.weight.grad = torch.ones_like(embedding.weight)
        optimizer.step()
        dtype: torch.dtype = optimizer.state[embedding.weight]["state1"].dtype
        return dtype

    assert state_of_embedding() == torch.float32
    held = weakref.ref(embedding)
    distributed.reset_process_state(0)
    assert state_of_embedding() == torch.uint8
    del embedding, state_of_embedding, manager
    gc.collect()
    assert held() is None  # nor does its model stay in memory


def test_unconnected_processes_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(
        UserError, match="started 2 processes, but accelerate does not connect them"
    ):
        distributed.init_process_group()
