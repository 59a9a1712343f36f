"""A stage of online RL as the configuration of verl's PPO trainer, under FSDP and vLLM.

Written for verl 0.9.1 of September 2026: its `trainer/config/ppo_trainer.yaml`, and the losses and
advantages in `trainer/ppo/core_algos.py` and `workers/utils/losses.py`. The tests have a table of
its keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from align.cli.clusters.job import Job
from align.cli.clusters.rules import (
    ADAM_EPS,
    UNBOUNDED,
    Translation,
    begin,
    prompts_per_step,
    save_steps,
)
from align.config.online_rl import OnlineRL
from align.config.online_rl_stages import GRPO, PPO, RLOO, Reinforce

VERSION = "verl 0.9.1"
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
AGGREGATES = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}

SCRIPT = r"""
set -euo pipefail
FOLDER="$(cd "$(dirname "$0")" && pwd)"
# Further overrides follow on the command line: bash train.sh trainer.logger='[console,wandb]'
python3 -m verl.trainer.main_ppo --config-path "$FOLDER" --config-name verl \
    "data.train_files='$FOLDER/prompts.parquet'" \
    "data.val_files='$FOLDER/prompts.parquet'" \
    "reward.custom_reward_function.path='$FOLDER/align_reward.py'" \
    "trainer.default_local_dir='$FOLDER/checkpoints'" \
    "trainer.nnodes=${NODES:-1}" \
    "trainer.n_gpus_per_node=${GPUS:-8}" \
    "$@"
"""


def translate(job: Job, longest_prompt: int) -> Translation:
    """The keys of verl for a stage whose longest prompt has ``longest_prompt`` tokens."""
    config, translation = job.config, begin(job)
    translation.refused += _refused(config)
    settings = translation.settings
    settings |= _data_keys(config, longest_prompt)
    settings |= _model_keys(job, "actor_rollout_ref.model")
    settings |= _actor_keys(config, longest_prompt)
    settings |= _kl_keys(config)
    settings |= _algorithm_keys(config)
    settings |= _rollout_keys(config)
    if isinstance(config, PPO):
        settings |= _critic_keys(job, config, longest_prompt)
    settings |= {
        "reward.custom_reward_function.name": "compute_score",
        "trainer.total_training_steps": config.steps,
        "trainer.total_epochs": 1,  # the file has the prompts of all updates
        "trainer.save_freq": save_steps(config),
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.logger": ["console"],
        "trainer.project_name": "align",
        "trainer.experiment_name": job.name,
    }
    if config.kl_coef and config.kl_placement == "token_loss":
        translation.notes["importance_cap"] = "the weights do not apply to the KL term"
    return translation


def as_yaml(settings: Mapping[str, Any], comments: list[str]) -> str:
    """The settings as a primary configuration of Hydra, on the defaults of verl."""
    tree: dict[str, Any] = {
        "hydra": {"searchpath": ["pkg://verl.trainer.config"]},
        "defaults": ["ppo_trainer", "_self_"],
    }
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    lines = [f"# {line}".rstrip() for line in comments]
    return "\n".join([*lines, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)])


def _refused(config: OnlineRL) -> Iterator[tuple[str, str]]:
    """Keys that verl cannot express."""
    prompts, steps = prompts_per_step(config), config.epochs * config.minibatches
    if config.schedule == "linear":
        yield "schedule", "its schedules are `constant` and `cosine`; set one of them"
    if prompts % config.minibatches:
        yield (
            "minibatches",
            f"{prompts} prompts of an update do not divide into {config.minibatches} minibatches",
        )
    if config.kl_coef and config.kl_placement == "token_loss" and steps > 1:
        yield (
            "kl_placement",
            "its KL term lacks the importance ratio, which is 1 in the first optimizer step only; "
            "set `epochs: 1` and `minibatches: 1`, `reward`, or `kl_coef: 0`",
        )
    if config.missing_eos_penalty:
        yield "missing_eos_penalty", "a reward function reads the text without its end; remove it"
    if config.overlong_buffer is not None:
        yield "overlong_buffer", "penalize the length in a reward function"
    if config.entropy_coef and config.aggregate != "token":
        yield "entropy_coef", "its entropy is aggregated as the loss is; set `aggregate: token`"
    if getattr(config, "ratio", "token") == "sequence":
        if config.loss == "cispo":
            yield "ratio", "its `cispo` has ratios of tokens; set `token`"
        if config.dual_clip is not None:
            yield "dual_clip", "no effect with `ratio: sequence` there; remove it"


def _data_keys(config: OnlineRL, longest_prompt: int) -> dict[str, Any]:
    return {
        "data.prompt_key": "prompt",
        "data.train_batch_size": prompts_per_step(config),
        "data.max_prompt_length": longest_prompt,
        "data.max_response_length": config.max_new_tokens,
        "data.truncation": "error",
        "data.shuffle": False,  # the file has the order of Align
        "data.seed": config.seed,
    }


def _model_keys(job: Job, prefix: str) -> dict[str, Any]:
    lora = job.config.lora
    keys: dict[str, Any] = {
        f"{prefix}.path": str(job.model),
        f"{prefix}.enable_gradient_checkpointing": job.config.gradient_checkpointing,
    }
    if lora is not None:
        keys |= {
            f"{prefix}.lora_rank": lora.r,
            f"{prefix}.lora_alpha": lora.alpha,
            f"{prefix}.target_modules": lora.target_modules,
        }
    return keys


def _optimizer_keys(
    config: OnlineRL, prefix: str, learning_rate: float, *, scale: float
) -> dict[str, Any]:
    """AdamW as in Align, for a loss that Align multiplies by ``scale``.

    Adam's step does not depend on the scale of a gradient, except for eps and the clipping of the
    norm, which are divided by it.
    """
    keys: dict[str, Any] = {
        "lr": learning_rate,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "override_optimizer_config": {"eps": ADAM_EPS / scale},
        "clip_grad": config.max_grad_norm / scale,
        "lr_scheduler_type": config.schedule,
        "lr_warmup_steps": config.warmup_steps,
        "min_lr_ratio": 0.0,
    }
    if config.optimizer == "paged_adamw_8bit":
        keys |= {"optimizer": "PagedAdamW8bit", "optimizer_impl": "bitsandbytes.optim"}
    return {f"{prefix}.{key}": value for key, value in keys.items()}


def _tokens_per_gpu(config: OnlineRL, longest_prompt: int) -> int:
    """Tokens of a forward pass, at least those of the longest completion."""
    row = longest_prompt + config.max_new_tokens
    return max(row, config.tokens_per_batch or config.micro_batch_size * row)


def _actor_keys(config: OnlineRL, longest_prompt: int) -> dict[str, Any]:
    is_sequence = getattr(config, "ratio", "token") == "sequence"
    mode = "gspo" if is_sequence else {"clip": "vanilla"}.get(config.loss, config.loss)
    low, high = config.clip_range
    keys: dict[str, Any] = {
        "ppo_mini_batch_size": max(1, prompts_per_step(config) // config.minibatches),
        "ppo_epochs": config.epochs,
        "shuffle": True,
        "data_loader_seed": config.seed,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": _tokens_per_gpu(config, longest_prompt),
        "policy_loss.loss_mode": mode,
        "clip_ratio": min(low, 1.0),
        "clip_ratio_low": min(low, 1.0),  # with 1, no ratio is clipped from below
        "clip_ratio_high": high,
        "clip_ratio_c": config.dual_clip or UNBOUNDED,
        "loss_agg_mode": AGGREGATES[config.aggregate],
        "loss_scale_factor": config.max_new_tokens if config.aggregate == "constant" else None,
        "entropy_coeff": config.entropy_coef,
        "fsdp_config.model_dtype": "bf16" if config.dtype == "bfloat16" else "fp32",
        "fsdp_config.seed": config.seed,
    }
    optimizer = _optimizer_keys(config, f"{ACTOR}.optim", config.learning_rate, scale=1.0)
    return {f"{ACTOR}.{key}": value for key, value in keys.items()} | optimizer


def _kl_keys(config: OnlineRL) -> dict[str, Any]:
    in_reward = config.kl_coef > 0 and config.kl_placement == "reward"
    in_loss = config.kl_coef > 0 and not in_reward
    return {
        "algorithm.use_kl_in_reward": in_reward,
        "algorithm.kl_penalty": "kl",  # the log-ratio
        "algorithm.kl_ctrl.type": "fixed",
        "algorithm.kl_ctrl.kl_coef": config.kl_coef if in_reward else 0.0,
        f"{ACTOR}.use_kl_loss": in_loss,
        f"{ACTOR}.kl_loss_coef": config.kl_coef if in_loss else 0.0,
        f"{ACTOR}.kl_loss_type": "low_var_kl+",  # +: the gradient of the KL divergence of a token
    }


def _algorithm_keys(config: OnlineRL) -> dict[str, Any]:
    estimators = {PPO: "gae", GRPO: "grpo", RLOO: "rloo", Reinforce: "reinforce_plus_plus"}
    return {
        "algorithm.adv_estimator": estimators[type(config)],
        "algorithm.gamma": getattr(config, "gamma", 1.0),
        "algorithm.lam": getattr(config, "gae_lambda", 1.0),
        "algorithm.norm_adv_by_std_in_grpo": getattr(config, "scale_advantages", "") == "group",
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_is_threshold": config.importance_cap,
    }


def _rollout_keys(config: OnlineRL) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "name": "vllm",
        "n": config.n_completions,
        "temperature": config.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "tensor_model_parallel_size": 1,
        "calculate_log_probs": True,
        "seed": config.seed,
    }
    if config.colocates:
        keys["gpu_memory_utilization"] = config.vllm_gpu_memory_utilization
    return {f"{ROLLOUT}.{key}": value for key, value in keys.items()}


def _critic_keys(job: Job, config: PPO, longest_prompt: int) -> dict[str, Any]:
    rate = config.critic_learning_rate or config.learning_rate
    keys: dict[str, Any] = {
        "critic.cliprange_value": config.value_clip or UNBOUNDED,
        "critic.loss_agg_mode": "token-mean",
        "critic.data_loader_seed": config.seed,
        "critic.ppo_max_token_len_per_gpu": _tokens_per_gpu(config, longest_prompt),
        "trainer.critic_warmup": config.critic_warmup_steps + 1,  # the first update with the policy
    }
    scale = config.value_coef if config.value_coef > 0 else math.inf  # 0 is refused
    return (
        keys
        | _model_keys(job, "critic.model")
        | _optimizer_keys(config, "critic.optim", rate, scale=scale)
    )
