"""Scores of completions: the weighted sum of all rewards, minus a penalty without eos.

A reward is a reward model or a Python function; both have one method, ``score(completions, texts,
rows)``. Reward models are loaded in :mod:`align.online_rl.build`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from align.config.functions import ScoreFunction
from align.config.online_rl import OnlineRL
from align.data.rows import Row
from align.errors import UserError
from align.functional.masked import masked_whiten
from align.functional.token_rewards import group_relative, overlong_share
from align.functional.variance_shares import variance_shares
from align.models import tokenization
from align.online_rl.completions import Completions
from align.online_rl.models import OnlineRLModels
from align.rewards import gold
from align.rewards.functions import Score, call, load_function
from align.rewards.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of completions, on the CPU. Every tensor has one entry per completion."""

    texts: list[str]
    rewards: dict[str, Tensor]
    """Score of each reward, by its name in the recipe, before weighting."""
    reward: Tensor
    """Weighted sum of the rewards."""
    score: Tensor
    """``reward`` minus the penalties of completions that are too long or without eos.

    The policy is trained on this.
    """
    gold: Tensor | None
    """Exact score of the embedded task. It is logged and never trained on."""
    variance_shares: Mapping[str, float] = field(default_factory=dict)
    """Share of each of several rewards in the variance of their sum; NaN if it does not vary."""

    def columns(self) -> dict[str, Tensor]:
        """All scores by metric key."""
        columns = {f"rewards/{name}": scores for name, scores in self.rewards.items()}
        columns |= {"reward": self.reward, "score": self.score}
        return columns if self.gold is None else columns | {"gold": self.gold}


class RewardSource(Protocol):
    """Gives every completion a number."""

    def score(self, completions: Completions, texts: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """One score per completion, on the CPU. ``rows`` are the prompts' rows in the data."""
        ...


@dataclass(frozen=True, slots=True)
class ModelReward:
    """A reward model."""

    model: RewardModel
    batch_size: int
    end: int
    """The token in which the chat template ends a completion."""

    def score(self, completions: Completions, texts: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """Scores of the sampled tokens, or of the texts if the model has another tokenizer."""
        if self.model.tokenizer is None:
            # A policy may stop at another end token, which the reward model has never read.
            tokens = [
                [*ids[:-1], self.end] if finished else ids
                for ids, finished in zip(completions.rows, completions.finished, strict=True)
            ]
            return self.model.score_tokens(tokens, batch_size=self.batch_size)
        turns = [tokenization.assistant_turn(text) for text in texts]
        prompts = [row["prompt"] for row in rows]
        return self.model.score(prompts, turns, batch_size=self.batch_size)


@dataclass(frozen=True, slots=True)
class FunctionReward:
    """A Python function of prompts, completion texts and columns of the prompts' rows."""

    config: ScoreFunction
    function: Score

    def score(self, completions: Completions, texts: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """Scores of the texts."""
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        messages = [row["prompt"] for row in rows]
        return torch.tensor(call(self.config, self.function, messages, texts, columns))


@dataclass(frozen=True, slots=True)
class EnvironmentReward:
    """The rewards of an environment, summed over the turns of each episode."""

    def score(self, completions: Completions, texts: Sequence[str], rows: Sequence[Row]) -> Tensor:
        """The sum of each episode."""
        return torch.tensor([episode.reward for episode in completions.episodes or ()])


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores completions by the rewards of a recipe."""

    rewards: Mapping[str, RewardSource]
    """Rewards by their names in the recipe, in its order."""
    config: OnlineRL
    tokenizer: Any
    device: Any = "cpu"
    """Where sums over ranks are computed."""

    def score(self, completions: Completions, rows: Sequence[Row]) -> Scores:
        """Score completions of the prompts in ``rows``."""
        config = self.config
        texts = completions.texts(self.tokenizer)
        rewards = {name: r.score(completions, texts, rows) for name, r in self.rewards.items()}
        total = torch.zeros(len(texts))
        for (name, scores), weight in zip(rewards.items(), self.weights, strict=True):
            total += weight * scores
            _check_finite(name, total, texts)
        reward = total.clone()
        if config.missing_eos_penalty:
            total -= config.missing_eos_penalty * (~torch.tensor(completions.finished)).float()
        if config.overlong_buffer is not None:
            share = overlong_share(
                torch.tensor([float(len(completion)) for completion in completions.completions]),
                longest=config.max_new_tokens,
                buffer=config.overlong_buffer,
            )
            total -= config.overlong_penalty * share
        gold_scores = _gold_scores(texts, rows) if config.judge == "gold" else None
        return Scores(texts, rewards, reward, total, gold_scores)

    @property
    def weights(self) -> list[float]:
        """The weight of each reward; 1 for those of the environment."""
        weights = self.config.weights or [1.0] * len(self.config.rewards)
        return weights if self.config.environment is None else [*weights, 1.0]

    def for_training(self, scores: Scores) -> Scores:
        """The scores of a batch as the policy is trained on them: normalized as the recipe sets.

        The rewards and their sum are unchanged; penalties are subtracted after normalization.
        """
        rewards = {
            name: self._normalized(values.to(self.device))
            for name, values in scores.rewards.items()
        }
        weighted = zip(rewards.values(), self.weights, strict=True)
        parts = torch.stack([weight * values for values, weight in weighted])
        score = scores.score
        if self.config.normalize_scores != "none":
            score = parts.sum(0).cpu() - (scores.reward - scores.score)
        if len(rewards) == 1:
            return replace(scores, score=score)
        shares = variance_shares(parts, n=self.config.n_completions).tolist()
        return replace(scores, score=score, variance_shares=dict(zip(rewards, shares, strict=True)))

    def _normalized(self, scores: Tensor) -> Tensor:
        """The scores of one reward with mean 0 and variance 1, unless the recipe leaves them."""
        if self.config.normalize_scores == "group":
            return group_relative(scores, n=self.config.n_completions, scale="group")
        if self.config.normalize_scores == "batch":
            return masked_whiten(scores, torch.ones_like(scores, dtype=torch.bool))
        return scores


def _check_finite(name: str, scores: Tensor, texts: Sequence[str]) -> None:
    for text, score in zip(texts, scores.tolist(), strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"rewards: with {name}, the reward of {text!r:.80} is {score}; rewards must be "
                "finite: check the weights of this reward model, and `weights`"
            )


def _gold_scores(texts: Sequence[str], rows: Sequence[Row]) -> Tensor:
    requests = [row["prompt"][-1]["content"] for row in rows]
    return torch.tensor([gold.gold_score(r, t) for r, t in zip(requests, texts, strict=True)])


def load_functions(config: OnlineRL) -> dict[str, Score]:
    """The reward functions of a recipe, by name.

    Raises:
        UserError: A function cannot be imported, or has the wrong signature.
    """
    functions = config.score_functions.items()
    return {name: load_function(function.address) for name, function in functions}


def build_scorer(
    config: OnlineRL, models: OnlineRLModels, functions: Mapping[str, Score]
) -> Scorer:
    """The scorer of a recipe. Its reward models are ``models.rewards``, in the recipe's order."""
    reward_models = iter(models.rewards)
    end = tokenization.end_of_turn(models.tokenizer) if models.rewards else -1
    rewards: dict[str, RewardSource] = {
        name: FunctionReward(config.score_functions[name], functions[name])
        if name in functions
        else ModelReward(next(reward_models), config.sample_batch_size, end)
        for name in config.reward_names
    }
    if config.environment is not None:
        rewards[config.environment] = EnvironmentReward()
    device = "cpu" if models.device.type == "mps" else models.device  # MPS has no float64
    return Scorer(rewards, config, models.tokenizer, device)
