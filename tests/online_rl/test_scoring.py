"""Scores of completions: the penalty without eos, and reward models in training and in PPO.

Rows are those of the checklist in the design notes on PPO.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.ppo_fixtures import Folders
from torch.testing import assert_close

from align.config.functions import ScoreFunction
from align.config.online_rl_stages import PPO, RLOO
from align.config.training import Reward
from align.errors import UserError
from align.models import tokenization
from align.models.decoding import eager
from align.online_rl.completions import Completions
from align.online_rl.experience import compute_experience
from align.online_rl.metrics import compute_metrics
from align.online_rl.scoring import ModelReward, Scorer, build_scorer
from align.rewards import reward_model
from align.rewards.reward_model import RewardModel
from align.stages import reward


def test_row_07_a_completion_without_eos_is_penalized_even_if_its_prompt_contains_eos(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = ppo_fixtures.build_trainer(
        folders,
        tmp_path,
        rewards=[ppo_fixtures.FIVE],
        kind="rloo",
        n_completions=2,
        missing_eos_penalty=1.5,
    )
    tokenizer = trainer.models.tokenizer
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = trainer.prompts.tokens[:4]
    assert all(eos in prompt for prompt in prompts)  # ChatML ends the user's turn with it
    # Ended; cut off; ended with the first token; ended with the last token.
    answers = [[9, 8, eos, pad], [9, 8, 7, 6], [eos, pad, pad, pad], [9, 8, 7, eos]]
    order = sorted(range(4), key=lambda i: len(prompts[i]))

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([answers[i] for i in order])], dim=1)

    monkeypatch.setattr(eager, "obstacle", lambda model: "the answers are fixed")
    trainer.models.policy.model.generate = generate
    completions = ppo_fixtures.sample(trainer, 4)
    scores = trainer.scorer.score(completions, trainer.prompts.rows[:4])
    assert completions.finished == [True, False, True, True]
    assert scores.reward.tolist() == [5, 5, 5, 5]
    assert scores.score.tolist() == [5, 3.5, 5, 5]  # 5 - 1.5
    experience = compute_experience(trainer.models, completions, batch_size=4)
    metrics = compute_metrics(completions, experience, scores)
    assert metrics["missing_eos"] == 0.25


REWARDS = {"correct": [1.0, 0.0, 1.0, 1.0], "length": [10.0, 30.0, 20.0, 60.0]}


def scored(**settings: Any) -> Any:
    """Scores for training of two prompts with two completions each, the third one cut off."""
    config = RLOO.model_validate(
        {"model": "sft", "rewards": list(map("rules:{}".format, REWARDS)), "steps": 2}
        | {"batch_size": 4, "n_completions": 2, "weights": [2.0, 0.1], "missing_eos_penalty": 0.5}
        | settings
    )
    rewards = {name: Mock(score=Mock(return_value=torch.tensor(REWARDS[name]))) for name in REWARDS}
    completions = Completions([[1]] * 4, [[5]] * 4, [True, True, False, True])
    scorer = Scorer(rewards, config, Mock(decode=lambda *_, **__: "a"))
    return scorer.for_training(scorer.score(completions, [{"prompt": []}] * 4))


def test_rewards_are_normalized_each_before_they_are_weighted():
    # Weighted sums 2 * correct + 0.1 * length = 3, 3, 4, 8, and 0.5 less for the third.
    raw = scored()
    assert_close(raw.reward, torch.tensor([3.0, 3.0, 4.0, 8.0]))
    assert_close(raw.score, torch.tensor([3.0, 3.0, 3.5, 8.0]))
    # Two values a, b with a > b have the deviation (a - b) / sqrt(2) (n - 1 = 1), so that they
    # become +-h / (sqrt(2) * h + eps) with h = (a - b) / 2; equal ones become 0.
    h = [0.5 / (2**0.5 * 0.5 + 1e-4), 10 / (2**0.5 * 10 + 1e-4), 20 / (2**0.5 * 20 + 1e-4)]
    group = scored(normalize_scores="group")
    expected = [2 * h[0] - 0.1 * h[1], -2 * h[0] + 0.1 * h[1], -0.1 * h[2] - 0.5, 0.1 * h[2]]
    assert_close(group.score, torch.tensor(expected))
    assert_close(group.reward, raw.reward)
    # correct: mean 0.75, variance 3/16; length: mean 30, variance (400 + 0 + 100 + 900) / 4 = 350.
    batch = scored(normalize_scores="batch")
    correct = [(value - 0.75) / (3 / 16) ** 0.5 for value in REWARDS["correct"]]
    length = [(value - 30) / 350**0.5 for value in REWARDS["length"]]
    expected = [
        2 * c + 0.1 * n - p for c, n, p in zip(correct, length, (0, 0, 0.5, 0), strict=True)
    ]
    assert_close(batch.score, torch.tensor(expected))
    assert batch.rewards["length"].tolist() == REWARDS["length"]


def test_the_share_of_each_reward_is_that_of_the_weighted_and_normalized_one():
    # Within prompts, parts (1, -1, 0, 0) and (-1, 1, -2, 2) with the sum (0, 0, -2, 2):
    # covariances 0 and 8 of a variance of 8.
    assert scored().variance_shares == pytest.approx({"correct": 0.0, "length": 1.0})
    # Normalized, the first prompt has parts +-(2, -0.1) / sqrt(2), the second +-(0, 0.1) / sqrt(2):
    # covariances with the sums 1.9 and 0.1: 2 * 1.9 = 3.8, and -0.1 * 1.9 + 0.1 * 0.1 = -0.18.
    shares = scored(normalize_scores="group").variance_shares
    assert shares == pytest.approx({"correct": 3.8 / 3.62, "length": -0.18 / 3.62}, rel=1e-3)


def test_sums_are_on_the_cpu_where_the_device_has_no_float64():
    config = RLOO.model_validate(
        {"model": "sft", "rewards": ["rules:f"], "steps": 2, "batch_size": 4, "n_completions": 2}
    )
    for device, expected in (("mps", "cpu"), ("meta", "meta")):
        models = Mock(device=torch.device(device), rewards=[])
        scorer = build_scorer(config, models, {"rules:f": Mock()})
        assert str(scorer.device) == expected


def test_group_normalization_equals_that_of_trl_up_to_its_last_step():
    """TRL normalizes the sum over the batch as well, which ``normalize_advantages`` does here."""
    values = torch.tensor([REWARDS[name] for name in REWARDS]).T
    grouped = values.view(-1, 2, 2)
    normalized = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    expected = (normalized.view(-1, 2) * torch.tensor([2.0, 0.1])).sum(1)
    scores = scored(normalize_scores="group", missing_eos_penalty=None)
    assert_close(scores.score, expected)


def test_normalization_among_the_completions_of_a_prompt_needs_several():
    with pytest.raises(ValueError, match="`normalize_scores: group` compares the completions"):
        PPO.model_validate(
            {"model": "sft", "rewards": ["math"], "steps": 2, "batch_size": 4}
            | {"normalize_scores": "group"}
        )


def test_rewards_are_functions_by_short_name_by_address_or_with_keys():
    rewards = ["reward", "math", "rules:f", {"function": "regex", "answer": "x", "name": "form"}]
    config = PPO.model_validate({"model": "sft", "rewards": rewards, "steps": 2, "batch_size": 4})
    assert config.reward_names == ["reward", "math", "rules:f", "form"]
    assert list(config.score_functions) == ["math", "rules:f", "form"]
    addresses = {key: function.address for key, function in config.reward_functions.items()}
    assert addresses == {
        ("rewards", 1): "align.rewards.verifiers:math",
        ("rewards", 2): "rules:f",
        ("rewards", 3): "align.rewards.verifiers:regex",
    }
    assert config.input_names() == {"model": "sft", "prompts": "prepare", "rewards.0": "reward"}
    digest = config.digest_settings()["rewards"]
    slower = {**rewards[3], "timeout_seconds": 5.0}  # type: ignore[dict-item]
    other = config.model_copy(update={"rewards": [*config.rewards[:3], ScoreFunction(**slower)]})
    # The content of a reward model counts in its place, whatever the name of its stage.
    assert other.digest_settings()["rewards"] == digest == [None, *rewards[1:]]
    with pytest.raises(ValueError, match="`rewards` contains 'regex' more than once"):
        PPO.model_validate(
            {"model": "sft", "steps": 2, "batch_size": 4}
            | {"rewards": [{"function": "regex", "answer": each} for each in "xy"]}
        )


def test_a_reward_model_reads_the_end_of_its_template_whichever_end_token_the_policy_wrote():
    model = Mock(tokenizer=None)
    completions = Completions([[1], [1], [1]], [[5, 9], [5, 8], [5, 6]], [True, True, False])
    ModelReward(model, batch_size=2, end=9).score(completions, ["a", "a", "a"], [])
    model.score_tokens.assert_called_once_with([[1, 5, 9], [1, 5, 9], [1, 5, 6]], batch_size=2)


def shaped_like_gemma(folders: Folders, target: Path) -> tuple[Path, Path]:
    """Copies of policy and reward model whose end of a turn is not eos, but an end token."""
    copies = []
    for source in (folders.world.sft, folders.full):
        copy = target / source.name
        shutil.copytree(source, copy)
        tokenizer = tokenization.load_tokenizer(copy)
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        tokenizer.eos_token = "<|endoftext|>"
        tokenizer.pad_token = "<|im_start|>"
        tokenizer.save_pretrained(copy)
        ppo_fixtures.edit_json(copy / "generation_config.json", eos_token_id=ends)
        copies.append(copy)
    return copies[0], copies[1]


@pytest.mark.parametrize("name", ["pad is not eos", "pad is eos", "the end is not eos"])
def test_row_09_a_reward_model_reads_the_same_tokens_in_training_evaluation_and_ppo(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    source, folder = folders.world.sft, folders.full
    if name == "pad is eos":
        source, folder = folders.eos, folders.eos_reward
    if name == "the end is not eos":
        source, folder = shaped_like_gemma(folders, tmp_path / "gemma")
    tokenizer = tokenization.load_tokenizer(source)
    expected, rows = ppo_fixtures.tokenized_pairs(folders, tokenizer)
    calls = []
    score_tokens = RewardModel.score_tokens

    def recording(model: Any, ids: Any, **kwargs: Any) -> torch.Tensor:
        calls.append([list(row) for row in ids])
        return score_tokens(model, ids, **kwargs)

    monkeypatch.setattr(RewardModel, "score_tokens", recording)

    # PPO: completions as a policy would sample them.
    trainer = ppo_fixtures.build_trainer(
        folders, tmp_path / "ppo", source=source, reward_model=folder
    )
    prompts = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    sampled = [row[len(p) :] for row, p in zip(expected, prompts, strict=True)]
    completions = Completions(prompts, sampled, [True] * len(rows))
    in_ppo = trainer.scorer.score(completions, [{"prompt": row["prompt"]} for row in rows]).reward

    # Evaluation: texts.
    model = RewardModel.load(folder, dtype="float32", device="cpu")
    chosen = [row["chosen"] for row in rows]
    evaluated = model.score([row["prompt"] for row in rows], chosen, batch_size=4)
    assert calls == [expected, expected]

    # Training: rows of the batches that TRL collates.
    config = Reward(model="sft", trainer=ppo_fixtures.TRAINER)
    inputs = {"model": source, "pairs": folders.world.data}
    trl_trainer = reward.build(config, inputs, tmp_path / "rm")
    collated, padding = [], []
    for batch in trl_trainer.get_train_dataloader():
        lengths = batch["attention_mask"].sum(1).tolist()
        for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True):
            collated.append(ids[:length])
            padding.append(ids[length:])
    assert all(row in collated for row in expected)
    assert any(padding)
    ends = tokenization.end_tokens(tokenizer)
    assert all(token not in ends for rest in padding for token in rest)

    # A plain classifier on the same ids gives the score before its mean is subtracted.
    plain = ppo_fixtures.load_plain_reward_model(folder)
    mean = reward_model.score_mean(folder)
    raw = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in expected])
    assert abs(mean) > 0.05
    assert_close(in_ppo + mean, raw, rtol=1e-4, atol=1e-5)
    assert_close(evaluated + mean, raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_row_10_a_reward_model_has_mean_0_on_sft_completions_also_after_a_copy(
    folders: Folders, tmp_path: Path, name: str
):
    folder = getattr(folders, name)
    rows = tiny_models.rows(folders.world.data, "demonstrations-train")
    tokenizer = tokenization.load_tokenizer(folder)
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    plain = ppo_fixtures.load_plain_reward_model(copied)
    ids = tokenization.tokenize_for_reward(
        tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows]
    )
    raw = torch.tensor([ppo_fixtures.plain_score(plain, row) for row in ids])
    assert raw.mean().abs() > 0.1, "the mean is 0 without centering"
    assert (raw - reward_model.score_mean(copied)).mean().abs() < 1e-4

    models = ppo_fixtures.build_models(folders.world.sft, [copied], lora=name == "adapter")
    scores = models.rewards[0].score_tokens(ids, batch_size=16)
    assert scores.mean().abs() < 0.05
    assert scores.std() > 0.05
    assert_close(scores, raw - raw.mean(), rtol=1e-4, atol=1e-4)


def test_a_reward_model_with_another_template_keeps_its_tokenizer_on_one_backbone_too(
    folders: Folders, tmp_path: Path
):
    other = tmp_path / "reward"
    shutil.copytree(folders.adapter, other)
    tokenizer = tokenization.load_tokenizer(other)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(str(other))
    settings = {"lora": True, "kind": "rloo", "n_completions": 2, "batch_size": 4}
    same = ppo_fixtures.build_trainer(
        folders, tmp_path / "a", reward_model=folders.adapter, **settings
    )
    differs = ppo_fixtures.build_trainer(folders, tmp_path / "b", reward_model=other, **settings)
    assert same.models.rewards[0].tokenizer is None
    assert differs.models.rewards[0].tokenizer is not None
    assert differs.models.rewards[0].model is differs.models.policy.model
    # A critic would start as the reward model, which reads other tokens than the policy.
    with pytest.raises(UserError, match="use the stage `rloo`, which has no critic"):
        ppo_fixtures.build_trainer(folders, tmp_path / "c", reward_model=other, lora=True)
