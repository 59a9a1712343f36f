"""Sampling with vLLM in the training process: a stand-in has the weights it was given, or none."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models, vllm_engine
from helpers.ppo_fixtures import Folders
from helpers.vllm_engine import UPDATE, Logprob, Record
from torch.testing import assert_close

from align.cli import main as cli
from align.errors import UserError
from align.online_rl.completions import Completions
from align.online_rl.models import POLICY
from align.online_rl.trainer import OnlineRLTrainer
from align.online_rl.vllm import engine, weights
from align.pipeline import preflight

COLOCATE = {"sampler": "vllm", "vllm_mode": "colocate"}

SEEDS = [2**40 + k for k in range(4)]  # more bits than vLLM takes


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """The stand-in; no call may differ from what vLLM accepts, and its group ends with the test."""
    with monkeypatch.context() as patch:
        before = torch.distributed.is_initialized()
        record = vllm_engine.install(patch)
        yield record
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        if torch.distributed.is_initialized() and not before:
            torch.distributed.destroy_process_group()
    assert record.violations == []


@pytest.fixture
def trainer(folders: Folders, tmp_path: Path, vllm: Record) -> Callable[..., OnlineRLTrainer]:
    def build(**settings: Any) -> OnlineRLTrainer:
        defaults = {"max_new_tokens": 8, "epochs": 1}
        return ppo_fixtures.build_trainer(
            folders, tmp_path / "run", **COLOCATE | defaults | settings
        )

    return build


def sampler_of(
    models: Any, *, stops: set[int] | None = None, **settings: Any
) -> engine.EngineSampler:
    config = ppo_fixtures.ppo_config(**COLOCATE | {"max_new_tokens": 5} | settings)
    stops = {models.tokenizer.eos_token_id} if stops is None else stops
    return engine.start(config, models.policy, stops, torch.device("cpu"))


def assert_samples_of(completions: Completions, model: Any, temperature: float) -> None:
    """Check that the engine's log-probabilities are those of a plain model, to 1e-5."""
    assert completions.sampler_logps is not None
    expected = ppo_fixtures.plain_logps(model, completions, temperature)
    for logps, own in zip(completions.sampler_logps, expected, strict=True):
        assert_close(torch.tensor(logps, dtype=own.dtype), own, rtol=0, atol=1e-5)


def test_the_engine_samples_with_the_merged_weights_and_sleeps_before_and_after(
    folders: Folders, vllm: Record
):
    models = ppo_fixtures.build_models(folders.world.lora, [], lora=True)
    stops = set(range(40, 60))
    sampler = sampler_of(
        models, stops=stops, lora=tiny_models.LORA, temperature=0.7, max_new_tokens=8,
        sample_batch_size=3, vllm_gpu_memory_utilization=0.4,
    )  # fmt: skip
    assert vllm.calls == ["LLM", "sleep(2)"]
    (settings,) = vllm.settings
    assert (settings["dtype"], settings["share"]) == ("float32", 0.4)
    assert (settings["max_num_seqs"], settings["max_model_len"]) == (3, -1)
    assert settings["distributed_executor_backend"] == "uni"

    prompts = [[4, 5], [6], [6], [6]]
    before = ppo_fixtures.parameter_copies(models.policy, models)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        completions = sampler.generate(prompts, seeds=SEEDS)
    assert vllm.calls[2:] == UPDATE
    merged = ppo_fixtures.load_plain_policy(folders.world.lora)
    assert_samples_of(completions, merged, 0.7)
    other = ppo_fixtures.load_plain_policy(folders.world.sft)
    with pytest.raises(AssertionError):
        assert_samples_of(completions, other, 0.7)
    assert completions.prompts == prompts
    assert completions.finished == [row[-1] in stops for row in completions.completions]
    for one, same in zip(before, models.parameters(models.policy), strict=True):
        assert torch.equal(one, same)

    assert all(p.stop_token_ids == sorted(stops) and p.ignore_eos for p in vllm.parameters)
    assert {(p.temperature, p.max_tokens) for p in vllm.parameters} == {(0.7, 8)}
    # With one seed, equal prompts would get equal completions.
    assert len({p.seed for p in vllm.parameters}) == 4
    assert sampler.generate(prompts, seeds=SEEDS).rows == completions.rows
    short = sampler.generate(prompts, seeds=SEEDS, max_new_tokens=2)
    assert max(map(len, short.completions)) == 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_after_each_update_completions_are_of_the_new_policy(
    trainer: Callable[..., OnlineRLTrainer], vllm: Record, tmp_path: Path, lora: bool
):
    run = trainer(lora=lora, steps=3)
    initial = ppo_fixtures.flat_weights(run)
    run.check_sampler()
    sampled: list[Completions] = []
    generate = run.sampler.generate

    class Recording:
        def generate(self, *args: Any, **kwargs: Any) -> Completions:
            sampled.append(generate(*args, **kwargs))
            return sampled[-1]

    run.sampler = Recording()
    for step in range(3):
        folder = tmp_path / f"policy-{step}"
        own = {"selected_adapters": [POLICY]} if lora else {}
        run.models.savable.save_pretrained(str(folder), **own)
        policy = ppo_fixtures.load_plain_policy(folder)
        run.step(step)
        assert_samples_of(sampled[step], policy, run.config.temperature)
        assert run.metrics["sampler/ratio_min"] == pytest.approx(1, abs=1e-5)
        assert run.metrics["sampler/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert vllm.calls == ["LLM", "sleep(2)", *UPDATE * 4]
    assert (ppo_fixtures.flat_weights(run) - initial).abs().max() > 1e-3


def test_vllm_computes_in_the_type_of_the_products(
    trainer: Callable[..., OnlineRLTrainer], vllm: Record
):
    run = trainer(mixed_precision="bfloat16", steps=1)
    run.check_sampler()
    run.step(0)
    assert [settings["dtype"] for settings in vllm.settings] == ["bfloat16"]
    assert 1e-5 < abs(run.metrics["sampler/ratio_max"] - 1) < 0.2


def test_weights_that_are_not_those_of_the_policy_stop_the_run_before_the_first_step(
    trainer: Callable[..., OnlineRLTrainer], monkeypatch: pytest.MonkeyPatch
):
    run = trainer(lora=True)
    ppo_fixtures.perturb(run.models, scale=0.3)
    merged = weights.merged_weights

    def unmerged(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        plain = dict(model.named_parameters())
        for name, weight in merged(model):
            layer, _, last = name.rpartition(".")
            yield name, plain.get(f"{layer}.base_layer.{last}", weight).data

    monkeypatch.setattr(weights, "merged_weights", unmerged)
    with pytest.raises(UserError, match=r"explains at most 0\.1; .*another version of vLLM"):
        run.train()


STAGE = (
    'rewards: ["align.rewards.gold:rewards"], steps: 2, batch_size: 4, max_new_tokens: 6, '
    "sampler: vllm, vllm_mode: colocate"
)
RECIPE = f"""\
stages:
  prepare: {{source: embedded, max_rows: 40, validation_fraction: 0.2}}
  ppo: {{model: MODEL, {STAGE}, eval_steps: 2, n_eval_prompts: 2, stop: {{judge: gold}}}}
  reinforce: {{model: ppo, {STAGE}}}
"""


def test_two_stages_of_a_recipe_have_an_engine_one_after_the_other(
    folders: Folders, tmp_path: Path, launch: Any, vllm: Record
):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(folders.world.sft)))
    done = launch("recipe.yaml")
    assert done.code == 0, done.err
    assert [name for name in vllm.calls if name == "LLM"] == ["LLM"] * 2
    starts = [i for i, name in enumerate(vllm.calls) if name == "LLM"]
    for first, end in itertools.pairwise([*starts, len(vllm.calls)]):
        n = (end - first - 2) // len(UPDATE)
        assert n >= 3  # before the run, and in each of two steps
        assert vllm.calls[first:end] == ["LLM", "sleep(2)", *UPDATE * n]
    for file in tmp_path.glob("runs/*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        ratios = [line["sampler/ratio_mean"] for line in lines if "score" in line]
        assert ratios == [pytest.approx(1, abs=1e-4)] * 2


def fail(error: Exception) -> Callable[[Any], Any]:
    def raising(result: Any) -> Any:
        raise error

    return raising


def outputs(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A fault that changes the first completion, or its request."""

    def changing(answers: Any) -> Any:
        change(answers[0])
        return answers

    return changing


def first(**changes: Any) -> Callable[[Any], Any]:
    return outputs(lambda answer: vars(answer.outputs[0]).update(changes))


def entries(*pairs: tuple[int, float]) -> list[dict[int, Logprob]]:
    return [{token: Logprob(logp)} for token, logp in pairs]


SHARE = "change `vllm_gpu_memory_utilization`, or use `vllm_mode: server`"
FREE = "Free memory on device (9/80 GiB) is less than desired GPU memory utilization"


@pytest.mark.parametrize(
    ("method", "fault", "message"),
    [
        ("LLM", fail(ValueError(FREE)), rf"LLM: ValueError: Free memory on device .*; {SHARE}"),
        ("LLM", fail(RuntimeError("no\nkernel")), "LLM: RuntimeError: no kernel; use another"),
        ("sleep", fail(AssertionError()), "sleep: AssertionError; use another version of vLLM"),
        (
            "wake_up",
            fail(torch.OutOfMemoryError("CUDA out of memory. Tried\nto")),
            f"wake_up: OutOfMemoryError: CUDA out of memory. Tried to; {SHARE}",
        ),
        ("reload_weights", fail(KeyError("x")), "collective_rpc: KeyError: 'x'; use another"),
        ("reset_prefix_cache", lambda done: False, "reset_prefix_cache: it was not done; use"),
        ("generate", fail(RuntimeError("engine")), "generate: RuntimeError: engine; use another"),
        ("generate", lambda answers: answers[:1], "1 answers where 2 were requested"),
        ("generate", lambda answers: answers[::-1], "an answer to another prompt"),
        ("generate", outputs(lambda answer: answer.outputs.clear()), "0 completions where 1 was"),
        ("generate", first(logprobs=None), "a completion without `logprobs`"),
        ("generate", first(token_ids=[]), "0 tokens with 5 log-probabilities"),
        ("generate", first(token_ids=[], logprobs=[]), "a completion without tokens"),
        (
            "generate",
            first(token_ids=[7, 2], logprobs=entries((7, -1.0))),
            "2 tokens with 1 log-probabilities",
        ),
        (
            "generate",
            first(token_ids=[7, 2], logprobs=entries((7, -1.0), (3, -1.0))),
            "a log-probability that is none: None",
        ),
        (
            "generate",
            first(token_ids=[7, 2], logprobs=entries((7, math.nan), (2, -1.0))),
            "a log-probability that is none: nan",
        ),
        (
            "generate",
            first(token_ids=[2, 2], logprobs=entries((2, -1.0), (2, -1.0))),
            "tokens after the one that ends a completion",
        ),
        (
            "generate",
            first(token_ids=[7, 8], logprobs=entries((7, -1.0), (8, -1.0)), finish_reason="abort"),
            r"ends after 2 of 5 tokens without a token that ends it \(abort\)",
        ),
    ],
)
def test_an_error_or_a_wrong_answer_of_the_engine_is_one_line(
    folders: Folders, vllm: Record, method: str, fault: Any, message: str
):
    models = ppo_fixtures.build_models(folders.world.sft, [], lora=False)
    vllm.faults[method] = fault
    with pytest.raises(UserError, match=message) as error_info:
        sampler_of(models, stops={2}).generate([[4, 5], [6]], seeds=[0, 1])
    (line,) = error_info.value.lines
    assert line.startswith("vllm_mode: vLLM: ") and "\n" not in line


def test_a_run_ends_with_one_line_and_exit_code_2(
    folders: Folders, tmp_path: Path, launch: Any, vllm: Record
):
    vllm.faults["generate"] = fail(torch.OutOfMemoryError("CUDA out of memory"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(folders.world.sft)))
    done = launch("recipe.yaml", "--until", "ppo")
    assert done.code == 2
    assert "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert f"ppo.vllm_mode: vLLM: generate: OutOfMemoryError: CUDA out of memory; {SHARE}" in line


def test_a_prompt_that_the_engine_has_no_memory_for_is_one_line(folders: Folders, vllm: Record):
    models = ppo_fixtures.build_models(folders.world.sft, [], lora=False)
    with pytest.raises(UserError, match=r"generate: ValueError: The prompt .* exceeds the maximum"):
        sampler_of(models).generate([[4] * tiny_models.POSITIONS], seeds=[0])


def test_check_names_a_missing_package_and_a_missing_gpu(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(folders.world.sft)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(preflight, "has_cuda", lambda: False)
    monkeypatch.setattr(sys, "argv", ["align", "check", "recipe.yaml"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    gpu = "`colocate` needs an NVIDIA GPU, and torch finds none; use a server, or remove `sampler`"
    assert capfd.readouterr().err.splitlines() == [
        "recipe.yaml:3: ppo.vllm_mode: vllm is not installed: pip install vllm",
        f"recipe.yaml:3: ppo.vllm_mode: {gpu}",
        "recipe.yaml:4: reinforce.vllm_mode: vllm is not installed: pip install vllm",
        f"recipe.yaml:4: reinforce.vllm_mode: {gpu}",
    ]


def test_without_vllm_or_a_gpu_the_error_names_it(
    folders: Folders, vllm: Record, monkeypatch: pytest.MonkeyPatch
):
    models = ppo_fixtures.build_models(folders.world.sft, [], lora=False)
    monkeypatch.setattr(weights, "DEVICE", "cuda")
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and the policy is on cpu"):
        sampler_of(models)
    monkeypatch.delitem(sys.modules, "vllm")
    with pytest.raises(UserError, match="vllm_mode: vLLM is not installed"):
        sampler_of(models)
    assert vllm.calls == []
