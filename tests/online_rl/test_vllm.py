"""Sampling by a vLLM server, with a fake client: tests have no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from torch.testing import assert_close

from align.errors import UserError
from align.functional.policy_gradient import importance_weights
from align.models import loading
from align.online_rl import vllm
from align.online_rl.completions import Completions
from align.online_rl.experience import align_sampler_logps
from align.online_rl.sampler_agreement import compare
from align.runtime import distributed


class Client:
    """A client that stores its arguments and returns fixed completions."""

    def __init__(self, completions: list[list[int]], logps: list[list[float]]) -> None:
        self.completions, self.logps = completions, logps
        self.weights: dict[str, torch.Tensor] = {}
        self.requests: dict[int, Any] = {}
        self.prompts = [[4, 5], [6]]

    def update_named_params(self, shapes: Any, named: Any) -> None:
        self.weights = dict(named)
        assert [(k, list(v.shape)) for k, v in self.weights.items()] == [
            (n, s) for n, _, s in shapes
        ]

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: Any, **arguments: Any) -> dict[str, Any]:
        assert len(prompts) == 1
        place = self.prompts.index(prompts[0])
        self.requests[place] = arguments
        return {
            "completion_ids": [self.completions[place]],
            "logprobs": [[[value] for value in self.logps[place]]],
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def test_the_server_receives_merged_weights_and_returns_tokens_with_their_log_probabilities(world):
    models = ppo_fixtures.build_models(world.lora, [], lora=True)
    client = Client([[7, 8, 2], [9, 9, 9]], [[-0.5, -1.0, -0.25], [-2.0, -2.0, -2.0]])
    config = ppo_fixtures.ppo_config(
        temperature=0.7, max_new_tokens=3, sampler="vllm", lora=tiny_models.LORA
    )
    sampler = vllm.VLLMSampler(client, models.policy, {2}, config)
    completions = sampler.generate([[4, 5], [6]], seed=2**40 + 5)
    merged = loading.load_merged(world.lora, dtype="float32").state_dict()
    sent = client.weights
    assert sent.keys() == {k for k in merged if k != "lm_head.weight"}  # tied to the embedding
    assert any(
        not torch.equal(sent[k], loading.load_merged(world.sft, dtype="float32").state_dict()[k])
        for k in sent
    )
    for name, weight in sent.items():
        assert_close(weight, merged[name])
    assert completions.rows == [[4, 5, 7, 8, 2], [6, 9, 9, 9]]
    assert completions.finished == [True, False]
    assert completions.sampler_logps == [[-0.5, -1.0, -0.25], [-2.0, -2.0, -2.0]]
    arguments = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 3, "logprobs": 0}
    for request in client.requests.values():
        assert arguments.items() <= request.items()
        assert request["generation_kwargs"]["stop_token_ids"] == [2]
    # With one seed, equal prompts would get equal completions.
    assert len({request["generation_kwargs"]["seed"] for request in client.requests.values()}) == 2


def test_the_servers_log_probabilities_become_capped_importance_weights(world):
    completions = Completions([[4, 5], [6]], [[7, 8], [9]], [False, False], [[-1.0, -3.0], [-2.0]])
    logps = torch.tensor([[0.0, -1.5, -0.5], [-2.0, 0.0, 0.0]])
    theirs = align_sampler_logps(completions, logps)
    assert theirs is not None
    assert theirs.tolist() == [[0.0, -1.0, -3.0], [-2.0, 0.0, 0.0]]
    # e^(-1.5 + 1) = 0.6065; e^(-0.5 + 3) = 12.2, capped at 2; equal ones weigh exactly 1
    weights = importance_weights(logps, theirs, cap=2.0)
    assert_close(weights, torch.tensor([[1.0, 0.6065307, 2.0], [1.0, 1.0, 1.0]]))


class ModelClient:
    """A server's client with a model: it receives weights, and samples at the temperature."""

    def __init__(self, folder: Path, *, updates: bool) -> None:
        self.model = loading.load_merged(folder, dtype="float32")
        self.updates = updates

    def update_named_params(self, shapes: Any, named: Any) -> None:
        weights = dict(named)
        if self.updates:
            self.model.load_state_dict(weights, strict=False)

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: Any, **arguments: Any) -> dict[str, Any]:
        torch.manual_seed(arguments["generation_kwargs"]["seed"])
        ids, logps = list(prompts[0]), []
        for _ in range(arguments["max_tokens"]):
            with torch.no_grad():
                logits = self.model(torch.tensor([ids])).logits[0, -1]
            distribution = (logits / arguments["temperature"]).log_softmax(-1)
            ids.append(int(distribution.exp().multinomial(1)))
            logps.append([float(distribution[ids[-1]])])
            if ids[-1] in arguments["generation_kwargs"]["stop_token_ids"]:
                break
        return {"completion_ids": [ids[len(prompts[0]) :]], "logprobs": [logps]}


@pytest.mark.parametrize("updates", [True, False], ids=["merged weights", "weights of the base"])
def test_the_server_is_compared_with_the_policy_before_the_first_step(world, updates: bool):
    models = ppo_fixtures.build_models(world.lora, [], lora=True, temperature=0.7)
    ppo_fixtures.perturb(models, scale=0.3)
    client = ModelClient(world.sft, updates=updates)
    config = ppo_fixtures.ppo_config(sampler="vllm", temperature=0.7, lora=tiny_models.LORA)
    eos = models.tokenizer.eos_token_id
    sampler = vllm.VLLMSampler(client, models.policy, {eos}, config)
    prompts = [[4, 5, 6], [7, 8]]
    agreement = compare(config, models, sampler, prompts, seed=0)
    if updates:
        agreement.check(config)
        assert agreement.mean < 1e-5
        assert agreement.n_tokens <= 32
    else:
        with pytest.raises(UserError, match=r"explains at most 0\.1; .*processed_logprobs"):
            agreement.check(config)


def test_a_missing_server_is_reported_before_training(tmp_path: Path, launch: Any):
    (tmp_path / "recipe.yaml").write_text(
        """\
stages:
  prepare: {source: embedded, max_rows: 40}
  sft: {model: {vocab_size: 300, hidden_size: 32}}
  ppo:
    model: sft
    rewards: ["align.rewards.gold:rewards"]
    steps: 1
    batch_size: 2
    sampler: vllm
    vllm_url: http://127.0.0.1:9
"""
    )
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "ppo.vllm_url: http://127.0.0.1:9: no server answers" in done.err
    assert "running" not in done.out


def test_without_vllm_installed_the_error_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    with pytest.raises(UserError, match="vLLM is not installed"):
        vllm.connect("http://localhost:1", "cpu")


def test_a_completion_without_tokens_is_an_error_that_names_the_server(world):
    models = ppo_fixtures.build_models(world.sft, [], lora=False)
    client = Client([[7, 8, 2], []], [[-0.5, -1.0, -0.25], []])
    config = ppo_fixtures.ppo_config(sampler="vllm", vllm_url="http://here:8000")
    sampler = vllm.VLLMSampler(client, models.policy, {2}, config)
    with pytest.raises(UserError, match=r"http://here:8000: .* completion without tokens"):
        sampler.generate([[4, 5], [6]], seed=0)
