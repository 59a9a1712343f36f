"""vLLM on two processes: an engine in each, or a server that one of them sends weights to."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    forks,
    recipe_runs,
    sharded_run,
    tiny_models,
    vllm_engine,
    vllm_modules,
    vllm_server,
)
from helpers.vllm_engine import UPDATE
from helpers.vllm_server import VLLMServer

from align.runtime.seeds import derive_seed, derive_seeds

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


SERVED = """\
stages:
  prepare: {{source: embedded, max_rows: 40}}
  ppo: {{model: {model}, rewards: ["align.rewards.gold:rewards"], steps: 2, batch_size: 4, max_new_tokens: 6,
    eval_steps: 2, eval_split: test, n_eval_prompts: 2, sampler: vllm, vllm_url: "{url}", vllm_timeout: {timeout}}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.world(tmp_path_factory.getbasetemp()).sft


@contextlib.contextmanager
def server_for(model: Path, folder: Path, *, timeout: float) -> Iterator[VLLMServer]:
    """A server, and a recipe in ``folder`` that samples with it."""
    with vllm_server.serving(model, vllm_modules.ServerGroups()) as server:
        recipe = SERVED.format(model=model, url=server.url, timeout=timeout)
        (folder / "recipe.yaml").write_text(recipe)
        yield server
    assert server.violations == []


@pytest.mark.slow
def test_one_process_sends_weights_to_a_server_and_each_requests_its_completions(
    model: Path, tmp_path: Path
):
    runs, log = tmp_path / "runs", tmp_path / "log"
    with (
        server_for(model, tmp_path, timeout=120) as server,
        forks.ranks(vllm_modules.call_script, runs, log=log) as ranks,
    ):
        assert [forks.wait(rank) for rank in ranks] == [0, 0], recipe_runs.log(runs)
    samplings = ["agreement", "evaluation", "step", "step", "evaluation"]
    updates = [call for call in server.calls if call in vllm_server.UPDATE]
    assert updates == vllm_server.UPDATE * len(samplings)
    assert [path for path, _ in server.calls].count("/init_weight_transfer_engine") == 1
    # Each sampling has the weights that were sent before it, and the completions of both ranks.
    versions = Counter(version for _, version in server.started)
    sizes = {"agreement": 2 * 4, "evaluation": 2, "step": 4}
    assert [versions[k + 1] for k in range(len(samplings))] == [sizes[name] for name in samplings]
    prompts = [prompt for prompt, version in server.started if version in (3, 4)]
    assert len(set(prompts)) == 8
    # The seeds are those of one process.
    seeds = {body["seed"] for path, body in server.bodies if path == "/v1/completions"}
    for step in range(2):
        of_step = derive_seeds(derive_seed(0, "sample", step, 0), range(4))
        assert {seed % 2**31 for seed in of_step} <= seeds


def wrong_answer(handler: Any) -> None:
    vllm_server.send(handler, 200, b"[]")


def stall(handler: Any) -> None:
    time.sleep(30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [(wrong_answer, "an answer without `choices`"), (stall, "no complete answer in 10 seconds")],
)
def test_a_wrong_answer_or_a_stall_on_one_process_is_one_line_of_the_first(
    model: Path, tmp_path: Path, fault: Any, message: str
):
    runs, log = tmp_path / "runs", tmp_path / "log"
    second = derive_seeds(derive_seed(0, "sample", 0, 0), range(4))[1] % 2**31  # rank 1 requests it
    with (
        server_for(model, tmp_path, timeout=10) as server,
        forks.ranks(vllm_modules.call_script, runs, log=log) as ranks,
    ):

        def answer(handler: Any) -> None:
            if handler.body["seed"] == second:
                fault(handler)
            else:
                vllm_server.send(
                    handler, 200, json.dumps(server.completions(handler.body)).encode()
                )

        server.faults["/v1/completions"] = answer
        assert forks.wait(ranks[0]) == 2, recipe_runs.log(runs)
    lines = recipe_runs.log(runs).splitlines()
    assert "Traceback" not in recipe_runs.log(runs)
    assert f"ppo: process 1: vllm_url: {server.url}/v1/completions: {message}" in lines[-1]
