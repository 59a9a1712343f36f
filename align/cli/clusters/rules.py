"""What a stage cannot be written with, for any other trainer, and what has no counterpart.

A key is refused where another trainer would optimize something else. A key that changes memory,
time or what is logged, or that changes rounding, is listed in the written files and on the
terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from align.cli.clusters.job import Job
from align.config.functions import as_function
from align.config.online_rl import OnlineRL
from align.config.online_rl_keys import UNCLIPPED
from align.config.online_rl_stages import GRPO, PPO, RLOO
from align.errors import RecipeError

ADAM_EPS = 1e-5
"""That of :mod:`align.online_rl.optimization`, which is not imported here: it loads torch."""
UNBOUNDED = 1e8
"""A clipping range without an effect, for keys that have no other value for that."""
LARGEST_SCORE = 10**15
"""Rewards are not clipped below this size, as in Align."""

UNUSED = {
    "judge": "it is logged and never trained on",
    "vllm_mode": "the trainer starts its own vLLM",
    "vllm_url": "the trainer starts its own vLLM",
    "vllm_timeout": "the trainer starts its own vLLM",
    "max_staleness": "each update waits for its completions",
    "sampler": "the trainer always samples with vLLM",
    "sample_batch_size": "vLLM forms its own batches",
    "prefix_sharing": "a matter of speed",
    "compile_decoding": "a matter of speed",
    "merge_adapter": "a matter of speed",
    "keep_checkpoints": "checkpoints are kept",
    "report_to": "set the trackers of the trainer",
    "eval_steps": "measure the trained policy with `align eval`",
    "eval_split": "measure the trained policy with `align eval`",
    "n_eval_prompts": "measure the trained policy with `align eval`",
}
"""Keys without a counterpart that do not change what is optimized; they are listed if set."""


@dataclass(slots=True)
class Translation:
    """Settings of another trainer under construction."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Values by the key of the trainer, with dots."""
    notes: dict[str, str] = field(default_factory=dict)
    """Keys of Align without an exact counterpart, with what is different."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Keys of Align that would silently change what is optimized, with the repair."""

    def raise_refused(self, job: Job, program: str) -> None:
        """Raise what was refused, one line per key.

        Raises:
            RecipeError: At least one key was refused.
        """
        if self.refused:
            raise RecipeError(
                *(f"{job.at(key)}: not with {program}: {reason}" for key, reason in self.refused)
            )


def begin(job: Job) -> Translation:
    """A translation with what holds for every other trainer."""
    config = job.config
    translation = Translation(refused=[*_refused(config), *_refused_rewards(config)])
    for key, reason in UNUSED.items():
        if key in config.model_fields_set:
            translation.notes[key] = reason
    for keys, function in config.reward_functions.items():
        if "timeout_seconds" in function.model_fields_set:
            place = ".".join(map(str, keys))
            translation.notes[f"{place}.timeout_seconds"] = "calls have no time limit"
    if config.mixed_precision is None:
        dtype = "bfloat16 adapters" if config.dtype == "bfloat16" else "float32"
        translation.notes["dtype"] = f"computes in bfloat16, where this stage computes in {dtype}"
    translation.notes["seed"] = "other random numbers; the prompts are those of this seed"
    if isinstance(config, GRPO) and config.scale_advantages == "group":
        translation.notes["scale_advantages"] = "adds another number to deviations than 1e-4"
    if isinstance(config, PPO):
        translation.notes["model"] = "the head of the critic starts from other random weights"
    if config.warmup_steps:
        translation.notes["warmup_steps"] = "the first step of the warm-up has the learning rate 0"
    return translation


def _refused(config: OnlineRL) -> Iterator[tuple[str, str]]:
    """Keys that neither trainer can express."""
    if config.quantization is not None:
        yield "quantization", "remove it; the cluster trains on full weights"
    if config.revision is not None:
        yield "revision", "download it with `hf download`, and name the folder in `model`"
    if config.environment is not None:
        yield "environment", "episodes of several turns are not converted"
    if config.loss in UNCLIPPED:
        yield "loss", "set `clip`"
    if config.normalize_scores != "none":
        yield "normalize_scores", "set `none`"
    if config.normalize_rewards:
        yield "normalize_rewards", "set `false`"
    if config.kl_target is not None:
        yield "kl_target", "its KL is per token there, and per completion here; remove it"
    if config.kl_placement == "loss" and config.kl_coef:
        yield (
            "kl_placement",
            "with `loss` a token pays for the KL of later tokens; set `token_loss`, `reward`, or "
            "`kl_coef: 0`",
        )
    if config.target_kl is not None:
        yield "target_kl", "an update does not stop early; remove it"
    if config.stop is not None:
        yield "stop", "the last policy is saved; remove it"
    if getattr(config, "filter", None) is not None:
        yield "filter", "prompts with equal scores are not replaced by the same rule; remove it"
    yield from _refused_advantages(config)


def _refused_advantages(config: OnlineRL) -> Iterator[tuple[str, str]]:
    """Keys of the estimators."""
    whitened = not isinstance(config, GRPO | RLOO)
    if config.normalize_advantages != whitened:
        value = str(whitened).lower()
        yield "normalize_advantages", f"this estimator always has `{value}` there; set it"
    if isinstance(config, GRPO) and config.scale_advantages == "batch":
        yield "scale_advantages", "set `group` or `none`"
    if not isinstance(config, PPO):
        return
    if config.value_coef == 0:
        yield "value_coef", "the critic is always trained; set a value above 0"
    if config.critic_warmup_steps and (config.schedule != "constant" or config.warmup_steps):
        yield (
            "critic_warmup_steps",
            "the schedule of the policy would begin after it; set `schedule: constant` without "
            "`warmup_steps`, or remove it",
        )


def _refused_rewards(config: OnlineRL) -> Iterator[tuple[str, str]]:
    """Rewards that are no functions."""
    for k, reward in enumerate(config.rewards):
        if as_function(reward) is None:
            yield (
                f"rewards.{k}",
                f"`{reward}` is a reward model, which is not converted; use reward functions",
            )


def prompts_per_step(config: OnlineRL) -> int:
    """Prompts of an update."""
    return config.batch_size // config.n_completions


def save_steps(config: OnlineRL) -> int:
    """Updates between checkpoints, by default ten in all."""
    return config.save_steps or max(1, config.steps // 10)
