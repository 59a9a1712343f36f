"""PPO and the reward stage where something is wrong: told early, in a line, and nothing false is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from pydantic import ValidationError

from align.config.ppo import PPO
from align.errors import UserError
from align.evaluation.reward_model import _fitting
from align.models import tokenization
from align.rewards import functions, reward_model
from align.runtime import distributed
from align.stages import ppo, reward

BASE = {"model": "sft", "rewards": ["reward"], "steps": 8, "batch_size": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ppo_fixtures.Cast:
    return ppo_fixtures.cast(tmp_path_factory.getbasetemp())


# Settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"advantages": "rloo", "n_completions": 2, "gae_lambda": 0.9}, "`gae_lambda` has no effect with `advantages: rloo`"),
        ({"advantages": "rloo", "n_completions": 2, "gamma": 0.9}, "`gamma` has no effect"),
        ({"advantages": "reinforce", "value_clip": 0.1}, "`value_clip` has no effect"),
        ({"advantages": "rloo"}, "set `n_completions` to at least 2"),
        ({"vllm_url": "http://x"}, "has no effect without `sampler: vllm`"),
        ({"kl_horizon": 100}, "has no effect without `kl_target`"),
        ({"n_eval_prompts": 3}, "has no effect without `eval_steps`"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "must therefore be greater than 0"),
        ({"kl_target": 1.0, "kl_horizon": 1}, "could change the sign of `kl_coef`"),
        ({"critic_warmup_steps": 8}, "must be less than `steps` (8), got 8"),
        ({"rewards": ["reward", "reward"]}, "more than once"),
        ({"weights": [1.0, 2.0]}, "one entry for each of `rewards` (1), got 2"),
        ({"n_completions": 3}, "(8) must be a multiple of `n_completions` (3)"),
        ({"minibatches": 9}, "`minibatches` (9) must not exceed `batch_size` (8)"),
        ({"quantization": "nf4"}, "set `lora`"),
        ({"dtype": "bfloat16"}, "rounds small updates to zero"),
        ({"sampler": "vllm", "quantization": "nf4", "lora": {}}, "needs unquantized weights"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_together_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(ValidationError) as refused:
        PPO.model_validate(BASE | changes)
    assert told in str(refused.value)


# Reward functions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes ``mine.py`` in the working directory, and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        sys.modules.pop("mine", None)
        (tmp_path / "mine.py").write_text(text)

    yield write
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be had: AttributeError"),
        ("f = 3", "no function, but int"),
        ("def f(x): return x", "it takes x; a reward function is written"),
        ("def f(", "cannot be had: SyntaxError"),
        ("raise RuntimeError('down')", "cannot be had: RuntimeError: down"),
    ],
)
def test_a_reward_function_that_cannot_be_had_is_told_in_a_line(module: Any, text: str, told: str):
    module(text)
    with pytest.raises(UserError) as refused:
        functions.load_function("mine:f")
    assert len(refused.value.lines) == 1
    assert told in refused.value.lines[0]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("None", "returned None; return a list of numbers"),
        ("[None]", "return a list of numbers"),
        ("[1.0, 2.0]", "2 scores for 1 completions"),
        ("[float('nan')]", "scores are finite"),
    ],
)
def test_what_a_reward_function_answers_is_checked(module: Any, answer: str, told: str):
    module(f"def f(prompts, completions): return {answer}")
    function = functions.load_function("mine:f")
    with pytest.raises(UserError, match=told):
        functions.call("mine:f", function, [[]], ["a"], {"prompt_id": ["1"]})


def test_columns_that_a_function_cannot_do_without_are_known_before_anything_trains(
    module: Any, tmp_path: Path, launch: Any
):
    module("def f(prompts, completions, answer, level=1, **columns): return [0.0]")
    assert functions.missing_columns("mine:f", ["prompt_id"]) == ["answer"]
    assert functions.missing_columns("mine:f", ["prompt_id", "answer"]) == []
    (tmp_path / "recipe.yaml").write_text(
        "stages:\n"
        "  prepare: {source: embedded, max_rows: 40}\n"
        "  sft: {model: {vocab_size: 300, hidden_size: 32}}\n"
        "  ppo: {model: sft, rewards: ['mine:f'], steps: 2, batch_size: 4}\n"
    )
    done = launch("recipe.yaml")
    assert done.code == 2
    assert "ppo.rewards.0: mine:f requires the column `answer`" in done.err
    assert "sft: running" not in done.out


# Learning ---------------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    made: ppo_fixtures.Cast, tmp_path: Path
):
    learner = ppo_fixtures.learner(made, tmp_path, batch_size=4, epochs=1)
    before = [p.detach().clone() for p in learner.cast.weights().values()]
    norm = torch.tensor(float("nan"))
    for p in learner.cast.weights().values():
        p.grad = torch.full_like(p, float("nan"))
    assert not norm.isfinite()
    with pytest.raises(UserError, match="a gradient is not finite"):
        learner.clip(list(learner.cast.weights().values()), 1.0)
    now = list(learner.cast.weights().values())
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_a_run_with_an_absurd_learning_rate_writes_no_policy(
    made: ppo_fixtures.Cast, tmp_path: Path
):
    settings = PPO(
        model="sft", rewards=["reward"], lora=tiny_models.LORA, steps=8, batch_size=4, max_new_tokens=6,
        learning_rate=1.0e12, epochs=4, max_grad_norm=1.0e30,
    )  # fmt: skip
    inputs = {"model": made.world.sft, "prompts": made.world.data, "rewards.0": made.adapter}
    with pytest.raises((UserError, RuntimeError)):
        ppo.run(settings, inputs, tmp_path, tiny_models.logger("ppo", tmp_path))
    assert not list(tmp_path.glob("adapter_model*"))


def test_adapters_that_learn_are_in_float32_wherever_the_critic_stands(made: ppo_fixtures.Cast):
    from align.online_rl import models

    cast = models.build_models(
        made.world.sft, scorers=[made.full], lora=tiny_models.LORA.model_dump(), dtype="bfloat16", quantization=None,
        revision=None, critic=True, temperature=1.0, share=False, checkpointing=False, device="cpu", say=print,
    )  # fmt: skip
    assert cast.critic is not None
    assert cast.critic.model is not cast.policy.model
    for role in (cast.policy, cast.critic):
        assert {p.dtype for p in cast.parameters(role)} == {torch.float32}


def test_a_reward_model_with_another_template_is_read_in_its_own_words_on_one_backbone_too(
    made: ppo_fixtures.Cast, tmp_path: Path
):
    import shutil

    other = tmp_path / "reward"
    shutil.copytree(made.adapter, other)
    tokenizer = tokenization.load_tokenizer(other)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(str(other))
    kinds = {"lora": True, "advantages": "rloo", "n_completions": 2, "batch_size": 4}
    same = ppo_fixtures.learner(made, tmp_path / "a", scorer=made.adapter, **kinds)
    differs = ppo_fixtures.learner(made, tmp_path / "b", scorer=other, **kinds)
    assert same.cast.rewards[0].tokenizer is None
    assert differs.cast.rewards[0].tokenizer is not None
    assert differs.cast.rewards[0].model is differs.cast.policy.model


# The reward stage, twice ------------------------------------------------------------------------------------------------


def test_a_stage_that_is_killed_after_centring_and_run_again_stores_the_same_mean(
    made: ppo_fixtures.Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from align.config.training import Reward

    settings = Reward(
        model="sft", lora=tiny_models.LORA, trainer=tiny_models.TRAINER | {"max_steps": 4}
    )
    inputs = {"model": made.world.sft, "pairs": made.world.data}
    means = []
    for _ in range(2):
        distributed.reset_process_state(0)  # as the chain does before a stage
        reward.run(settings, inputs, tmp_path, logger=tiny_models.logger("reward", tmp_path))
        means.append(json.loads((tmp_path / reward_model.FILE).read_text())[reward_model.MEAN])
    assert means[0] == means[1]
    assert abs(means[0]) > 1e-3


def test_rows_longer_than_the_model_are_counted_and_not_scored(
    made: ppo_fixtures.Cast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = reward_model.RewardModel.load(
        made.adapter, dtype="float32", device="cpu", prefix_sharing=False
    )
    told: list[str] = []
    logger = tiny_models.logger("reward", tmp_path)
    monkeypatch.setattr(logger, "info", told.append)
    rows = tiny_models.rows(made.world.data, "pairs-test")
    long = rows[0] | {"chosen": [{"role": "assistant", "content": "word " * 400}]}
    kept = _fitting(model, [*rows, long], ["chosen", "rejected"], logger)
    assert kept == rows
    assert told == [f"1 of {len(rows) + 1} rows are longer than the model: not scored"]
