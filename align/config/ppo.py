"""Configuration of ``ppo``: PPO, RLOO and REINFORCE on language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import (
    FUNCTION,
    GoldPrompts,
    HeldOut,
    Input,
    Keys,
    Problem,
    Table,
    Workload,
    duplicates,
)
from align.config.training_base import TrainingStage

CRITIC_KEYS = ("gae_lambda", "value_clip", "value_coef", "critic_learning_rate")


class PPO(TrainingStage):
    """Policy optimization against a reward, with a KL penalty towards the reference.

    Source: Ziegler et al. 2019, arXiv:1909.08593.
    """

    code_version: ClassVar[int] = 2
    inputs: ClassVar = {
        "model": Input(policies=True, models=True),
        "prompts": Input(("prepare",)),
        "rewards": Input(("reward",), models=True, functions=True),
    }
    reads: ClassVar = (Table("prompts", "prompts"),)
    metrics_class: ClassVar[str | None] = "align.online_rl.results:PPOMetrics"

    model: str
    """The initial policy and the reference: an earlier stage, a folder, a GGUF file or a Hub id."""
    prompts: str = "prepare"
    """The prompts to sample completions for: an earlier ``prepare`` stage, or its folder."""
    rewards: list[str] = Field(min_length=1)
    """Sources of the score: ``reward`` stages, folders, Hub ids, or Python functions, written
    ``module:function``."""
    weights: list[float] | None = None
    """Weights of the rewards in the sum, in their order. Default: 1 each."""
    judge: Literal["gold"] | None = None
    """Score that is logged beside the reward and not trained on: ``gold`` is the exact score of the
    embedded task."""

    steps: int = Field(ge=1)
    """Number of updates; each samples new completions."""
    batch_size: int = Field(ge=1)
    """Completions per update, on all processes together."""
    n_completions: int = Field(1, ge=1)
    """Completions per prompt."""
    temperature: float = Field(1.0, gt=0.0)
    """Sampling temperature. The log-probabilities of policy and reference are computed at the same
    temperature, over the whole vocabulary that is sampled from."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest completion in tokens."""
    missing_eos_penalty: float | None = Field(None, ge=0.0)
    """Subtracted from the score of a completion without an end-of-sequence token."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """Engine that samples completions; ``vllm`` is a server at ``vllm_url``."""
    vllm_url: str = "http://localhost:8000"
    """Address of the vLLM server."""
    importance_cap: float = Field(2.0, gt=0.0)
    """Upper bound on the importance weights policy / sampler, where another engine samples."""

    advantages: Literal["gae", "rloo", "reinforce"] = "gae"
    """Estimator of the advantages: ``gae`` trains a critic, ``rloo`` compares the completions of a
    prompt, ``reinforce`` normalizes over the batch."""
    gamma: float = Field(1.0, ge=0.0, le=1.0)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0.0, le=1.0)
    """Lambda of generalized advantage estimation."""
    normalize_advantages: bool = True
    """Normalize advantages to mean 0 and variance 1 in each update."""
    normalize_rewards: bool = False
    """Scale rewards to variance 1 in each update; their mean is unchanged."""
    kl_coef: float = Field(0.05, ge=0.0)
    """Coefficient of the KL penalty towards the reference."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL penalty is: in the ``reward`` of each token, as the log-ratio (``k1``), or a
    term of the ``loss``, from the low-variance ``k3``, which normalization of advantages and
    rewards does not scale."""
    kl_target: float | None = Field(None, gt=0.0)
    """KL divergence, in nats per completion, that ``kl_coef`` is adapted to. Default: ``kl_coef``
    is constant."""
    kl_horizon: int = Field(10_000, ge=1)
    """Completions in which ``kl_coef`` changes by at most 20 %."""

    learning_rate: float = Field(1e-5, gt=0.0)
    """Learning rate of the policy."""
    critic_learning_rate: float | None = Field(None, gt=0.0)
    """Learning rate of the critic. Default: that of the policy."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Schedule of the learning rates after warm-up; ``linear`` and ``cosine`` decay to 0."""
    warmup_steps: int = Field(0, ge=0)
    """Updates in which the learning rates rise from 0."""
    critic_warmup_steps: int = Field(0, ge=0)
    """Updates at the start in which only the critic is trained."""
    epochs: int = Field(4, ge=1)
    """Passes over the completions of an update."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    micro_batch_size: int = Field(16, ge=1)
    """Completions per forward pass on each process. Smaller values save memory and do not change
    the result."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Tokens per forward pass on each process, in place of ``micro_batch_size``: distinct ones with
    ``prefix_sharing``, otherwise those of the padded batch. The result does not change. A longer
    completion forms a batch alone."""
    sample_batch_size: int = Field(64, ge=1)
    """Completions sampled at once on each process."""
    clip: float = Field(0.2, gt=0.0)
    """Clipping range of the probability ratio."""
    clip_high: float | None = Field(None, gt=0.0)
    """Clipping range above 1. Default: ``clip``."""
    dual_clip: float | None = Field(None, gt=1.0)
    """Upper bound on the loss ratio for negative advantages. Default: none."""
    value_clip: float | None = Field(0.2, gt=0.0)
    """Clipping range of the values around those at sampling; null: none."""
    value_coef: float = Field(0.1, ge=0.0)
    """Weight of the critic's loss."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Weight of the entropy bonus."""
    max_grad_norm: float = Field(1.0, gt=0.0)
    """Gradients with a larger norm are scaled down to it."""
    target_kl: float | None = Field(None, gt=0.0)
    """KL divergence from the policy at sampling, per token, at which an update stops early.
    Default: none."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """Optimizer; ``paged_adamw_8bit`` of bitsandbytes stores the moments of large weights in 8
    bits, and moves them to the memory of the CPU where that of a GPU is full."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    mixed_precision: Literal["bfloat16"] | None = None
    """Data type of the layers' matrix products, and of the logits in sampling; weights,
    log-probabilities and values stay in float32. Default: the type of the weights, ``dtype``."""

    eval_steps: int | None = Field(None, ge=1)
    """Updates between evaluations on held-out prompts. Default: no evaluation."""
    eval_split: Literal["test", "validation"] = "validation"
    """Split of the held-out prompts."""
    n_eval_prompts: int = Field(128, ge=1)
    """Number of held-out prompts."""
    save_steps: int | None = Field(None, ge=1)
    """Updates between checkpoints. Default: ten checkpoints in all."""

    @model_validator(mode="after")
    def _check_keys_without_effect(self) -> PPO:
        ignored: dict[str, str] = {}  # key → the setting that disables it
        if self.advantages != "gae":
            ignored |= dict.fromkeys(CRITIC_KEYS, f"with `advantages: {self.advantages}`")
        if self.advantages == "rloo":
            ignored["gamma"] = "with `advantages: rloo`"
        if self.sampler != "vllm":
            ignored["vllm_url"] = "without `sampler: vllm`"
        if self.kl_target is None:
            ignored["kl_horizon"] = "without `kl_target`"
        if self.kl_coef == 0:
            ignored["kl_placement"] = "with `kl_coef: 0`"
        if self.eval_steps is None:
            ignored |= dict.fromkeys(("eval_split", "n_eval_prompts"), "without `eval_steps`")
        for key, condition in ignored.items():
            if key in self.model_fields_set:
                raise ValueError(f"`{key}` has no effect {condition}; remove it")
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> PPO:
        repeated = duplicates(self.rewards)
        if repeated:
            raise ValueError(
                f"`rewards` contains {repeated[0]!r} more than once; list it once, with a weight"
            )
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"`weights` must have one entry for each of `rewards` ({len(self.rewards)}), "
                f"got {len(self.weights)}"
            )
        return self

    @model_validator(mode="after")
    def _check_kl(self) -> PPO:
        if self.kl_target is None:
            return self
        if self.kl_coef == 0:
            raise ValueError("`kl_target` adapts `kl_coef`, which must therefore be greater than 0")
        if self.batch_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"`kl_horizon` ({self.kl_horizon}) must be more than a fifth of `batch_size` "
                f"({self.batch_size}), or one step could change the sign of `kl_coef`"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_sizes(self) -> PPO:
        if self.batch_size % self.n_completions:
            raise ValueError(
                f"`batch_size` ({self.batch_size}) must be a multiple of `n_completions` "
                f"({self.n_completions}), because all completions of a "
                "prompt are in the same update"
            )
        if self.tokens_per_batch and "micro_batch_size" in self.model_fields_set:
            raise ValueError(
                "`micro_batch_size` and `tokens_per_batch` both set the size of a forward pass; "
                "remove one of them"
            )
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"`minibatches` ({self.minibatches}) must not exceed `batch_size` "
                f"({self.batch_size})"
            )
        if self.advantages == "rloo" and self.n_completions < 2:
            raise ValueError(
                "`advantages: rloo` compares the completions of a prompt; set `n_completions` "
                "to at least 2"
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> PPO:
        if self.advantages != "gae" and self.critic_warmup_steps:
            raise ValueError(
                f"`critic_warmup_steps` has no effect with `advantages: {self.advantages}`, "
                "which has no critic; remove it"
            )
        longest = max(self.critic_warmup_steps, self.warmup_steps)
        if longest >= self.steps:
            raise ValueError(
                f"`warmup_steps` and `critic_warmup_steps` must be less than `steps` "
                f"({self.steps}), got {longest}"
            )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> PPO:
        if self.quantization and self.sampler == "vllm":
            raise ValueError(
                "`sampler: vllm` needs unquantized weights; remove `quantization` or `sampler`"
            )
        return self

    def digest_settings(self) -> dict[str, Any]:
        """All settings but those that cannot change the trained model."""
        settings = super().digest_settings() | {"quantization": self.quantization}
        del settings["vllm_url"]
        for key in ("mixed_precision", "tokens_per_batch"):
            if settings[key] is None:  # as in recipes from before the key existed
                del settings[key]
        if self.optimizer == "adamw":
            del settings["optimizer"]  # the only one before the key existed
        if not self.keep_checkpoints:
            del settings["save_steps"]
        return settings

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
    def reward_functions(self) -> dict[Keys, str]:
        """The rewards that are Python functions."""
        return {("rewards", k): name for k, name in enumerate(self.rewards) if FUNCTION.match(name)}

    @property
    def servers(self) -> dict[str, str]:
        """The vLLM server, if it samples."""
        return {"vllm_url": self.vllm_url} if self.sampler == "vllm" else {}

    @property
    def gold_prompts(self) -> GoldPrompts | None:
        """The training prompts, if the gold score is logged."""
        return GoldPrompts("prompts", "train", "remove `judge`") if self.judge else None

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
        """Completions that are sampled, and optimizer steps."""
        return Workload(
            rows=self.steps * self.batch_size, steps=self.steps * self.epochs * self.minibatches
        )

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
        return 1 + (self.advantages == "gae")

    def frozen_models(self, *, sharded: bool) -> int:
        """The reference and the reward models, as if those had the size of the policy.

        With ``lora`` all of them share one backbone; reward models with another one do not count.
        """
        return 1 + len(self.rewards) - len(self.reward_functions)
