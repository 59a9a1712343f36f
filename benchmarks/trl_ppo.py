"""TRL's PPOTrainer, timed on CPU: the peer's side of our PPO benchmark, run inside an environment of its own.

TRL 1.12.0 (26 August 2026) is the last release that has one, as ``trl.experimental.ppo``; 1.13.0 is without it
(huggingface/trl#7020). The other packages are the newest of that day, but for torch, which is ours:

    python3 -m venv trl-ppo
    trl-ppo/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.16.1 accelerate==1.14.0 \
        datasets==5.0.1 peft==0.20.0
    OMP_NUM_THREADS=1 trl-ppo/bin/python benchmarks/trl_ppo.py settings.json

Nothing of Align is imported. ``settings.json`` holds the fields of ``Settings`` below; ``policy`` and ``reward`` are
folders that ``save_pretrained`` wrote, with one tokenizer, that of ``policy``. The value model starts as a copy of the
reward model, as in TRL's example; the reference is a copy of the policy, and under LoRA the policy without its
adapter. Everything is float32, with a constant learning rate, dropout off, and nothing evaluated, sampled or saved.

The last line of stdout is JSON. ``seconds`` runs from the end of the warm-up to the end of the last update;
``peak_bytes`` is the highest resident size within ``train()``, warm-up and libraries included, and ``start_bytes`` the
size on entering it. Lengths, scores and KL are means over the timed updates.
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
    """One run; the fields below ``lora`` may be left out."""

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
    """Episodes an update."""
    micro_batch_size: int
    """Episodes a forward and backward pass."""
    updates: int
    """Those timed, after the warm-up."""
    learning_rate: float
    seed: int
    lora: dict[str, Any] | None
    """``{"r": 8, "alpha": 16}``, and ``target_modules`` if not ``all-linear``; of the policy alone."""
    warm_up: int = 1
    missing_eos_penalty: float | None = None
    cliprange_value: float = 0.2
    rollout_batch_size: int = 64
    """Episodes generated and scored at once."""
    step_each_mini_batch: bool = False
    """TRL takes one optimizer step an epoch, however many mini-batches; True has it take one each."""

    def __post_init__(self) -> None:
        if self.batch_size % (self.num_mini_batches * self.micro_batch_size):
            raise ValueError("batch_size is no multiple of num_mini_batches * micro_batch_size")
        if self.warm_up < 1 or self.updates < 1:
            raise ValueError("warm_up and updates are at least 1")


class Meter(TrainerCallback):
    """Times of the updates and of their parts, lengths of the responses, and TRL's logs."""

    def __init__(self, eos: int) -> None:
        self.eos = eos
        self.ends: list[float] = []
        self.busy: list[float] = []
        self.generated: list[tuple[float, float]] = []
        self.scored: list[float] = []
        self.lengths: list[torch.Tensor] = []
        self.widths: list[int] = []
        self.logs: list[dict[str, float]] = []
        self.steps: list[int] = []
        self.taken = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """TRL calls it at the end of an update, not of an optimizer step."""
        self.ends.append(time.perf_counter())
        self.busy.append(time.process_time())
        self.steps.append(self.taken)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Once an update."""
        self.logs.append(logs)

    def stepped(self, *_: Any) -> None:
        """After a step of the optimizer."""
        self.taken += 1

    def watch(self, trainer: PPOTrainer) -> None:
        """Note when generation starts and ends, and when advantages are whitened: what follows is the update."""
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
        trainer.optimizer.optimizer.register_step_post_hook(self.stepped)

    def report(self, warm_up: int, batch_size: int) -> dict[str, Any]:
        """What the updates after the warm-up took and gave."""
        timed = range(warm_up, len(self.ends))
        seconds = self.ends[-1] - self.ends[warm_up - 1]
        parts = {
            "generation": sum(self.generated[i][1] - self.generated[i][0] for i in timed),
            "scoring": sum(self.scored[i] - self.generated[i][1] for i in timed),
            "update": sum(self.ends[i] - self.scored[i] for i in timed),
        }
        each = [self.ends[i] - self.ends[i - 1] for i in timed]
        kept = torch.cat(self.lengths[warm_up:]).double()
        return {
            "seconds": seconds,
            "cpu_seconds": self.busy[-1] - self.busy[warm_up - 1],
            "episodes_per_second": len(timed) * batch_size / seconds,
            "seconds_each": each,
            "parts": parts | {"other": seconds - sum(parts.values())},
            "optimizer_steps_per_update": (self.steps[-1] - self.steps[warm_up - 1]) / len(timed),
            "response_tokens": kept.mean().item(),
            "generated_positions": mean(self.widths[warm_up:]),
            "score": mean([logs["objective/scores"] for logs in self.logs[warm_up:]]),
            "kl": mean([logs["objective/kl"] for logs in self.logs[warm_up:]]),
        }


def mean(numbers: list[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)


def lengths(responses: torch.Tensor, eos: int) -> torch.Tensor:
    """Tokens up to the first eos, which counts; all of them where there is none."""
    ended = responses == eos
    first = ended.int().argmax(dim=1) + 1
    return torch.where(ended.any(dim=1), first, responses.shape[1])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """From ``tokenizer.json`` and two names: no class or key that a newer transformers wrote is needed."""
    written: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            written |= json.loads((folder / name).read_text(encoding="utf-8"))
    tokens = {key: written[key] for key in ("eos_token", "pad_token")}
    tokens = {key: t["content"] if isinstance(t, dict) else t for key, t in tokens.items()}
    if tokens["eos_token"] == tokens["pad_token"]:
        raise ValueError("eos is pad: TRL would read every response as one without an end")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", **tokens
    )


def load_policy(folder: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The policy in float32, with no wishes of its own for sampling."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return policy


def load_scorer(folder: str) -> Any:
    """A reward or value model in float32."""
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )


def load_prompts(path: str, episodes: int) -> Dataset:
    """The prompts, repeated until the run ends before they do.

    In the last batch of a pass over the data, accelerate has every micro-batch take an optimizer step.
    """
    prompts = json.loads(Path(path).read_text(encoding="utf-8"))
    return Dataset.from_dict({"input_ids": prompts * (1 + episodes // len(prompts))})


def configure(settings: Settings, folder: str) -> PPOConfig:
    """TRL's arguments."""
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
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def adapter(lora: dict[str, Any] | None) -> LoraConfig | None:
    """LoRA as peft takes it, without dropout."""
    if lora is None:
        return None
    modules = lora.get("target_modules", "all-linear")
    return LoraConfig(
        r=lora["r"], lora_alpha=lora["alpha"], target_modules=modules, task_type="CAUSAL_LM"
    )


def build(settings: Settings, folder: str) -> tuple[PPOTrainer, Meter]:
    """The trainer and what measures it."""
    set_seed(settings.seed)
    tokenizer = load_tokenizer(Path(settings.policy))
    meter = Meter(tokenizer.eos_token_id)
    episodes = (settings.warm_up + settings.updates + 1) * settings.batch_size
    trainer = PPOTrainer(
        args=configure(settings, folder),
        processing_class=tokenizer,
        model=load_policy(settings.policy, tokenizer),
        ref_model=None,
        reward_model=load_scorer(settings.reward),
        value_model=load_scorer(settings.reward),
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
    """Train and print."""
    settings = Settings(**json.loads(Path(path).read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        trainer, meter = build(settings, folder)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
        start_bytes = resident("VmRSS")
        trainer.train()
        peak_bytes = resident("VmHWM")
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
