"""Asynchronous sampling with a vLLM server: how old completions are, and how they are weighted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, vllm_modules, vllm_server
from helpers.ppo_fixtures import Folders, Recorder
from helpers.vllm_server import VLLMServer
from torch import Tensor
from torch.testing import assert_close

from align.models import loading
from align.online_rl.draws import training_draw
from align.online_rl.prompts import prompt_indices
from align.online_rl.trainer import OnlineRLTrainer
from align.online_rl.vllm import weights
from align.online_rl.vllm.ahead import RequestsAhead
from align.rl.rollout import Rollout


@pytest.fixture
def server(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMServer]:
    groups = vllm_modules.install(monkeypatch)
    monkeypatch.setattr(weights, "DEVICE", "cpu")
    with vllm_server.serving(folders.world.sft, groups) as running:
        yield running
    assert running.violations == []


def build(folders: Folders, folder: Path, server: VLLMServer, **settings: Any) -> OnlineRLTrainer:
    defaults = {"max_new_tokens": 8, "epochs": 1, "steps": 5}
    return ppo_fixtures.build_trainer(
        folders, folder, sampler="vllm", vllm_url=server.url, **defaults | settings
    )


def test_staleness_0_is_synchronous_sampling_bit_for_bit(
    folders: Folders, tmp_path: Path, server: VLLMServer
):
    def run(name: str, ahead: bool) -> tuple[Tensor, list[Any], list[Any]]:
        trainer = build(folders, tmp_path / name, server)
        assert trainer.ahead is None
        if ahead:
            trainer.ahead = RequestsAhead(
                trainer.sampler,
                trainer.prompts_of,
                lambda step: training_draw(trainer.config, step).seeds,
                steps=5,
                max_staleness=0,
            )
        first_call, first_start = len(server.calls), len(server.started)
        scores = []
        for step in range(3):
            trainer.step(step)
            scores.append(trainer.metrics["score"])
        calls = server.calls[first_call:]
        prompts = [prompt for prompt, _ in server.started[first_start:]]
        return ppo_fixtures.flat_weights(trainer), scores, [calls, sorted(prompts)]

    synchronous, scores, calls = run("synchronous", False)
    ahead, same_scores, same_calls = run("ahead", True)
    assert torch.equal(ahead, synchronous)
    assert (same_scores, same_calls) == (scores, calls)


def test_completions_are_at_most_as_old_as_permitted(
    folders: Folders, tmp_path: Path, server: VLLMServer
):
    trainer = build(folders, tmp_path / "run", server, max_staleness=2)
    assert trainer.ahead is not None
    ages = []
    for step in range(5):
        trainer.step(step)
        ages.append(trainer.metrics["sampler/staleness"])
    # The first weights serve steps 0, 1 and 2; the weights after step n serve step n + 2.
    assert ages == [0, 1, 2, 2, 2]
    step_of = {
        tuple(trainer.prompts.tokens[i]): step
        for step in range(5)
        for i in prompt_indices(step, len(trainer.prompts), trainer.config)
    }
    assert len(step_of) == 5 * trainer.config.batch_size
    assert sorted(prompt for prompt, _ in server.started) == sorted(step_of)  # and no others
    # The server has version n + 1 from step n on.
    assert all(step_of[prompt] - (version - 1) <= 2 for prompt, version in server.started)
    assert any(step_of[prompt] > version - 1 for prompt, version in server.started)
    assert server.version == 5


def test_old_completions_are_weighted_by_the_truncated_ratio_of_both_policies(
    folders: Folders, tmp_path: Path, server: VLLMServer, recorder: Recorder
):
    cap = 1.2
    trainer = build(folders, tmp_path / "run", server, max_staleness=1, importance_cap=cap)
    assert trainer.ahead is not None
    policies: list[dict[str, Tensor]] = []
    for step in range(3):
        state = trainer.models.policy.model.state_dict()
        policies.append({name: weight.clone() for name, weight in state.items()})
        trainer.step(step)
        trainer.ahead.wait()  # so that no completion is of two policies

    def logps(state: dict[str, Tensor], rollout: Rollout) -> Tensor:
        model = loading.load_merged(folders.world.sft, dtype="float32")
        model.load_state_dict(state)
        ids = rollout.inputs["ids"]
        with torch.no_grad():
            logits = model(ids, attention_mask=rollout.inputs["mask"]).logits[:, :-1]
        values = (logits / trainer.config.temperature).log_softmax(-1)
        return values.gather(-1, ids[:, 1:, None])[..., 0]

    truncated = False
    for step, sampled_by in enumerate([0, 0, 1]):
        rollout = recorder.rollouts[step]
        assert rollout.weights is not None
        now, then = (logps(policies[i], rollout) for i in (step, sampled_by))
        expected = (now - then).exp().clamp(max=cap)[rollout.mask]
        assert_close(rollout.weights[rollout.mask], expected, rtol=1e-3, atol=1e-4)
        assert (step == 0) == bool(((expected - 1).abs() < 1e-5).all())
        truncated |= bool((expected == cap).any())
    assert truncated
