"""The memory of a plan against the tensors of its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_memory import Size, measure, tensor_peak

SMALL = Size(128, 384, 2, 4096, rows=4, tokens=128)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "tuning"), [("sft", "full"), ("kto", "lora"), ("grpo", "lora")])
def test_the_planned_memory_is_that_of_the_tensors_to_15_percent(
    stage: str, tuning: str, tmp_path: Path
):
    case = measure(stage, SMALL, tuning, tmp_path)
    assert case.planned == pytest.approx(case.measured, rel=0.15)


def test_the_measured_peak_counts_what_is_in_memory_at_one_time():
    import torch

    before = torch.ones(10_000)

    def allocate() -> None:
        nonlocal before
        first = torch.ones(1_000_000)
        del first, before
        second = torch.ones(600_000)
        third = torch.ones(500_000)
        del second, third

    assert tensor_peak(allocate) == pytest.approx(4 * 1_100_000, rel=0.01)
