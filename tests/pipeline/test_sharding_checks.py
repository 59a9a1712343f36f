"""What is not supported with weights shared among processes is an error before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.recipe import ErrorCollector, load_recipe
from align.pipeline import preflight
from align.pipeline.plan import plan_stages

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 50}
  sft: {model: {hidden_size: 64}, compile_layers: inductor}
  reward: {model: sft}
  dpo: {model: sft, quantization: nf4, lora: {}}
  grpo: {model: sft, rewards: [reward], steps: 1, batch_size: 2, n_completions: 2}
  evaluate: {policies: [dpo], baseline: sft, judge: gold, quantization: nf4}
"""


def problems(folder: Path) -> list[str]:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE)
    errors = ErrorCollector(load_recipe(file))
    stages = plan_stages(errors, folder / "runs")
    preflight.check_sharding(errors, stages)
    return errors.lines


def test_stages_that_cannot_be_sharded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert problems(tmp_path) == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    compiled, quantized, online = problems(tmp_path)
    assert "recipe.yaml:3: sft.compile_layers: this launch uses ZeRO-2, with" in compiled
    assert "recipe.yaml:5: dpo.quantization: this launch uses ZeRO-2, with" in quantized
    assert "recipe.yaml:6: grpo: online RL does not shard weights" in online
    assert all("accelerate_configs/multi_gpu.yaml" in line for line in problems(tmp_path))
