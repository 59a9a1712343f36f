"""Helpers of the tests of PPO: reward models, trainers, a recorder of a step, and plain models."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.stages import STAGES
from align.config.training import Reward
from align.models import tokenization
from align.online_rl import build, experience, trainer
from align.online_rl.completions import Completions
from align.online_rl.draws import Draw
from align.online_rl.experience import Experience
from align.online_rl.models import ModelView, OnlineRLModels
from align.online_rl.sampling import LocalSampler
from align.online_rl.scoring import Scorer, Scores
from align.online_rl.trainer import OnlineRLTrainer
from align.rl.rollout import Rollout
from align.rl.update import Diagnostics, Evaluated
from align.runtime import distributed
from align.stages import reward
from helpers import tiny_models

TRAINER = tiny_models.TRAINER | {"max_steps": 6, "per_device_train_batch_size": 4}
FIVE = "helpers.ppo_fixtures:five"


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders of trained models. In ``eos`` and ``eos_reward`` the pad token is eos."""

    world: tiny_models.World
    full: Path
    """A reward model with full fine-tuning."""
    adapter: Path
    """A reward model trained with LoRA."""
    eos: Path
    eos_reward: Path
    gpt2: Path
    """A random policy with absolute positions."""


@functools.cache
def folders(root: Path) -> Folders:
    """Train the models below ``root``, once per process."""
    world = tiny_models.world(root)
    full, adapter, eos, eos_reward, gpt2 = (
        world.folder / name for name in ("rm", "rm-lora", "sft-eos", "rm-eos", "gpt2")
    )
    shutil.copytree(world.sft, eos)
    tokenizer = tokenization.load_tokenizer(eos)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(eos)
    edit_json(eos / "generation_config.json", pad_token_id=tokenizer.eos_token_id)
    edit_json(eos / "config.json", pad_token_id=tokenizer.eos_token_id)
    for target, source, lora in (
        (full, world.sft, None),
        (adapter, world.sft, tiny_models.LORA),
        (eos_reward, eos, None),
    ):
        rate = 2.0e-2 if lora else 3.0e-3
        config = Reward(model="sft", lora=lora, trainer=TRAINER | {"learning_rate": rate})
        tiny_models.stage(reward, config, {"model": source, "pairs": world.data}, target)
    save_gpt2(world, gpt2)
    return Folders(world, full, adapter, eos, eos_reward, gpt2)


def save_gpt2(world: tiny_models.World, folder: Path) -> None:
    """Save a random model with absolute positions and GPT-2's dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tokenization.load_tokenizer(world.sft)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=tiny_models.POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def edit_json(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def five(prompts: Any, completions: Sequence[str]) -> list[float]:
    """A reward function that gives 5 to every completion."""
    return [5.0] * len(completions)


def length(prompts: Any, completions: Sequence[str]) -> list[float]:
    """A score function: the number of characters."""
    return [float(len(text)) for text in completions]


class Echo:
    """An environment that repeats each turn; one with an even number of letters is worth 1."""

    def reset(self, row: Any) -> Any:
        """The prompt of a row."""
        return row["prompt"]

    def step(self, completion: str) -> Any:
        """The turn, and whether its length is even."""
        return [{"role": "user", "content": completion[:20]}], len(completion) % 2 == 0, False


def ppo_config(kind: str = "ppo", **settings: Any) -> Any:
    """8 completions of up to 24 tokens per step, in one batch, unless ``settings`` differ.

    Stages of every ``kind`` have the defaults of ``ppo``.
    """
    shared = {} if kind == "ppo" else {"epochs": 4, "normalize_advantages": True}
    defaults = shared | {
        "model": "sft",
        "rewards": ["reward"],
        "steps": 4,
        "batch_size": 8,
        "max_new_tokens": 24,
        "temperature": 0.7,
        "schedule": "constant",
        "learning_rate": 1e-2,
        "missing_eos_penalty": 1.0,
    }
    return STAGES[kind](**defaults | settings)


def build_trainer(
    folders: Folders,
    output_dir: Path,
    *,
    source: Path | None = None,
    reward_model: Path | None = None,
    lora: bool = False,
    **settings: Any,
) -> OnlineRLTrainer:
    """A PPO run before its first step, with :func:`ppo_config`."""
    config = ppo_config(lora=tiny_models.LORA if lora else None, **settings)
    inputs = {
        "model": source or folders.world.sft,
        "prompts": folders.world.data,
        "rewards.0": reward_model or (folders.adapter if lora else folders.full),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    distributed.reset_process_state(config.seed)  # as before every stage
    return OnlineRLTrainer(config, inputs, output_dir, tiny_models.logger("ppo", output_dir))


def build_models(
    source: Path,
    reward_sources: Sequence[Path],
    *,
    lora: bool,
    dropout: float = 0.0,
    share: bool = False,
    **settings: Any,
) -> OnlineRLModels:
    """The models of a PPO run at temperature 1, unless ``settings`` differ."""
    adapter = tiny_models.LORA.model_copy(update={"dropout": dropout}) if lora else None
    config = ppo_config(lora=adapter, prefix_sharing=share, **{"temperature": 1.0} | settings)
    return build.build_models(config, source, reward_sources, device="cpu")


def perturb(models: OnlineRLModels, view: ModelView | None = None, *, scale: float = 0.02) -> None:
    """Add noise to the parameters of the policy, or of another view."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in models.parameters(view or models.policy):
            p += scale * torch.randn(p.shape, generator=generator)


def make_ends_likely(models: OnlineRLModels) -> None:
    """Give eos the logit of a frequent token, so that about half of the completions end early."""
    tokenizer, head = models.tokenizer, models.policy.model.get_output_embeddings()
    frequent = tokenizer.encode("s", add_special_tokens=False)[0]
    with torch.no_grad():
        head.weight[tokenizer.eos_token_id] = head.weight[frequent]


def set_learning_rates_to_0(trainer: OnlineRLTrainer) -> None:
    """Let steps run completely without changing a weight."""
    for group in trainer.optimizer.param_groups:
        group["base"] = 0.0


def parameter_copies(view: ModelView, models: OnlineRLModels) -> list[Tensor]:
    """A copy of each trainable parameter of a view."""
    return [p.detach().clone() for p in models.parameters(view)]


def flat_weights(trainer: OnlineRLTrainer) -> Tensor:
    """A copy of all trainable parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.models.weights().values()])


def sample(trainer: OnlineRLTrainer, n: int = 8, *, seed: int = 0) -> Completions:
    """Completions of the first ``n`` prompts."""
    trainer.set_train_mode(False)
    seeds = Draw(seed, range(n)).seeds
    return trainer.sampler.generate(trainer.prompts.tokens[:n], seeds=seeds)


def inputs_of(models: OnlineRLModels, completions: Completions) -> dict[str, Tensor]:
    """The padded tensors of completions."""
    return completions.tensors(models.tokenizer.pad_token_id, "cpu")


def evaluate(models: OnlineRLModels, inputs: dict[str, Tensor]) -> Evaluated:
    """Log-probabilities, entropy and values as the update computes them, with gradients."""
    merged = {}
    for evaluator in experience.evaluators(models, frozen_policy=False):
        merged |= {k: v for k, v in evaluator(inputs)._asdict().items() if v is not None}
    return Evaluated(**merged)


class Recorder:
    """Records what passes through the five parts of a step, and each piece of the update."""

    def __init__(self, monkeypatch: Any) -> None:
        self.completions: list[Completions] = []
        self.scores: list[Scores] = []
        self.experiences: list[Experience] = []
        self.rollouts: list[Rollout] = []
        self.policy_calls: list[tuple[dict[str, Tensor], Tensor]] = []
        """Inputs and log-probabilities of each forward pass of the policy in the update."""
        self.critic_calls: list[tuple[dict[str, Tensor], Tensor]] = []
        """Inputs and values of each forward pass of the critic in the update."""
        self.diagnostics: list[Diagnostics] = []
        for owner, name, results in (
            (LocalSampler, "generate", self.completions),
            (Scorer, "score", self.scores),
            (trainer, "compute_experience", self.experiences),
            (trainer, "make_rollout", self.rollouts),
        ):
            monkeypatch.setattr(owner, name, _recording(getattr(owner, name), results))
        update = trainer.update

        def recorded(evaluators: Any, rollout: Rollout, *args: Any, **kwargs: Any) -> Diagnostics:
            return update([self._record(e) for e in evaluators], rollout, *args, **kwargs)

        monkeypatch.setattr(trainer, "update", _recording(recorded, self.diagnostics))

    def _record(self, evaluator: Any) -> Any:
        def recorded(inputs: dict[str, Tensor]) -> Evaluated:
            result = evaluator(inputs)
            for value, calls in (
                (result.logps, self.policy_calls),
                (result.values, self.critic_calls),
            ):
                if value is not None:
                    calls.append((inputs, value.detach().clone()))
            return result

        return recorded


def _recording(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    def recording(*args: Any, **kwargs: Any) -> Any:
        results.append(function(*args, **kwargs))
        return results[-1]

    return recording


@contextlib.contextmanager
def recorded_gradients(monkeypatch: Any) -> Iterator[list[list[Tensor]]]:
    """The gradients of each optimizer step within the block, before averaging and clipping."""
    gradients: list[list[Tensor]] = []
    clip_gradients = trainer.clip_gradients

    def recording(optimizer: Any, parameters: list[Tensor], max_norm: float) -> Tensor:
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip_gradients(optimizer, parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "clip_gradients", recording)
        yield gradients


def tokenized_pairs(
    folders: Folders, tokenizer: Any, n: int = 6
) -> tuple[list[list[int]], list[Any]]:
    """Prompts with chosen completions, tokenized as text: template, answer, end; and their rows."""
    rows = tiny_models.rows(folders.world.data, "pairs-train")[:n]
    tokens = []
    for row in rows:
        head = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        text = head + row["chosen"][-1]["content"] + "<|im_end|>"
        tokens.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tokens, rows


# Independent computations: plain models, one row at a time, without padding


def load_plain_policy(folder: Path) -> Any:
    """A policy loaded with transformers or peft alone."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapter = (folder / "adapter_config.json").is_file()
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def load_plain_reward_model(folder: Path) -> Any:
    """A reward model loaded with transformers or peft alone."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    if not (folder / "adapter_config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


def distribution(model: Any, row: Sequence[int], temperature: float) -> Tensor:
    """Log-probabilities ``[time - 1, vocab]`` after each token but the last, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
    return (logits.double() / temperature).log_softmax(-1)


def plain_logps(model: Any, completions: Completions, temperature: float) -> list[Tensor]:
    """Log-probabilities of each completion's tokens."""
    logps = []
    for prompt, row in zip(completions.prompts, completions.rows, strict=True):
        tokens = torch.tensor(row[1:])[:, None]
        all_logps = distribution(model, row, temperature).gather(-1, tokens)[:, 0]
        logps.append(all_logps[len(prompt) - 1 :])
    return logps


def plain_score(model: Any, row: Sequence[int]) -> float:
    """Output of a classifier for one row."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(row)])).logits.item()


def columns(tensor: Tensor, completions: Completions) -> list[Tensor]:
    """The columns of each completion's tokens: token k is chosen in column k - 1."""
    return [
        row[len(p) - 1 : len(p) - 1 + len(c)]
        for row, p, c in zip(tensor, completions.prompts, completions.completions, strict=True)
    ]
