"""The sampler draws from the distribution that the update computes: ratios and the first check."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, wide_model
from helpers.ppo_fixtures import Folders
from transformers import GenerationConfig

from align.errors import UserError
from align.models.decoding.choice import Choice
from align.online_rl import sampler_agreement
from align.online_rl.completions import IGNORED
from align.online_rl.experience import Experience
from align.online_rl.sampler_agreement import TOLERANCES, compare, ratio_metrics


def experience_of(
    logps: list[list[float]], sampled: list[list[float]], n_prompt: int
) -> Experience:
    """Experience of rows whose completions begin after ``n_prompt`` columns."""
    policy, sampler = torch.tensor(logps), torch.tensor(sampled)
    labels = torch.ones(policy.shape[0], policy.shape[1] + 1, dtype=torch.long)
    labels[:, : n_prompt + 1] = IGNORED
    zeros = torch.zeros_like(policy)
    return Experience({"labels": labels}, policy, zeros, zeros, None, sampler)


def test_ratios_by_hand():
    # The first column is the prompt's. The ratios policy / sampler are 1/2, 1, 2 and 4:
    # mean 7.5 / 4 = 1.875, effective sample size 7.5^2 / (4 (1/4 + 1 + 4 + 16)) = 56.25 / 85,
    # and one of four is above 2.
    half, quarter, eighth = (math.log(x) for x in (0.5, 0.25, 0.125))
    experience = experience_of(
        [[9.0, quarter, half], [9.0, half, half]], [[0.0, half, half], [0.0, quarter, eighth]], 1
    )
    assert ratio_metrics(experience, cap=2.0) == pytest.approx(
        {
            "sampler/ratio_min": 0.5,
            "sampler/ratio_mean": 1.875,
            "sampler/ratio_max": 4.0,
            "sampler/ess": 56.25 / 85,
            "sampler/above_cap": 0.25,
        }
    )
    unknown = dataclasses.replace(experience, sampler_logps=None)
    assert ratio_metrics(unknown, cap=2.0) == {}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        pytest.param(1.0, 1.0, id="the whole distribution: on average 1"),
        # 0.5 + 0.25 = 0.75 < 0.8, so the third token is kept as well: 0.5 + 0.25 + 0.15
        pytest.param(0.8, 0.9, id="top_p: the probability of the tokens that are kept"),
    ],
)
def test_the_mean_ratio_is_the_probability_of_the_tokens_that_can_be_sampled(
    top_p: float, expected: float
):
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    # By enumeration: q = p / kept on the kept tokens, so the sum of q * (p / q) is kept.
    order = probabilities.cumsum(0) - probabilities
    kept = probabilities[order < top_p]
    assert float(kept.sum()) == pytest.approx(expected)
    assert float((kept / kept.sum() * (kept / (kept / kept.sum()))).sum()) == pytest.approx(
        expected
    )
    # And by the sampler of a run.
    torch.manual_seed(0)
    n = 4000
    choose = Choice(GenerationConfig(do_sample=True, temperature=1.0, top_p=top_p, top_k=0), n)
    chosen = choose(probabilities.log().expand(n, -1), list(range(n)))
    policy = probabilities.log()[chosen.tokens][:, None].tolist()
    metrics = ratio_metrics(experience_of(policy, chosen.logps[:, None].tolist(), 0), cap=2.0)
    assert metrics["sampler/ratio_mean"] == pytest.approx(expected, abs=1e-5)
    shares = torch.bincount(chosen.tokens, minlength=5) / n
    for share, p in zip(shares.tolist(), (kept / kept.sum()).tolist(), strict=False):
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_a_models_own_settings_of_generation_are_not_used_in_training(
    folders: Folders, tmp_path: Path
):
    other = tmp_path / "model"
    shutil.copytree(folders.world.sft, other)
    ppo_fixtures.edit_json(
        other / "generation_config.json",
        do_sample=True, temperature=0.5, top_p=0.5, top_k=2, min_p=0.3, repetition_penalty=1.5,
    )  # fmt: skip
    plain = ppo_fixtures.build_trainer(folders, tmp_path / "plain")
    changed = ppo_fixtures.build_trainer(folders, tmp_path / "changed", source=other)
    assert changed.generation_config.top_k == 2, "the settings are not those of the model"
    assert ppo_fixtures.sample(changed) == ppo_fixtures.sample(plain)


@pytest.mark.parametrize(
    ("source", "lora", "settings"),
    [
        pytest.param("sft", False, {}, id="separate models"),
        pytest.param("lora", True, {}, id="the adapter of an SFT stage"),
        pytest.param("lora", False, {}, id="an adapter that is merged"),
        pytest.param("sft", False, {"prefix_sharing": False}, id="padded batches"),
        pytest.param("sft", True, {"gradient_checkpointing": True}, id="gradient checkpointing"),
        pytest.param("sft", False, {"max_new_tokens": 3}, id="completions of at most three tokens"),
        pytest.param("sft", False, {"mixed_precision": "bfloat16"}, id="mixed precision"),
        pytest.param("sft", True, {"dtype": "bfloat16"}, id="adapters on a base in bfloat16"),
        pytest.param("lora", True, {"merge_adapter": True}, id="a merged adapter"),
        pytest.param(
            "lora",
            True,
            {"merge_adapter": True, "mixed_precision": "bfloat16"},
            id="a merged adapter in mixed precision",
        ),
    ],
)
def test_sampling_and_update_agree(
    folders: Folders, tmp_path: Path, source: str, lora: bool, settings: dict[str, Any]
):
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, source=getattr(folders.world, source), lora=lora, **settings
    )
    ppo_fixtures.perturb(trainer.models)
    lengths = trainer.models.policy.model.generation_config.max_new_tokens
    agreement = compare(
        trainer.config, trainer.models, trainer.sampler, trainer.prompts.tokens, seed=0
    )
    agreement.check(trainer.config)
    most = min(sampler_agreement.N_TOKENS, 4 * trainer.config.max_new_tokens)
    assert 4 < agreement.n_tokens <= most
    # far below the tolerance, and in bfloat16 not zero
    dtype = sampler_agreement.computed_type(trainer.config)
    assert agreement.mean < TOLERANCES[dtype] / 5
    assert (agreement.mean > 1e-5) == (dtype == "bfloat16")
    assert trainer.models.policy.model.generation_config.max_new_tokens == lengths


def sample_at_another_temperature(trainer: Any) -> None:
    trainer.models.policy.model.generation_config.temperature = 1.5


def sample_from_a_part(trainer: Any) -> None:
    trainer.models.policy.model.generation_config.top_p = 0.8


def sample_without_the_adapter(trainer: Any) -> None:
    trainer.sampler = dataclasses.replace(
        trainer.sampler, policy=dataclasses.replace(trainer.models.policy, adapter=None)
    )


def report_no_number(trainer: Any) -> None:
    generate = trainer.sampler.generate

    def broken(*args: Any, **kwargs: Any) -> Any:
        completions = generate(*args, **kwargs)
        completions.sampler_logps[0][0] = math.nan
        return completions

    trainer.sampler = SimpleNamespace(generate=broken)


@pytest.mark.parametrize(
    "damage",
    [
        sample_at_another_temperature,
        sample_from_a_part,
        sample_without_the_adapter,
        report_no_number,
    ],
)
def test_a_sampler_that_computes_other_probabilities_stops_the_run_before_the_first_step(
    folders: Folders, tmp_path: Path, damage: Callable[[Any], None]
):
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path, lora=True, eval_steps=1, eval_split="test", n_eval_prompts=2
    )
    ppo_fixtures.perturb(trainer.models)
    damage(trainer)
    with pytest.raises(UserError) as error:
        trainer.train()
    (line,) = error.value.lines
    assert "rounding in float32 explains at most 0.001" in line
    assert " in sampling and " in line
    assert not (tmp_path / "metrics.jsonl").exists(), "the run has begun"


def test_the_check_changes_no_result(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = []
    for name in ("checked", "unchecked"):
        trainer = ppo_fixtures.build_trainer(folders, tmp_path / name, lora=True, steps=1)
        if name == "unchecked":
            monkeypatch.setattr(trainer, "check_sampler", lambda: None)
        trainer.train()
        weights.append(ppo_fixtures.flat_weights(trainer))
    assert torch.equal(*weights)


@pytest.mark.filterwarnings("ignore:.*torch.Tensor inputs.*:FutureWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_and_update_agree_in_4_bits(folders: Folders, tmp_path: Path, dtype: str):
    pytest.importorskip("bitsandbytes")
    source = wide_model.save(folders.world, tmp_path / "wide")
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path / "run", source=source, lora=True, quantization="nf4", dtype=dtype,
        rewards=[ppo_fixtures.FIVE],
    )  # fmt: skip
    ppo_fixtures.perturb(trainer.models)
    agreement = compare(
        trainer.config, trainer.models, trainer.sampler, trainer.prompts.tokens, seed=0
    )
    agreement.check(trainer.config)
    assert agreement.mean < TOLERANCES[dtype] / 5
