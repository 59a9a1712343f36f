"""Configuration that all online-RL stages share: what they read, check and declare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from align.config.base import (
    GoldPrompts,
    HeldOut,
    Input,
    Keys,
    Problem,
    Stage,
    Table,
    Workload,
    between_keys,
)
from align.config.functions import BUILT_IN, ScoreFunction, as_function
from align.config.memory import ModelSize
from align.config.memory_bill import Work
from align.config.online_rl_keys import (
    ENVIRONMENTS,
    EnvironmentKeys,
    HeldOutKeys,
    KLKeys,
    LossKeys,
    MemoryKeys,
    RewardKeys,
    SamplingKeys,
    StepKeys,
)
from align.config.reporting import ReportingStage
from align.config.training_base import TOKENS_PER_WORD, TrainingStage
from align.config.vllm import VLLMStage


class OnlineRL(
    RewardKeys,
    EnvironmentKeys,
    SamplingKeys,
    KLKeys,
    LossKeys,
    StepKeys,
    MemoryKeys,
    HeldOutKeys,
    ReportingStage,
    VLLMStage,
    TrainingStage,
):
    """Training of a policy on completions that it samples, towards a reward.

    The kinds of stages are its subclasses, one for each estimator of the advantages. They run the
    same trainer and differ in their defaults, and in the keys of the estimator.
    """

    code_version: ClassVar[int] = 2
    inputs: ClassVar = {
        "model": Input(policies=True, models=True),
        "prompts": Input(("prepare",)),
        "rewards": Input(("reward",), models=True, functions=True, words=BUILT_IN),
        "stop": Input(("reward",), models=True, words=("gold",), field="judge"),
    }
    reads: ClassVar = (Table("prompts", "prompts"),)
    metrics_class: ClassVar[str | None] = "align.online_rl.results:OnlineRLMetrics"
    later_keys: ClassVar = {
        "mixed_precision": None,
        "tokens_per_batch": None,
        "optimizer": "adamw",
        "loss": "clip",
        "aggregate": "token",
        "overlong_buffer": None,
        "overlong_penalty": 1.0,
        "normalize_scores": "none",
        "stop": None,
        "environment": None,
        "max_turns": 8,
        "max_episode_tokens": None,
        "max_staleness": 0,
    }
    has_critic: ClassVar[bool] = False
    """Whether the estimator of the advantages trains a critic."""
    least_completions: ClassVar[int] = 1
    """Completions per prompt that the estimator needs."""

    model: str
    """The initial policy and the reference: an earlier stage, a folder, a GGUF file or a Hub id."""
    prompts: str = "prepare"
    """The prompts to sample completions for: an earlier ``prepare`` stage, or its folder."""

    @between_keys
    def _check_keys_without_effect(self) -> Iterator[str]:
        ignored: dict[str, str] = {}  # key → the setting that disables it
        if self.overlong_buffer is None:
            ignored["overlong_penalty"] = "without `overlong_buffer`"
        if self.kl_target is None:
            ignored["kl_horizon"] = "without `kl_target`"
        if self.kl_coef == 0:
            ignored["kl_placement"] = "with `kl_coef: 0`"
        if self.eval_steps is None:
            ignored |= dict.fromkeys(("eval_split", "n_eval_prompts"), "without `eval_steps`")
        for key, condition in ignored.items():
            if key in self.model_fields_set:
                yield f"`{key}` has no effect {condition}; remove it"

    @between_keys
    def _check_sources_of_rewards(self) -> Iterator[str]:
        if not self.rewards and self.environment is None:
            yield "set `rewards`, or an `environment`, which rewards the policy as well"
        if self.environment is not None:
            if self.environment in self.reward_names:
                yield (
                    f"`rewards` contains {self.environment!r}, the name of the rewards of the "
                    "`environment`; remove it, or give it another `name`"
                )
            for key in ("judge", "sampler"):
                if getattr(self, key) in ("gold", "vllm"):
                    yield (
                        f"`{key}: {getattr(self, key)}` works on completions of one turn; remove "
                        f"it, or remove `environment`"
                    )
            for key in ("overlong_buffer", "stop"):
                if getattr(self, key) is not None:
                    yield (
                        f"`{key}` measures completions of one turn; remove it, or remove "
                        "`environment`"
                    )

    @between_keys
    def _check_kl(self) -> Iterator[str]:
        if self.kl_target is None:
            return
        if self.kl_coef == 0:
            yield "`kl_target` adapts `kl_coef`, which must therefore be greater than 0"
        if self.batch_size >= 5 * self.kl_horizon:
            yield (
                f"`kl_horizon` ({self.kl_horizon}) must be more than a fifth of `batch_size` "
                f"({self.batch_size}), or one step could change the sign of `kl_coef`"
            )

    @between_keys
    def _check_stop(self) -> Iterator[str]:
        if self.stop and self.eval_steps is None:
            yield "`stop` compares policies in evaluations; set `eval_steps`"
        if self.stop and self.eval_split == "test":
            yield (
                "`stop` chooses the policy by `eval_split`, so a later evaluation on the test "
                "split would be no independent evidence; set `eval_split: validation`"
            )

    @between_keys
    def _check_batch_sizes(self) -> Iterator[str]:
        if self.batch_size % self.n_completions:
            yield (
                f"`batch_size` ({self.batch_size}) must be a multiple of `n_completions` "
                f"({self.n_completions}), because all completions of a "
                "prompt are in the same update"
            )
        if self.tokens_per_batch and "micro_batch_size" in self.model_fields_set:
            yield (
                "`micro_batch_size` and `tokens_per_batch` both set the size of a forward pass; "
                "remove one of them"
            )
        if self.overlong_buffer is not None and self.overlong_buffer > self.max_new_tokens:
            yield (
                f"`overlong_buffer` ({self.overlong_buffer}) must not exceed `max_new_tokens` "
                f"({self.max_new_tokens})"
            )
        if self.minibatches > self.batch_size:
            yield (
                f"`minibatches` ({self.minibatches}) must not exceed `batch_size` "
                f"({self.batch_size})"
            )
        if self.normalize_scores == "group" and self.n_completions < 2:
            yield (
                "`normalize_scores: group` compares the completions of a prompt; set "
                "`n_completions` to at least 2, or use `batch`"
            )
        if self.n_completions < self.least_completions:
            yield (
                "the advantages compare the completions of a prompt; set `n_completions` to at "
                f"least {self.least_completions}"
            )

    @between_keys
    def _check_warmup(self) -> Iterator[str]:
        longest = max(self.steps_without_policy, self.warmup_steps)
        if longest >= self.steps:
            keys = "`warmup_steps`"
            keys += " and `critic_warmup_steps`" * self.has_critic
            yield f"{keys} must be less than `steps` ({self.steps}), got {longest}"

    def digest_settings(self) -> dict[str, Any]:
        """All settings but those that cannot change the trained model."""
        settings = super().digest_settings() | {"quantization": self.quantization}
        settings["rewards"] = [
            reward.digest_settings() if isinstance(reward, ScoreFunction) else setting
            for reward, setting in zip(self.rewards, settings["rewards"], strict=True)
        ]
        if not self.keep_checkpoints:
            del settings["save_steps"]
        if self.aggregate == "constant" and self.environment is not None:
            settings["aggregate"] = ["constant", self.most_sampled_tokens]  # was max_new_tokens
        if self.stop is not None:
            is_input = "stop.judge" in self.input_names()
            settings["stop"] = self.stop.digest_settings(judge_is_input=is_input)
            settings["stop"]["metrics"] = "saved"  # those of the last policy in earlier versions
        return settings

    @property
    def most_sampled_tokens(self) -> int:
        """Most tokens that the policy can sample for a prompt, in all turns of an episode."""
        if self.environment is None:
            return self.max_new_tokens
        tokens = self.max_turns * self.max_new_tokens
        return tokens if self.max_episode_tokens is None else min(tokens, self.max_episode_tokens)

    def required_tables(self) -> tuple[Table, ...]:
        """The training prompts, and those to evaluate on."""
        if self.eval_steps is None:
            return self.reads
        return (
            *self.reads,
            Table("prompts", "prompts", self.eval_split, requested_by="eval_split"),
        )

    def held_out(self) -> Iterator[HeldOut]:
        """The split to evaluate on, if the stage evaluates."""
        if self.eval_steps is not None:
            yield HeldOut(("eval_steps",), "prompts", self.eval_split)

    @property
    def trains_without_dropout(self) -> bool:
        """Always: with dropout, the ratio of the policy to itself would not be 1."""
        return True

    @property
    def reward_functions(self) -> dict[Keys, ScoreFunction]:
        """The rewards that are Python functions, and the judge of ``stop`` if it is one."""
        functions = enumerate(map(as_function, self.rewards))
        rewards: dict[Keys, ScoreFunction] = {
            ("rewards", k): function for k, function in functions if function is not None
        }
        return rewards | (self.stop.functions if self.stop else {})

    @property
    def server_judges(self) -> Mapping[Keys, Any]:
        """The judge of ``stop``, if it is behind an API."""
        return self.stop.server if self.stop else {}

    def named_paths(self) -> dict[str, str]:
        """Files that the judge of ``stop`` reads."""
        return self.stop.files if self.stop else {}

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Rewards with two meanings, and files of the judge of ``stop`` that do not exist."""
        yield from super().problems(stages)
        for k, name in enumerate(self.rewards):
            if name in BUILT_IN and name in stages:
                yield Problem(
                    ("rewards", k), f"`{name}` is a built-in function and a stage; rename the stage"
                )
        yield from self.stop.problems() if self.stop else ()

    @property
    def environments(self) -> dict[Keys, str]:
        """The class of the environment, if there is one."""
        name = self.environment
        return {} if name is None else {("environment",): ENVIRONMENTS.get(name, name)}

    @property
    def gold_prompts(self) -> GoldPrompts | None:
        """The training prompts, if the gold score is logged; the held-out ones, if it decides."""
        if self.judge:
            return GoldPrompts("prompts", "train", "remove `judge`")
        if self.stop and self.stop.judge == "gold":
            repair = "name another `judge` in `stop`"
            return GoldPrompts("prompts", self.eval_split, repair, ("stop", "judge"))
        return None

    def batch_size_problems(self, world_size: int) -> Iterator[Problem]:
        """Prompts or minibatches that cannot be divided over the processes."""
        prompts = self.batch_size // self.n_completions
        if prompts % world_size:
            yield Problem(
                ("batch_size",),
                f"{prompts} prompts (`batch_size` {self.batch_size} / `n_completions` "
                f"{self.n_completions}) cannot be divided over {world_size} processes; "
                f"use a multiple of {world_size * self.n_completions}",
            )
        elif self.minibatches > self.batch_size // world_size:
            yield Problem(
                ("minibatches",),
                f"`minibatches` ({self.minibatches}) must not exceed the "
                f"{self.batch_size // world_size} completions of a process; lower it, "
                "or raise `batch_size`",
            )

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """Completions that are sampled, optimizer steps, and pairs that the stop rule compares."""
        return Workload(
            rows=self.steps * self.batch_size,
            steps=self.steps * self.epochs * self.minibatches,
            pairs=self.evaluations * self.n_eval_prompts if self.stop else None,
        )

    def forward_work(
        self, size: ModelSize, statistics: Mapping[str, Any], world_size: int
    ) -> Work | None:
        """A micro-batch of completions of the largest length after the longest prompt.

        None if the length of prompts is unknown.
        """
        longest = statistics.get("longest_prompts", {})
        if "train" not in longest:
            return None
        words = max(longest["train"], longest.get(self.eval_split, 0) if self.eval_steps else 0)
        row = round(words * TOKENS_PER_WORD) + self.most_sampled_tokens
        row = min(row, size.positions or row)
        half = "bfloat16" in (self.dtype, self.mixed_precision)
        completions = math.ceil(self.batch_size / world_size)  # those of a process
        minibatch = math.ceil(completions / self.minibatches)
        rows = math.ceil(minibatch / math.ceil(minibatch / self.micro_batch_size))
        if self.eval_steps:
            completions = max(completions, math.ceil(self.n_eval_prompts / world_size))
        own = self.sampler == "transformers"
        return Work(
            min(max(self.tokens_per_batch or rows * row, row), minibatch * row),
            checkpointing=self.gradient_checkpointing,
            accumulates=True,
            activation_bytes=2 if half else 4,
            sampled=(min(self.sample_batch_size, completions) if own else 0, row),
            reserved=self.vllm_gpu_memory_utilization if self.colocates else 0.0,
            copied=4 * size.adapted_parameters(self.lora)
            if self.merge_adapter and self.lora
            else 0,
        )

    @property
    def evaluations(self) -> int:
        """Evaluations on held-out prompts after the first update, if the run is not stopped."""
        return math.ceil(self.steps / self.eval_steps) if self.eval_steps else 0

    @property
    def optimizer_name(self) -> str:
        """The value of ``optimizer``."""
        return self.optimizer

    @property
    def required_packages(self) -> dict[str, tuple[str, str]]:
        """bitsandbytes, if a model or the optimizer is quantized."""
        eight_bits = {"optimizer": ("bitsandbytes", "-e '.[quantization]'")}
        return super().required_packages | (eight_bits if self.optimizer != "adamw" else {})

    @property
    def trained_models(self) -> int:
        """The policy, and the critic if there is one."""
        return 1 + self.has_critic

    @property
    def steps_without_policy(self) -> int:
        """Updates at the start in which the policy is not trained."""
        return 0

    def frozen_models(self, workload: Workload, *, sharded: bool) -> int:
        """The reference and the reward models, as if those had the size of the policy.

        With ``lora`` all of them share one backbone; reward models with another one do not count.
        """
        return 1 + len(self.rewards) - len(self.score_functions)
