"""config.ppo"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import POLICY_STAGES, Input
from align.config.training import TrainingStage


class PPO(TrainingStage):
    """Policy optimisation against a reward, held to a reference by a KL penalty (Ziegler et al. 2019, arXiv:1909.08593)."""

    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "prompts": Input(("prepare",)),
        "rewards": Input(("reward",), models=True, functions=True),
    }

    model: str
    """An earlier stage, a folder or a Hub id: the policy at the start, and the reference."""
    prompts: str = "prepare"
    rewards: list[str] = Field(min_length=1)
    """Where scores come from: ``reward`` stages, folders, Hub ids, or functions written ``module:function``."""
    weights: list[float] | None = None
    """Of the rewards, in their order; without it, 1 each."""
    judge: Literal["gold"] | None = None
    """``gold``: the embedded task's own score is logged beside the reward. It teaches nothing."""

    steps: int = Field(ge=1)
    """Updates; each samples anew."""
    batch_size: int = Field(ge=1)
    """Completions an update, of all processes together."""
    n_completions: int = Field(1, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, gt=0.0)
    """Of the policy and of the reference, wherever they speak."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Below 1 the policy is sampled from without its tail, and its log-probabilities are those with it."""
    max_new_tokens: int = Field(256, ge=1)
    missing_eos_penalty: float | None = Field(None, ge=0.0)
    """Taken off the score of a completion that does not end by itself."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """What draws completions; ``vllm`` is a server, at ``vllm_url``."""
    vllm_url: str = "http://localhost:8000"
    importance_cap: float = Field(2.0, gt=0.0)
    """Of the weights policy / sampler, where another engine samples."""

    advantages: Literal["gae", "rloo", "reinforce"] = "gae"
    """``gae`` has a critic; ``rloo`` compares completions of one prompt, ``reinforce`` (whitened) those of a batch."""
    gamma: float = Field(1.0, ge=0.0, le=1.0)
    lam: float = Field(0.95, ge=0.0, le=1.0)
    """Of generalised advantage estimation."""
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    """Scale rewards to variance 1; their mean stays."""
    kl_coef: float = Field(0.05, ge=0.0)
    """How much the policy is held to the reference."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0.0)
    """Nats a completion; with it ``kl_coef`` is adapted, without it fixed."""
    kl_horizon: int = Field(10_000, ge=1)
    """Completions in which ``kl_coef`` changes by 20 % at most."""

    learning_rate: float = Field(1e-5, gt=0.0)
    critic_learning_rate: float | None = Field(None, gt=0.0)
    """Without it, that of the policy."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    """Updates in which the learning rates rise from 0."""
    critic_warmup_steps: int = Field(0, ge=0)
    """Updates at the start in which the critic learns alone."""
    epochs: int = Field(4, ge=1)
    """Passes over what was sampled."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps in a pass."""
    micro_batch_size: int = Field(16, ge=1)
    """Completions that pass through the models at once, on each process. It saves memory and changes no result."""
    sample_batch_size: int = Field(64, ge=1)
    """Completions that are sampled at once, on each process."""
    clip: float = Field(0.2, gt=0.0)
    clip_high: float | None = Field(None, gt=0.0)
    """The upper bound, where it differs."""
    dual_clip: float | None = Field(None, gt=1.0)
    value_clip: float | None = Field(0.2, gt=0.0)
    value_coef: float = Field(0.1, ge=0.0)
    entropy_coef: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    target_kl: float | None = Field(None, gt=0.0)
    """KL(old, new) a token at which an update stops early."""
    gradient_checkpointing: bool = False
    quantization: Literal["nf4"] | None = None
    """Hold the frozen backbone in 4 bits (needs ``lora``)."""

    eval_steps: int | None = Field(None, ge=1)
    """Every so many updates, sample on held-out prompts."""
    eval_split: Literal["test", "validation"] = "validation"
    n_eval_prompts: int = Field(128, ge=1)
    save_steps: int | None = Field(None, ge=1)
    """A checkpoint every so many updates; without it, ten in all."""

    def _says_nothing_in_vain(self) -> None:
        """Refuse keys that the others make meaningless."""
        critic = ("lam", "value_clip", "value_coef", "critic_learning_rate")
        vain: list[tuple[tuple[str, ...], str]] = []
        if self.advantages != "gae":
            vain.append((critic, f"to `advantages: {self.advantages}`"))
        if self.advantages == "rloo":
            vain.append((("gamma",), "to `advantages: rloo`"))
        if self.sampler != "vllm":
            vain.append((("vllm_url",), "without `sampler: vllm`"))
        if self.kl_target is None:
            vain.append((("kl_horizon",), "without `kl_target`"))
        if self.eval_steps is None:
            vain.append((("eval_split", "n_eval_prompts"), "without `eval_steps`"))
        for keys, why in vain:
            for key in keys:
                if key in self.model_fields_set:
                    raise ValueError(f"`{key}` means nothing {why}: remove it")

    @model_validator(mode="after")
    def _fits_together(self) -> PPO:
        self._says_nothing_in_vain()
        if max(self.critic_warmup_steps, self.warmup_steps) >= self.steps:
            raise ValueError(
                f"a warm-up of {max(self.critic_warmup_steps, self.warmup_steps)} steps, and `steps` are {self.steps}: "
                "nothing is left; shorten it"
            )
        if len(set(self.rewards)) < len(self.rewards):
            raise ValueError("a reward stands twice in `rewards`; name each once, with a weight")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("`kl_target` multiplies `kl_coef`, and 0 stays 0: set it above 0")
        if self.kl_target is not None and self.batch_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"`kl_horizon` {self.kl_horizon} is below a fifth of `batch_size` {self.batch_size}, so one step could turn "
                "the coefficient's sign: raise it"
            )
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"`weights` has {len(self.weights)} entries and `rewards` {len(self.rewards)}; give one for each"
            )
        if self.batch_size % self.n_completions:
            raise ValueError(
                f"`batch_size` {self.batch_size} is no multiple of `n_completions` {self.n_completions}: a prompt's "
                "completions are of one update; change one of them"
            )
        if self.advantages == "rloo" and self.n_completions < 2:
            raise ValueError(
                "`rloo` compares the completions of a prompt: set `n_completions` to 2 or more"
            )
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"`minibatches: {self.minibatches}` of a batch of {self.batch_size}: one has a completion at least; lower it"
            )
        if self.advantages != "gae" and self.critic_warmup_steps:
            raise ValueError(
                f"`{self.advantages}` has no critic: remove `critic_warmup_steps`, or set `advantages: gae`"
            )
        if self.quantization and self.sampler == "vllm":
            raise ValueError(
                "`sampler: vllm` needs whole weights, and `quantization` holds none: remove one"
            )
        if self.dtype == "bfloat16" and not self.lora:
            raise ValueError(
                "`dtype: bfloat16` trained in full rounds small updates away (8 bits of precision): keep float32, or set "
                "`lora`, whose adapters stay in float32"
            )
        if self.quantization and not self.lora:
            raise ValueError("`quantization` freezes the backbone: set `lora`, or remove it")
        return self
