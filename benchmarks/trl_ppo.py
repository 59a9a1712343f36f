"""Benchmark of TRL's PPOTrainer, for ``benchmarks/ppo.py``, in a separate environment.

TRL 1.12.0 (26 August 2026) is the last release with a PPO trainer, ``trl.experimental.ppo``; 1.13.0
removed it (huggingface/trl#7020). The other packages are the newest of that day, except torch,
which is the version that Align uses:

    python3 -m venv trl-ppo
    trl-ppo/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.16.1 accelerate==1.14.0 \
        datasets==5.0.1 peft==0.20.0
    OMP_NUM_THREADS=1 trl-ppo/bin/python benchmarks/trl_ppo.py settings.json

This file imports nothing from Align. ``settings.json`` holds the fields of ``Settings``. ``policy``
and ``reward`` are folders written by ``save_pretrained``; both use the tokenizer of ``policy``. The
value model starts as a copy of the reward model, as in TRL's example. The reference is a copy of
the policy; with LoRA it is the policy without its adapter. Everything is float32, or in mixed
precision, with a constant learning rate and without dropout; nothing is evaluated or saved.

The last line of stdout is JSON. ``seconds`` is the time from the end of the warm-up to the end of
the last update. ``peak_bytes`` is the peak resident size within ``train()``, including warm-up and
libraries, and ``start_bytes`` the size when it starts. Lengths, scores and KL are means over the
timed updates.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PACKAGES = ("trl", "transformers", "accelerate", "datasets", "peft", "torch")


@dataclass(frozen=True)
class Settings:
    """Settings of a run; the fields after ``lora`` are optional."""

    policy: str
    reward: str
    prompts: str
    """A JSON file: a list of lists of token ids."""
    response_length: int
    temperature: float
    kl_coef: float
    cliprange: float
    vf_coef: float
    gamma: float
    lam: float
    num_ppo_epochs: int
    num_mini_batches: int
    batch_size: int
    """Episodes per update."""
    micro_batch_size: int
    """Episodes per forward and backward pass."""
    updates: int
    """Timed updates, after the warm-up."""
    learning_rate: float
    seed: int
    device: str
    precision: str | None
    """``bfloat16`` for mixed precision; None for float32."""
    lora: dict[str, Any] | None
    """LoRA of the policy, such as ``{"r": 8, "alpha": 16}``; ``target_modules`` is optional."""
    warm_up: int = 1
    missing_eos_penalty: float | None = None
    cliprange_value: float = 0.2
    rollout_batch_size: int = 64
    """Episodes that are generated and scored at once."""
    step_each_mini_batch: bool = False
    """Take an optimizer step per mini-batch. TRL takes one per epoch, for any number of them."""

    def __post_init__(self) -> None:
        if self.batch_size % (self.num_mini_batches * self.micro_batch_size):
            raise ValueError("batch_size must be a multiple of num_mini_batches * micro_batch_size")
        if self.warm_up < 1 or self.updates < 1:
            raise ValueError("warm_up and updates must be at least 1")


class Meter(TrainerCallback):
    """Records times of the updates and their parts, response lengths, and TRL's logs."""

    def __init__(self, eos: int) -> None:
        self.eos = eos
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.generated: list[tuple[float, float]] = []
        self.scored: list[float] = []
        self.lengths: list[torch.Tensor] = []
        self.widths: list[int] = []
        self.logs: list[dict[str, float]] = []
        self.steps: list[int] = []
        self.n_steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record an update; TRL calls this once per update, not per optimizer step."""
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.steps.append(self.n_steps)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Record the logs of an update."""
        self.logs.append(logs)

    def count_step(self, *_: Any) -> None:
        """Count a step of the optimizer."""
        self.n_steps += 1

    def watch(self, trainer: PPOTrainer) -> None:
        """Record when generation starts and ends, and when advantages are whitened.

        The update follows the whitening.
        """
        generate, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

        def timed_generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
            start = time.perf_counter()
            result = generate(model, queries, *rest)
            self.generated.append((start, time.perf_counter()))
            responses = result[0][:, queries.shape[1] :]
            self.lengths.append(lengths(responses, self.eos))
            self.widths.append(responses.shape[1])
            return result

        def timed_whitening(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = whiten(*args, **kwargs)
            self.scored.append(time.perf_counter())
            return result

        ppo_trainer.batch_generation = timed_generation
        ppo_trainer.masked_whiten = timed_whitening
        trainer.optimizer.optimizer.register_step_post_hook(self.count_step)

    def report(self, warm_up: int, batch_size: int) -> dict[str, Any]:
        """Times and results of the updates after the warm-up."""
        timed = range(warm_up, len(self.ends))
        seconds = self.ends[-1] - self.ends[warm_up - 1]
        parts = {
            "generation": sum(self.generated[i][1] - self.generated[i][0] for i in timed),
            "scoring": sum(self.scored[i] - self.generated[i][1] for i in timed),
            "update": sum(self.ends[i] - self.scored[i] for i in timed),
        }
        seconds_each = [self.ends[i] - self.ends[i - 1] for i in timed]
        response_lengths = torch.cat(self.lengths[warm_up:]).double()
        return {
            "seconds": seconds,
            "cpu_seconds": self.cpu[-1] - self.cpu[warm_up - 1],
            "episodes_per_second": len(timed) * batch_size / seconds,
            "seconds_each": seconds_each,
            "parts": parts | {"other": seconds - sum(parts.values())},
            "optimizer_steps_per_update": (self.steps[-1] - self.steps[warm_up - 1]) / len(timed),
            "response_tokens": response_lengths.mean().item(),
            "generated_positions": mean(self.widths[warm_up:]),
            "score": mean([logs["objective/scores"] for logs in self.logs[warm_up:]]),
            "kl": mean([logs["objective/kl"] for logs in self.logs[warm_up:]]),
        }


def mean(numbers: list[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)


def lengths(responses: torch.Tensor, eos: int) -> torch.Tensor:
    """Number of tokens up to and including the first eos; all tokens without one."""
    is_eos = responses == eos
    first = is_eos.int().argmax(dim=1) + 1
    return torch.where(is_eos.any(dim=1), first, responses.shape[1])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load ``tokenizer.json`` without the classes and keys of newer versions of transformers."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= json.loads((folder / name).read_text(encoding="utf-8"))
    tokens = {key: config[key] for key in ("eos_token", "pad_token")}
    tokens = {key: t["content"] if isinstance(t, dict) else t for key, t in tokens.items()}
    if tokens["eos_token"] == tokens["pad_token"]:
        raise ValueError("eos equals pad: TRL would treat every response as unfinished")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", **tokens
    )


def load_policy(folder: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The policy in float32, without the sampling settings of its folder."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return policy


def load_classifier(folder: str) -> Any:
    """A reward or value model in float32."""
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )


def load_prompts(path: str, episodes: int) -> Dataset:
    """The prompts, repeated so that the run ends within the first pass over them.

    In the last batch of a pass, accelerate takes an optimizer step for every micro-batch.
    """
    prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    return Dataset.from_dict({"input_ids": prompts * (1 + episodes // len(prompts))})


def configure(settings: Settings, folder: str) -> PPOConfig:
    """Arguments of TRL's trainer."""
    return PPOConfig(
        output_dir=folder,
        response_length=settings.response_length,
        stop_token="eos",
        temperature=settings.temperature,
        missing_eos_penalty=settings.missing_eos_penalty,
        kl_coef=settings.kl_coef,
        cliprange=settings.cliprange,
        cliprange_value=settings.cliprange_value,
        vf_coef=settings.vf_coef,
        gamma=settings.gamma,
        lam=settings.lam,
        num_ppo_epochs=settings.num_ppo_epochs,
        num_mini_batches=settings.num_mini_batches,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        local_rollout_forward_batch_size=settings.rollout_batch_size,
        total_episodes=(settings.warm_up + settings.updates) * settings.batch_size,
        num_sample_generations=0,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        bf16=settings.precision is not None,
        gradient_checkpointing=False,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def adapter(lora: dict[str, Any] | None) -> LoraConfig | None:
    """Configuration of LoRA for peft, without dropout."""
    if lora is None:
        return None
    modules = lora.get("target_modules", "all-linear")
    return LoraConfig(
        r=lora["r"], lora_alpha=lora["alpha"], target_modules=modules, task_type="CAUSAL_LM"
    )


def build(settings: Settings, folder: str) -> tuple[PPOTrainer, Meter]:
    """The trainer and its meter."""
    set_seed(settings.seed)
    tokenizer = load_tokenizer(Path(settings.policy))
    meter = Meter(tokenizer.eos_token_id)
    episodes = (settings.warm_up + settings.updates + 1) * settings.batch_size
    trainer = PPOTrainer(
        args=configure(settings, folder),
        processing_class=tokenizer,
        model=load_policy(settings.policy, tokenizer),
        ref_model=None,
        reward_model=load_classifier(settings.reward),
        value_model=load_classifier(settings.reward),
        train_dataset=load_prompts(settings.prompts, episodes),
        callbacks=[meter],
        peft_config=adapter(settings.lora),
    )
    trainer.remove_callback(PrinterCallback)
    if settings.step_each_mini_batch:
        trainer.accelerator.gradient_accumulation_steps //= settings.num_mini_batches
    meter.watch(trainer)
    return trainer, meter


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(path: str) -> None:
    """Train, and print the report."""
    settings = Settings(**json.loads(Path(path).read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        trainer, meter = build(settings, folder)
        gc.collect()
        on_cpu = settings.device == "cpu"
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        start_bytes = resident("VmRSS") if on_cpu else 0
        trainer.train()
        peak_bytes = resident("VmHWM") if on_cpu else torch.cuda.max_memory_allocated()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    report = meter.report(settings.warm_up, settings.batch_size) | {
        "peak_bytes": peak_bytes,
        "start_bytes": start_bytes,
        "trainable_parameters": trainable,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
