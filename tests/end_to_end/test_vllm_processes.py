"""vLLM in the training process, on two processes: each has an engine and all weights for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import forks, recipe_runs, sharded_run, vllm_engine
from helpers.vllm_engine import UPDATE

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 80, test_fraction: 0.2, validation_fraction: 0.2}
  sft:
    model: {vocab_size: 300, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
    trainer: {learning_rate: 1.0e-2, max_steps: 2, per_device_train_batch_size: 4, bf16: false,
      gradient_checkpointing: false, save_strategy: "no"}
  grpo: {model: sft, rewards: ["helpers.ppo_fixtures:length"], steps: 3, batch_size: 8, n_completions: 4,
    max_new_tokens: 8, learning_rate: 1.0e-2, eval_steps: 3, n_eval_prompts: 4,
    sampler: vllm, vllm_mode: colocate}
"""
EVALUATIONS = 2  # before the first step and after the last one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2"])
def test_each_process_gives_its_engine_all_weights_after_each_update(name: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    runs, log = tmp_path / "runs", tmp_path / "log"
    environment = {"ACCELERATE_USE_CPU": "true"}
    if name != "multi_gpu":
        configuration = forks.ROOT / "accelerate_configs" / f"{name}.yaml"
        environment = sharded_run.launcher_environment(configuration)
    with forks.ranks(vllm_engine.call_script, runs, log=log, environment=environment) as ranks:
        codes = [forks.wait(rank) for rank in ranks]
    assert codes == [0, 0], recipe_runs.log(runs)
    for rank in range(2):
        calls, backends, violations = json.loads((tmp_path / f"calls-{rank}.json").read_text())
        assert (backends, violations) == (["external_launcher"], [])
        assert calls == ["LLM", "sleep(2)", *UPDATE * (1 + 3 + EVALUATIONS)]
    (folder,) = runs.glob("grpo-*")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "score" in line]
    assert len(steps) == 3
    for step in steps:
        assert step["sampler/ratio_min"] == pytest.approx(1, abs=1e-4)
        assert step["sampler/ratio_max"] == pytest.approx(1, abs=1e-4)
    # The policy moves, so weights of an earlier step would show.
    assert steps[-1]["kl"] > 1e-3
