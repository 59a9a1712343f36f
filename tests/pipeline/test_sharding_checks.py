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
  grpo: {model: sft, rewards: [reward], steps: 1, batch_size: 2, n_completions: 2, compile_decoding: inductor}
  rloo: {model: sft, rewards: [reward], steps: 1, batch_size: 2, n_completions: 2, tokens_per_batch: 99}
  ppo: {model: sft, rewards: [reward], steps: 1, batch_size: 2, optimizer: paged_adamw_8bit}
  reinforce: {model: sft, rewards: [reward], steps: 1, batch_size: 2}
  evaluate: {policies: [dpo], baseline: sft, judge: gold, quantization: nf4}
"""


def problems(folder: Path, recipe: str = RECIPE) -> list[str]:
    file = folder / "recipe.yaml"
    file.write_text(recipe)
    errors = ErrorCollector(load_recipe(file))
    stages = plan_stages(errors, folder / "runs")
    preflight.check_sharding(errors, stages)
    return errors.lines


def test_stages_that_cannot_be_sharded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert problems(tmp_path) == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    compiled, quantized, *online = problems(tmp_path)
    assert "recipe.yaml:3: sft.compile_layers: this launch uses ZeRO-2, with" in compiled
    assert "recipe.yaml:5: dpo.quantization: this launch uses ZeRO-2, with" in quantized
    keys = ["6: grpo.compile_decoding", "7: rloo.tokens_per_batch", "8: ppo.optimizer"]
    for line, key in zip(online, keys, strict=True):
        assert f"recipe.yaml:{key}: this launch uses ZeRO-2, with" in line
    assert all("accelerate_configs/multi_gpu.yaml" in line for line in problems(tmp_path))


def test_adapters_that_zero_3_would_round_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = RECIPE.partition("  reward")[0].replace(", compile_layers: inductor", "")
    recipe += "  dpo: {model: sft, lora: {}, dtype: bfloat16}\n"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert problems(tmp_path, recipe) == []
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    (line,) = problems(tmp_path, recipe)
    assert "recipe.yaml:4: dpo.dtype: ZeRO-3 would train and store the adapters" in line
