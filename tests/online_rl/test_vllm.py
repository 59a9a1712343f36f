"""Sampling by a server: a stand-in takes the client's place, since no vLLM runs where the tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close

from align.errors import UserError
from align.functional.policy_gradient import importance_weights
from align.models import loading
from align.online_rl import models, vllm
from align.runtime import distributed


class Client:
    """Keeps what it is sent, and says what it was told to say."""

    def __init__(self, completions: list[list[int]], logps: list[list[float]]) -> None:
        self.completions, self.logps = completions, logps
        self.weights: dict[str, torch.Tensor] = {}
        self.asked: dict[int, Any] = {}
        self.prompts = [[4, 5], [6]]

    def update_named_params(self, told: Any, named: Any) -> None:
        self.weights = dict(named)
        assert [(k, list(v.shape)) for k, v in self.weights.items()] == [(n, s) for n, _, s in told]

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: Any, **asked: Any) -> dict[str, Any]:
        assert len(prompts) == 1
        place = self.prompts.index(prompts[0])
        self.asked[place] = asked
        return {
            "completion_ids": [self.completions[place]],
            "logprobs": [[[value] for value in self.logps[place]]],
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


def server(client: Client) -> vllm.VLLMServer:
    made = vllm.VLLMServer.__new__(vllm.VLLMServer)
    made.client = client
    return made


def test_the_server_gets_the_adapter_merged_and_says_tokens_with_their_log_probabilities(world):
    cast = models.build_models(
        world.lora, scorers=[], lora=tiny_models.LORA.model_dump(), dtype="float32", quantization=None, revision=None,
        critic=True, temperature=1.0, share=False, checkpointing=False, device="cpu", say=print,
    )  # fmt: skip
    client = Client([[7, 8, 2], [9, 9, 9]], [[-0.5, -1.0, -0.25], [-2.0, -2.0, -2.0]])
    said = server(client).sample(
        cast.policy,
        [[4, 5], [6]],
        {2},
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=3,
        seed=2**40 + 5,
    )
    merged = loading.load_merged(world.lora, dtype="float32").state_dict()
    sent = client.weights
    assert sent.keys() == {k for k in merged if k != "lm_head.weight"}  # tied to the embedding
    assert any(
        not torch.equal(sent[k], loading.load_merged(world.sft, dtype="float32").state_dict()[k])
        for k in sent
    )
    for name, weight in sent.items():
        assert_close(weight, merged[name])
    assert said.rows == [[4, 5, 7, 8, 2], [6, 9, 9, 9]]
    assert said.finished == [True, False]
    assert said.sampler_logps == [[-0.5, -1.0, -0.25], [-2.0, -2.0, -2.0]]
    told = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 3, "logprobs": 0}
    for asked in client.asked.values():
        assert told.items() <= asked.items()
        assert asked["generation_kwargs"]["stop_token_ids"] == [2]
    # One seed for both would answer equal prompts alike.
    assert len({asked["generation_kwargs"]["seed"] for asked in client.asked.values()}) == 2


def test_its_log_probabilities_become_weights_that_are_capped(world):
    from align.online_rl import experience

    said = experience.Completions(
        [[4, 5], [6]], [[7, 8], [9]], [False, False], [[-1.0, -3.0], [-2.0]]
    )
    logps = torch.tensor([[0.0, -1.5, -0.5], [-2.0, 0.0, 0.0]])
    spoken = experience.Experience(said.tensors(0, "cpu"), logps, logps, logps, None)
    theirs = experience.align_sampler_logps(said, spoken)
    assert theirs is not None
    assert theirs.tolist() == [[0.0, -1.0, -3.0], [-2.0, 0.0, 0.0]]
    # e^(-1.5 + 1) = 0.6065; e^(-0.5 + 3) = 12.2, capped at 2; equal ones weigh exactly 1
    weights = importance_weights(logps, theirs, cap=2.0)
    assert_close(weights, torch.tensor([[1.0, 0.6065307, 2.0], [1.0, 1.0, 1.0]]))


def test_a_server_that_is_not_there_is_told_before_anything_trains(tmp_path: Path, launch: Any):
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


def test_without_vllm_a_run_ends_in_a_line_that_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    with pytest.raises(UserError, match="vLLM is not installed"):
        vllm.VLLMServer("http://localhost:1", Path("cpu"))
