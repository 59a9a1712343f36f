"""``merge_adapter``: equal samples, and an update to which it makes no difference in any bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures
from helpers.ppo_fixtures import Folders, Recorder, flat_weights, recorded_gradients

from align.config.online_rl_stages import GRPO, PPO
from align.errors import UserError
from align.models.adapters import active_adapter
from align.models.decoding import merged

KINDS = {"ppo": {}, "grpo": {"n_completions": 2}, "rloo": {"n_completions": 2}, "reinforce": {}}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("ppo", "lora"),
        pytest.param("ppo", "sft", marks=pytest.mark.slow),
        ("grpo", "sft"),
        pytest.param("rloo", "sft", marks=pytest.mark.slow),
        pytest.param("reinforce", "sft", marks=pytest.mark.slow),
    ],
)
def test_an_update_has_the_bits_of_one_without_merging(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, source: str
):
    recorder = Recorder(monkeypatch)
    gradients, weights, bases = [], [], []
    for merges in (False, True):
        trainer = ppo_fixtures.build_trainer(
            folders, tmp_path / str(merges), source=getattr(folders.world, source), lora=True,
            kind=kind, merge_adapter=merges, minibatches=2, epochs=2, **KINDS[kind],
        )  # fmt: skip
        ppo_fixtures.perturb(trainer.models)  # policy and reference differ from the beginning
        base = {n: p for n, p in trainer.models.policy.model.named_parameters() if "lora" not in n}
        before = {name: p.clone() for name, p in base.items()}
        with recorded_gradients(monkeypatch) as recorded:
            trainer.step(0)
            trainer.step(1)
        assert all(torch.equal(p, before[name]) for name, p in base.items())
        gradients.append(recorded)
        weights.append(flat_weights(trainer))
        bases.append(before)
    apart, together = recorder.completions[:2], recorder.completions[2:]
    for one, other in zip(apart, together, strict=True):
        assert one.completions == other.completions
        for logps, expected in zip(other.sampler_logps, one.sampler_logps, strict=True):
            assert logps == pytest.approx(expected, abs=1e-4)
    assert [c.sampler_logps for c in apart] != [c.sampler_logps for c in together], "not merged"
    for one, other in zip(recorder.experiences[:2], recorder.experiences[2:], strict=True):
        assert torch.equal(one.logps, other.logps)
        assert torch.equal(one.ref_logps, other.ref_logps)
        assert not torch.equal(one.logps, one.ref_logps)
    for one, other in zip(*gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(*weights)


def test_reference_and_reward_models_do_not_see_merged_weights(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = ppo_fixtures.build_trainer(folders, tmp_path, lora=True, merge_adapter=True)
    ppo_fixtures.perturb(trainer.models, scale=0.1)
    models, logits = trainer.models, []

    def reference() -> torch.Tensor:
        ids = torch.tensor([trainer.prompts.tokens[0]])
        with torch.no_grad(), active_adapter(models.reference.model, models.reference.adapter):
            return models.reference.model(input_ids=ids).logits

    before = reference()
    score = type(trainer.scorer).score

    def scoring(*args: Any, **kwargs: Any) -> Any:
        logits.append(reference())
        return score(*args, **kwargs)

    monkeypatch.setattr(type(trainer.scorer), "score", scoring)
    with merged.merged_adapter(models.policy.model, models.policy.adapter):
        assert not torch.equal(reference(), before), "the test would not notice merged weights"
    trainer.step(0)
    assert len(logits) == 1
    assert torch.equal(logits[0], before)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(folders: Folders, tmp_path: Path):
    settings: dict[str, Any] = {
        "lora": True, "merge_adapter": True, "kind": "grpo", "n_completions": 2, "epochs": 1,
        "save_steps": 2,
    }  # fmt: skip
    whole = ppo_fixtures.build_trainer(folders, tmp_path / "whole" / "grpo", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    resumed = ppo_fixtures.build_trainer(folders, tmp_path / "resumed" / "grpo", **settings)
    assert resumed.resume() == 2
    resumed.train()
    assert torch.equal(flat_weights(resumed), flat_weights(whole))
    logged = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in (tmp_path / run / "grpo" / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("resumed", "whole")
    ]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 4


@pytest.mark.slow
def test_compiled_steps_sample_from_the_merged_weights_of_every_step(
    folders: Folders, tmp_path: Path, recorder: Recorder
):
    for backend in (None, "aot_eager"):
        trainer = ppo_fixtures.build_trainer(
            folders, tmp_path / str(backend), lora=True, merge_adapter=True,
            compile_decoding=backend, epochs=1,
        )  # fmt: skip
        trainer.step(0)
        trainer.step(1)
    first, second = recorder.completions[:2], recorder.completions[2:]
    for one, other in zip(first, second, strict=True):
        assert one.completions == other.completions


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "there is no adapter without `lora`; remove it"),
        ({"lora": {}, "quantization": "nf4"}, "4 bits cannot store the sum"),
        ({"lora": {}, "dtype": "bfloat16"}, "set `dtype: float32` and `mixed_precision: bfloat16`"),
        ({"lora": {}, "sampler": "vllm"}, "`sampler: vllm` samples from merged weights anyway"),
    ],
)
def test_a_recipe_whose_adapter_cannot_be_merged_is_an_error(keys: dict[str, Any], message: str):
    config = PPO(model="m", rewards=["r"], steps=1, batch_size=2, merge_adapter=True, **keys)
    (problem,) = config.problems({})
    assert problem.keys == ("merge_adapter",)
    assert message in problem.message


def test_a_recipe_that_merges_an_adapter_in_mixed_precision_is_none():
    config = GRPO(
        model="m", rewards=["r"], steps=1, batch_size=2, n_completions=2, merge_adapter=True,
        lora={}, mixed_precision="bfloat16",
    )  # fmt: skip
    assert list(config.problems({})) == []
    assert config.digest_settings()["merge_adapter"] is True
    assert (
        "merge_adapter" not in config.model_copy(update={"merge_adapter": False}).digest_settings()
    )


def test_an_adapter_that_is_not_merged_is_an_error_when_the_stage_begins(
    folders: Folders, tmp_path: Path
):
    message = "merge_adapter: the adapter is not merged: its weights are in bfloat16, not in float"
    with pytest.raises(UserError, match=message):
        ppo_fixtures.build_trainer(
            folders, tmp_path, lora=True, merge_adapter=True, dtype="bfloat16"
        )
