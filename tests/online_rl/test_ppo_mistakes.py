"""PPO and the reward stage where something is wrong: told early, in a line, and nothing false is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ppo_fixtures, tiny_models
from pydantic import ValidationError

from align.config.ppo import PPO
from align.errors import UserError
from align.evaluation.reward_model import _fitting
from align.rewards import functions, reward_model
from align.runtime import distributed
from align.stages import ppo, reward

BASE = {"model": "sft", "rewards": ["reward"], "steps": 8, "batch_size": 8}


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


# Learning


def test_a_run_with_an_absurd_learning_rate_writes_no_policy(
    folders: ppo_fixtures.Folders, tmp_path: Path
):
    settings = PPO(
        model="sft", rewards=["reward"], lora=tiny_models.LORA, steps=8, batch_size=4, max_new_tokens=6,
        learning_rate=1.0e12, epochs=4, max_grad_norm=1.0e30,
    )  # fmt: skip
    inputs = {
        "model": folders.world.sft,
        "prompts": folders.world.data,
        "rewards.0": folders.adapter,
    }
    with pytest.raises((UserError, RuntimeError)):
        ppo.run(settings, inputs, tmp_path, tiny_models.logger("ppo", tmp_path))
    assert not list(tmp_path.glob("adapter_model*"))


# The reward stage, twice ------------------------------------------------------------------------------------------------


def test_a_stage_that_is_killed_after_centring_and_run_again_stores_the_same_mean(
    folders: ppo_fixtures.Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from align.config.training import Reward

    settings = Reward(
        model="sft", lora=tiny_models.LORA, trainer=tiny_models.TRAINER | {"max_steps": 4}
    )
    inputs = {"model": folders.world.sft, "pairs": folders.world.data}
    means = []
    for _ in range(2):
        distributed.reset_process_state(0)  # as the chain does before a stage
        reward.run(settings, inputs, tmp_path, logger=tiny_models.logger("reward", tmp_path))
        means.append(json.loads((tmp_path / reward_model.FILE).read_text())[reward_model.MEAN])
    assert means[0] == means[1]
    assert abs(means[0]) > 1e-3


def test_rows_longer_than_the_model_are_counted_and_not_scored(
    folders: ppo_fixtures.Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = reward_model.RewardModel.load(
        folders.adapter, dtype="float32", device="cpu", prefix_sharing=False
    )
    told: list[str] = []
    logger = tiny_models.logger("reward", tmp_path)
    monkeypatch.setattr(logger, "info", told.append)
    rows = tiny_models.rows(folders.world.data, "pairs-test")
    long = rows[0] | {"chosen": [{"role": "assistant", "content": "word " * 400}]}
    kept = _fitting(model, [*rows, long], ["chosen", "rejected"], logger)
    assert kept == rows
    assert told == [f"1 of {len(rows) + 1} rows are longer than the model: not scored"]
