"""Episodes: the tokens of several turns, which of them are trained, and where episodes end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.chat_tokenizers import make_tokenizer
from helpers.ppo_fixtures import Folders
from models.test_turn_fields import QWEN3
from torch.testing import assert_close

from align.config.online_rl_stages import GRPO
from align.errors import UserError
from align.models import tokenization
from align.online_rl.completions import Completions, Episode
from align.online_rl.draws import Draw
from align.online_rl.episodes import Player, build_player
from align.online_rl.experience import align_sampler_logps, compute_experience
from align.online_rl.optimization import build_objective
from align.online_rl.sampling import build_sampler
from align.rewards.environments import Environment

TOKENIZER = make_tokenizer(tokenization.CHATML, eos="<|im_end|>")
END = TOKENIZER.eos_token_id
TEMPLATE = tokenization.conversations(TOKENIZER)


def ids(text: str) -> list[int]:
    """Tokens of a text."""
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def row(text: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "prompt_id": text}


class Echo:
    """Repeats what the policy writes; the last character is the reward, and `.` ends it."""

    def reset(self, row: Any) -> Any:
        return row["prompt"]

    def step(self, completion: str) -> Any:
        reward = float(completion[-1]) if completion[-1:].isdigit() else 0.0
        return [{"role": "tool", "content": completion}], reward, completion.endswith(".")


class Script:
    """A sampler that writes the turns of a script and records what it has read."""

    def __init__(self, turns: dict[str, list[list[int]]], logps: bool = False) -> None:
        self.turns = {key: list(value) for key, value in turns.items()}
        self.logps = logps
        self.read: list[list[list[int]]] = []
        self.seeds: list[list[int]] = []

    def generate(self, prompts: Any, *, seeds: Any) -> Completions:
        self.read.append([list(prompt) for prompt in prompts])
        self.seeds.append(list(seeds))
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        keys = [next(key for key in self.turns if f"user\n{key}<|im_end|>" in t) for t in texts]
        rows = [self.turns[key].pop(0) for key in keys]
        logps = [[-float(len(row))] * len(row) for row in rows] if self.logps else None
        return Completions(
            [list(p) for p in prompts], rows, [row[-1] == END for row in rows], logps
        )


def player(script: Script, *, limit: int | None = None, **settings: Any) -> Player:
    config = ppo_fixtures.ppo_config(
        **{"environment": "test:Echo", "max_turns": 3, "max_new_tokens": 8, "rewards": []}
        | settings
    )
    echo = Environment("test:Echo", Echo)
    return Player(echo, script, TOKENIZER, TEMPLATE, config, limit)


def play(turns: dict[str, list[list[int]]], **settings: Any) -> Any:
    return player(Script(turns), **settings).play(
        [row(key) for key in turns], Draw(0, range(len(turns)))
    )


UNUSUAL = [ids("q")[0], ids("u")[0], ids("e")[0], END]
"""Tokens that the tokenizer would join into fewer."""


def test_sampled_tokens_stay_as_they_are_and_messages_come_from_the_template():
    assert len(ids("que")) < 3
    script = Script({"A": [UNUSUAL, [*ids("x."), END]], "B": [[*ids("y7."), END]]})
    played = player(script).play([row("A"), row("B")], Draw(0, [0, 1]))
    completions, (first, second) = played.completions, played.completions.episodes
    between = ids("\n<|im_start|>tool\nque<|im_end|>\n<|im_start|>assistant\n")
    assert completions.completions[0] == [*UNUSUAL, *between, *ids("x."), END]
    assert [completions.completions[0][turn] for turn in first.turns] == [
        UNUSUAL,
        [*ids("x."), END],
    ]
    assert script.read[1] == [[*completions.prompts[0], *UNUSUAL, *between]]
    assert completions.prompts[0] == ids("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n")
    assert (first.reward, first.ended) == (0.0, True)
    assert (second.reward, second.ended) == (0.0, True)
    assert completions.finished == [True, True]
    assert completions.lengths == [4 + 3, 4]
    assert completions.texts(TOKENIZER) == ["x.", "y7."]
    # Rewards read the conversation before the last turn.
    assert played.rows[0]["prompt"] == [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "que"},
        {"role": "tool", "content": "que"},
    ]
    assert played.rows[1] == row("B")


def test_only_sampled_tokens_are_labeled():
    played = play({"A": [UNUSUAL, [*ids("x."), END]], "B": [[*ids("y."), END]]})
    completions = played.completions
    labels = completions.tensors(TOKENIZER.pad_token_id, "cpu")["labels"].tolist()
    for k, turns in enumerate([[UNUSUAL, [*ids("x."), END]], [[*ids("y."), END]]]):
        assert [label for label in labels[k] if label != -100] == [
            t for turn in turns for t in turn
        ]
        start = len(completions.prompts[k])
        places = [start + p for turn in completions.turns[k] for p in range(turn.start, turn.stop)]
        assert [p for p, label in enumerate(labels[k]) if label != -100] == places


def test_the_rewards_of_the_turns_are_added_up():
    played = play({"A": [[*ids("a1"), END], [*ids("b2"), END], [*ids("c4"), END]]})
    assert played.completions.episodes[0].reward == 7.0
    assert not played.completions.episodes[0].ended
    assert len(played.completions.turns[0]) == 3  # max_turns


def test_a_turn_without_an_end_is_answered_and_ends_the_episode():
    played = play({"A": [ids("a1")], "B": [[*ids("b1"), END], ids("c2")]})
    assert played.completions.finished == [False, False]
    assert [episode.reward for episode in played.completions.episodes] == [1.0, 3.0]
    assert [len(turns) for turns in played.completions.turns] == [1, 2]


def test_an_episode_ends_where_too_few_tokens_are_left():
    turn = [*ids("a1"), END]
    between = len(ids("\n<|im_start|>tool\na1<|im_end|>\n<|im_start|>assistant\n"))
    prompt = len(ids("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"))
    second = prompt + len(turn) + between + 8  # max_new_tokens
    for limit, n_turns in ((second, 2), (second - 1, 1)):
        played = play({"A": [turn] * 3}, limit=limit)
        assert len(played.completions.turns[0]) == n_turns
        assert played.completions.turns[0][-1].stop == len(played.completions.completions[0])
        assert played.completions.episodes[0].reward == n_turns
    with pytest.raises(UserError, match=rf"test:Echo: the messages .* have {prompt} tokens"):
        play({"A": [turn]}, limit=prompt + 7)


def test_every_turn_has_its_own_seed_and_a_row_has_one_in_all_of_its_episodes():
    seeds: list[int] = []

    class Seeded(Echo):
        def reset(self, row: Any, seed: int) -> Any:
            seeds.append(seed)
            return row["prompt"]

    script = Script({"A": [[*ids("a"), END]] * 4, "B": [[*ids("b"), END]] * 2})
    playing = dataclasses.replace(
        player(script, max_turns=2), environment=Environment("test:Seeded", Seeded)
    )
    playing.play([row("A"), row("A"), row("B")], Draw(5, [4, 5, 6]))
    assert seeds[0] == seeds[1] != seeds[2]
    first, second = script.seeds
    assert len({*first, *second}) == 6
    # The place decides, not the other rows.
    alone = Script({"A": [[*ids("a"), END]] * 2})
    playing = dataclasses.replace(playing, sampler=alone)
    playing.play([row("A")], Draw(5, [5]))
    assert alone.seeds == [[first[1]], [second[1]]]
    assert seeds[3] == seeds[0]


def test_log_probabilities_of_the_sampler_are_in_the_columns_of_its_tokens():
    script = Script({"A": [UNUSUAL, [*ids("x."), END]]}, logps=True)
    completions = player(script).play([row("A")], Draw(0, [0])).completions
    width = len(completions.rows[0]) - 1
    ones = torch.ones(1, width)
    aligned = align_sampler_logps(completions, ones)
    mask = completions.tensors(TOKENIZER.pad_token_id, "cpu")["labels"][:, 1:] != -100
    assert aligned is not None
    assert aligned[mask].tolist() == [-4.0] * 4 + [-3.0] * 3
    assert aligned[0, : len(completions.prompts[0]) - 1].tolist() == [1.0] * (
        len(completions.prompts[0]) - 1
    )


def test_calls_are_read_with_their_special_tokens_and_results_pass_the_template():
    tokenizer = make_tokenizer(QWEN3, eos="<|im_end|>", listed=("<|call|>",))
    read: list[str] = []

    class Tools:
        def reset(self, row: Any) -> Any:
            tools = [{"type": "function", "function": {"name": "rain"}}]
            return [{**row["prompt"][0], "tools": tools}]

        def step(self, completion: str) -> Any:
            read.append(completion)
            return [{"role": "tool", "content": "no <|im_end|> rain"}], 0, len(read) == 2

    turns = [tokenizer.encode(t, add_special_tokens=False) for t in ("<|call|>rain", "No")]
    end = tokenizer.eos_token_id

    class Turns:
        def generate(self, prompts: Any, *, seeds: Any) -> Completions:
            return Completions([list(prompts[0])], [[*turns[len(read)], end]], [True])

    config = ppo_fixtures.ppo_config(environment="test:Tools", rewards=[], max_new_tokens=8)
    template = tokenization.conversations(tokenizer)
    playing = Player(Environment("test:Tools", Tools), Turns(), tokenizer, template, config, None)
    (ids,) = playing.play([row("A")], Draw(0, [0])).completions.rows
    assert read == ["<|call|>rain", "No"]
    text = tokenizer.decode(ids)
    assert '"rain"' in text.partition("user")[0]  # the tools
    assert "<tool_response>\nno <|im_end|> rain\n</tool_response>" in text
    assert ids.count(end) == 5  # system, user, call, result, answer: the tool's is text


@pytest.mark.parametrize("share", [False, True], ids=["padded", "prefixes shared"])
def test_sampled_tokens_have_the_log_probabilities_of_the_row_read_alone(
    folders: Folders, share: bool
):
    models = ppo_fixtures.build_models(folders.world.sft, [], lora=False, share=share)
    ppo_fixtures.make_ends_likely(models)
    config = ppo_fixtures.ppo_config(
        environment=f"{__name__}:Echo", rewards=[], max_new_tokens=24, max_turns=3, temperature=1.0
    )
    playing = build_player(config, build_sampler(config, models), models)
    assert playing is not None
    assert playing.limit == tiny_models.POSITIONS
    rows = tiny_models.rows(folders.world.data, "prompts-train")[:3]
    completions = playing.play([r for r in rows for _ in range(3)], Draw(1, range(9))).completions
    assert {len(turns) for turns in completions.turns} >= {1, 2}
    experience = compute_experience(models, completions, batch_size=4)
    assert experience.mask.sum(1).tolist() == completions.lengths
    plain = models.policy.model
    for k, tokens in enumerate(completions.rows):
        everything = ppo_fixtures.distribution(plain, tokens, 1.0)
        start = len(completions.prompts[k])
        places = [start + p for turn in completions.turns[k] for p in range(turn.start, turn.stop)]
        expected = torch.stack([everything[p - 1, tokens[p]] for p in places])
        assert_close(experience.logps[k][experience.mask[k]].double(), expected, rtol=0, atol=1e-5)


def test_an_episode_of_one_turn_is_a_completion():
    completions = Completions([[1]], [[5, 6]], [True])
    episode = Completions([[1]], [[5, 6]], [True], None, [Episode((slice(0, 2),), 0.0, True)])
    for name, tensor in completions.tensors(0, "cpu").items():
        assert torch.equal(tensor, episode.tensors(0, "cpu")[name])
    assert completions.lengths == episode.lengths == [2]


def grpo(folders: Folders, folder: Path, **settings: Any) -> Any:
    """A run of GRPO with an environment that answers in several turns."""
    keys = {"environment": ppo_fixtures.__name__ + ":Echo", "max_turns": 2, "rewards": []}
    keys |= {"kind": "grpo", "n_completions": 4, "steps": 3, "save_steps": 1, "eval_steps": 3}
    keys |= {"eval_split": "test", "n_eval_prompts": 2, "temperature": 1.0, "kl_coef": 0.04}
    return ppo_fixtures.build_trainer(folders, folder, **keys | settings)


@pytest.mark.slow
@pytest.mark.parametrize("rewards", [[], [ppo_fixtures.FIVE]], ids=["environment", "and a reward"])
def test_a_resumed_run_with_an_environment_is_the_uninterrupted_one(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewards: list[str]
):
    whole = grpo(folders, tmp_path / "whole", rewards=rewards)
    before = ppo_fixtures.flat_weights(whole)
    whole.train()
    assert not torch.equal(ppo_fixtures.flat_weights(whole), before)
    killed = grpo(folders, tmp_path / "killed", rewards=rewards)
    step = killed.step

    def stop(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        step(number)

    monkeypatch.setattr(killed, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = grpo(folders, tmp_path / "killed", rewards=rewards)
    resumed.train()
    assert torch.equal(ppo_fixtures.flat_weights(resumed), ppo_fixtures.flat_weights(whole))
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "killed")]
    assert samples[0] == samples[1]
    sample = [json.loads(line) for line in samples[0].splitlines()][-1]
    assert "rewards/helpers.ppo_fixtures:Echo" in sample
    assert {turn["role"] for turn in sample["prompt"]} <= {"user", "assistant"}
    assert 1 <= whole.metrics["turns"] <= 2
    assert whole.held_out_metrics["eval_ended"] == 0.0
    total = whole.metrics["rewards/helpers.ppo_fixtures:Echo"] + 5.0 * len(rewards)
    assert whole.metrics["reward"] == pytest.approx(total)


def test_a_constant_divisor_counts_all_turns_of_an_episode():
    common = {"model": "m", "steps": 1, "batch_size": 8, "max_new_tokens": 10}
    common |= {"aggregate": "constant"}
    settings = common | {"environment": "arithmetic", "max_turns": 3}
    whole, cut = GRPO(**settings), GRPO(**settings, max_episode_tokens=25)
    one_turn = GRPO(**common, rewards=["r"])
    configs = (whole, cut, one_turn)
    longest = [build_objective(each, 8, kl_coef=0.0).longest for each in configs]
    assert longest == [30, 25, 10]
    # It is part of the digest where earlier versions divided by `max_new_tokens`
    digests = [each.digest_settings()["aggregate"] for each in configs]
    assert digests == [["constant", 30], ["constant", 25], "constant"]
