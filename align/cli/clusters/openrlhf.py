"""A stage of online RL as the command line of OpenRLHF's PPO trainer.

Written for OpenRLHF 0.11.2 of September 2026: the flags of `cli/train_ppo_ray.py`, the losses in
`models/loss.py` and the advantages in `trainer/ppo_utils/experience_maker.py`. The tests have a
table of its flags.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from align.cli.clusters.job import Job
from align.cli.clusters.rules import (
    ADAM_EPS,
    LARGEST_SCORE,
    UNBOUNDED,
    Translation,
    begin,
    prompts_per_step,
    save_steps,
)
from align.config.online_rl import OnlineRL
from align.config.online_rl_stages import GRPO, PPO, RLOO, Reinforce

VERSION = "OpenRLHF 0.11.2"
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
AGGREGATES = {"token": "token-mean", "sequence": "seq-mean-token-mean"}

HEAD = r"""
set -euo pipefail
FOLDER="$(cd "$(dirname "$0")" && pwd)"
NODES="${NODES:-1}"  # of the same kind
GPUS="${GPUS:-8}"  # of a node
# Further flags follow on the command line: bash train.sh --ds.zero_stage 3
"""
MACHINES = """\
    --data.prompt_dataset "$FOLDER/prompts.jsonl" \\
    --reward.remote_url "$FOLDER/align_reward.py" \\
    --ckpt.output_dir "$FOLDER/policy" \\
    --ckpt.path "$FOLDER/checkpoints" \\
    --actor.num_nodes "$NODES" --actor.num_gpus_per_node "$GPUS" \\
    --ref.num_nodes "$NODES" --ref.num_gpus_per_node "$GPUS" \\
    --critic.num_nodes "$NODES" --critic.num_gpus_per_node "$GPUS" \\
    --vllm.num_engines "$((NODES * GPUS))" \\
    "$@"
"""


def translate(job: Job, longest_prompt: int) -> Translation:
    """The flags of OpenRLHF for a stage whose longest prompt has ``longest_prompt`` tokens."""
    config, translation = job.config, begin(job)
    translation.refused += _refused(config)
    translation.settings |= {
        "actor.model_name_or_path": str(job.model),
        "data.input_key": "input",
        "data.label_key": "label",
        "data.max_len": longest_prompt + config.max_new_tokens,
        "rollout.max_new_tokens": config.max_new_tokens,
        "rollout.batch_size": prompts_per_step(config),
        "rollout.n_samples_per_prompt": config.n_completions,
        "rollout.micro_batch_size": 1,
        "rollout.temperature": config.temperature,
        "rollout.top_p": 1.0,
        "train.num_episodes": 1,  # the file has the prompts of all updates
        "train.batch_size": config.batch_size // config.minibatches,
        "train.micro_batch_size": 1,
        "train.max_epochs": config.epochs,
        "train.seed": config.seed,
        "train.colocate_all": True,
        "vllm.tensor_parallel_size": 1,
        "vllm.gpu_memory_utilization": (
            config.vllm_gpu_memory_utilization if config.colocates else 0.5
        ),
        "vllm.enable_sleep": True,
        "ds.enable_sleep": True,
        "ds.param_dtype": "bf16",
        "ckpt.save_steps": save_steps(config),
        "ckpt.save_hf": True,
        "reward.clip_range": (-LARGEST_SCORE, LARGEST_SCORE),
    }
    translation.settings |= _loss_flags(config) | _advantage_flags(config)
    translation.settings |= _optimizer_flags(config, "actor", config.learning_rate, scale=1.0)
    if isinstance(config, PPO):
        rate = config.critic_learning_rate or config.learning_rate
        scale = config.value_coef if config.value_coef > 0 else math.inf  # 0 is refused
        translation.settings |= _optimizer_flags(config, "critic", rate, scale=scale)
    translation.notes |= _notes(config)
    return translation


def script(settings: Mapping[str, Any], comments: list[str]) -> str:
    """The settings as a launch script of Bash."""
    lines = [f"# {line}".rstrip() for line in comments]
    flags = [f"    {_flag(key, value)} \\" for key, value in settings.items() if value is not False]
    command = ["python3 -m openrlhf.cli.train_ppo_ray \\", *flags]
    return "\n".join(["#!/usr/bin/env bash", *lines]) + HEAD + "\n".join(command) + "\n" + MACHINES


def _flag(key: str, value: Any) -> str:
    """A flag with its values; one that is true has none."""
    values = [] if value is True else value if isinstance(value, list | tuple) else [value]
    return " ".join([f"--{key}", *(shlex.quote(str(each)) for each in values)])


def _refused(config: OnlineRL) -> Iterator[tuple[str, str]]:
    """Keys that OpenRLHF cannot express."""
    grouped = isinstance(config, GRPO | RLOO)
    if config.batch_size % config.minibatches:
        yield (
            "minibatches",
            f"{config.batch_size} completions do not divide into {config.minibatches} minibatches",
        )
    if config.kl_coef and config.kl_placement == "reward" and grouped:
        yield (
            "kl_placement",
            "its groups compare scores without the KL penalty; set `token_loss`, or `kl_coef: 0`",
        )
    if config.kl_coef and config.kl_placement == "token_loss" and config.aggregate != "token":
        yield "aggregate", "its KL term is a mean over tokens; set `token`, or `kl_coef: 0`"
    if config.loss == "cispo":
        yield "loss", "set `clip`"
    layers = "all-linear" if config.lora is None else config.lora.target_modules
    if isinstance(layers, str) and layers != "all-linear":
        yield "lora.target_modules", "list the names of the layers, or set `all-linear`"
    if config.aggregate == "constant":
        yield "aggregate", "set `token` or `sequence`"
    if getattr(config, "ratio", "token") == "sequence":
        yield "ratio", "its ratio of a completion has no bounded importance weights; set `token`"


def _notes(config: OnlineRL) -> Iterator[tuple[str, str]]:
    """Keys without an exact counterpart."""
    yield "steps", "the order of the prompts is shuffled over the whole run"
    yield "micro_batch_size", "1, which every number of GPUs divides; raise it for speed"
    if config.tokens_per_batch is not None:
        yield "tokens_per_batch", "a matter of memory; see --train.dynamic_batch_enable"
    if config.epochs * config.minibatches > 1 and config.schedule != "constant":
        yield "schedule", "the learning rate changes after each optimizer step of an update"
    if config.optimizer != "adamw":
        yield "optimizer", "AdamW with moments in 32 bits"
    if config.kl_coef and config.kl_placement == "token_loss":
        yield "importance_cap", "the weights do not apply to the KL term"
        yield "kl_placement", "the importance ratio of the KL term is at most 10"


def _loss_flags(config: OnlineRL) -> dict[str, Any]:
    in_loss = config.kl_coef > 0 and config.kl_placement == "token_loss"
    low, high = config.clip_range
    flags: dict[str, Any] = {
        "actor.eps_clip_low_high": (low, high),
        "actor.policy_loss_type": "ppo",
        "actor.loss_agg_mode": AGGREGATES.get(config.aggregate),
        "actor.gradient_checkpointing_enable": config.gradient_checkpointing,
        "algo.kl.init_coef": config.kl_coef,
        "algo.kl.estimator": "k3" if in_loss else "k1",
        "algo.kl.use_loss": in_loss,
        "algo.kl.unbiased_gradient": in_loss,
        "algo.advantage.is_correction_level": "token",
        "algo.advantage.is_correction_mode": "clip",
        "algo.advantage.is_correction_gating": "ratio",
        "algo.advantage.is_correction_threshold": config.importance_cap,
    }
    if config.dual_clip is not None:
        flags["actor.dual_clip"] = config.dual_clip
    if config.entropy_coef:
        flags["actor.entropy_coef"] = config.entropy_coef
    if config.overlong_buffer is not None:
        flags["reward.overlong_buffer_len"] = config.overlong_buffer
        flags["reward.overlong_penalty_factor"] = config.overlong_penalty
    if config.lora is not None:
        flags |= {"ds.lora.rank": config.lora.r, "ds.lora.alpha": config.lora.alpha}
        if isinstance(config.lora.target_modules, list):  # as a flag, `all-linear` becomes a list
            flags["ds.lora.target_modules"] = config.lora.target_modules
    return flags


def _advantage_flags(config: OnlineRL) -> dict[str, Any]:
    match config:
        case PPO():
            return {
                "algo.advantage.estimator": "gae",
                "algo.advantage.gamma": config.gamma,
                "algo.advantage.lambd": config.gae_lambda,
                "critic.value_clip": config.value_clip or UNBOUNDED,
                "critic.freezing_steps": config.critic_warmup_steps - 1,  # updates count from 0
            }
        case Reinforce():
            return {
                "algo.advantage.estimator": "reinforce",
                "algo.advantage.gamma": config.gamma,
            }
        case RLOO():
            return {"algo.advantage.estimator": "rloo"}
        case GRPO():
            scaled = config.scale_advantages == "group"
            return {"algo.advantage.estimator": "group_norm" if scaled else "dr_grpo"}
        case _:
            raise TypeError(f"no estimator of advantages for {type(config).__name__}")


def _optimizer_flags(
    config: OnlineRL, model: str, learning_rate: float, *, scale: float
) -> dict[str, Any]:
    """AdamW as in Align, for a loss that Align multiplies by ``scale``.

    Adam's step does not depend on the scale of a gradient, except for eps and the clipping of the
    norm, which are divided by it. The warm-up is rounded up to whole optimizer steps.
    """
    per_update = config.epochs * config.minibatches
    total, warmup = config.steps * per_update, config.warmup_steps * per_update
    flags = {
        "adam.lr": learning_rate,
        "adam.betas": (0.9, 0.999),
        "adam.eps": ADAM_EPS / scale,
        "adam.weight_decay": 0.0,
        "max_norm": config.max_grad_norm / scale,
        "lr_scheduler": SCHEDULES[config.schedule],
        "lr_warmup_ratio": (warmup - 0.5) / total if warmup else 0.0,
    }
    return {f"{model}.{flag}": value for flag, value in flags.items()}
