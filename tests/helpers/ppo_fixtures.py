"""What the tests of PPO share: reward models on the tiny SFT model, learners on them, and plain models beside them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.ppo import PPO
from align.config.training import Reward
from align.models import tokenization
from align.online_rl import experience, models, trainer
from align.rl import update as rl_update
from align.rl.rollout import Rollout
from align.rl.update import Diagnostics, Evaluated
from align.runtime import distributed
from align.stages import reward
from helpers import tiny_models

TRAINER = tiny_models.TRAINER | {"max_steps": 6, "per_device_train_batch_size": 4}
FIVE = "helpers.ppo_fixtures:five"


@dataclass(frozen=True, slots=True)
class Cast:
    """Folders. ``full`` and ``adapter`` are reward models, all weights and LoRA; of ``eos`` pad is eos."""

    world: tiny_models.World
    full: Path
    adapter: Path
    eos: Path
    eos_reward: Path
    gpt2: Path


@functools.cache
def cast(folder: Path) -> Cast:
    """Make them below ``folder``; a second call finds them."""
    world = tiny_models.world(folder)
    full, adapter, eos, eos_reward, gpt2 = (
        world.folder / name for name in ("rm", "rm-lora", "sft-eos", "rm-eos", "gpt2")
    )
    shutil.copytree(world.sft, eos)
    tokenizer = tokenization.load_tokenizer(eos)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(eos)
    edit(eos / "generation_config.json", pad_token_id=tokenizer.eos_token_id)
    edit(eos / "config.json", pad_token_id=tokenizer.eos_token_id)
    for target, source, lora in (
        (full, world.sft, None),
        (adapter, world.sft, tiny_models.LORA),
        (eos_reward, eos, None),
    ):
        rate = 2.0e-2 if lora else 3.0e-3
        settings = Reward(model="sft", lora=lora, trainer=TRAINER | {"learning_rate": rate})
        tiny_models.stage(reward, settings, {"model": source, "pairs": world.data}, target)
    save_gpt2(world, gpt2)
    return Cast(world, full, adapter, eos, eos_reward, gpt2)


def save_gpt2(world: tiny_models.World, folder: Path) -> None:
    """A random model with absolute positions, and dropout as GPT-2 has it."""
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


def edit(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def five(prompts: Any, completions: Sequence[str]) -> list[float]:
    """A reward: 5 for whatever is said."""
    return [5.0] * len(completions)


def learner(
    made: Cast,
    folder: Path,
    *,
    source: Path | None = None,
    scorer: Path | None = None,
    lora: bool = False,
    **settings: Any,
) -> trainer.PPOTrainer:
    """A run of PPO before its first step: 8 completions of up to 24 tokens, all at once unless ``settings`` say else."""
    source = source or made.world.sft
    scorer = scorer or (made.adapter if lora else made.full)
    asked = {
        "model": "sft",
        "rewards": ["reward"],
        "steps": 4,
        "batch_size": 8,
        "max_new_tokens": 24,
        "temperature": 0.7,
        "schedule": "constant",
        "learning_rate": 1e-2,
        "lora": tiny_models.LORA if lora else None,
        "missing_eos_penalty": 1.0,
    } | settings
    inputs = {"model": source, "prompts": made.world.data, "rewards.0": scorer}
    folder.mkdir(parents=True, exist_ok=True)
    distributed.reset_process_state(asked.get("seed", 0))  # as before every stage
    return trainer.build_trainer(PPO(**asked), inputs, folder, tiny_models.logger("ppo", folder))


def build(
    source: Path,
    scorers: Sequence[Path],
    *,
    lora: bool,
    temperature: float = 1.0,
    share: bool = False,
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> models.PPOModels:
    """The roles alone, as PPO's stage has them made."""
    return models.build_models(
        source,
        scorers=scorers,
        lora=tiny_models.LORA.model_dump() | {"dropout": dropout} if lora else None,
        dtype="float32",
        quantization=None,
        revision=None,
        critic=True,
        temperature=temperature,
        share=share,
        checkpointing=checkpointing,
        device="cpu",
        say=lambda _: None,
    )


def move(
    cast: models.PPOModels, role: models.ModelView | None = None, *, scale: float = 0.02
) -> None:
    """Bring the policy, or another role, away from where it began."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in cast.parameters(role or cast.policy):
            p += scale * torch.randn(p.shape, generator=generator)


def frozen(learner: trainer.PPOTrainer) -> None:
    """Learning rates of 0: a step goes through everything and changes no weight."""
    for group in learner.optimizer.param_groups:
        group["base"] = 0.0


def weights(role: models.ModelView, cast: models.PPOModels) -> list[Tensor]:
    """A copy of what a role learns."""
    return [p.detach().clone() for p in cast.parameters(role)]


def said(learner: trainer.PPOTrainer, n: int = 8, *, seed: int = 0) -> experience.Completions:
    """Completions of the first ``n`` prompts."""
    return learner.sample(learner.prompts[:n], "test", seed)


def inputs_of(learner: trainer.PPOTrainer, of: experience.Completions) -> dict[str, Tensor]:
    return of.tensors(learner.cast.tokenizer.pad_token_id, "cpu")


def evaluated(cast: models.PPOModels, inputs: dict[str, Tensor]) -> Evaluated:
    """What the update hears of policy and critic, with gradients."""
    given = {}
    for ask in experience.evaluators(cast, frozen_policy=False):
        given |= {k: v for k, v in ask(inputs)._asdict().items() if v is not None}
    return Evaluated(**given)


class Watch:
    """What passes through a step: completions, scores, what roles say, rollouts, and each piece of the update."""

    def __init__(self, monkeypatch: Any) -> None:
        self.said: list[experience.Completions] = []
        self.told: list[dict[str, Any]] = []
        self.spoken: list[experience.Experience] = []
        self.rollouts: list[Rollout] = []
        self.asked: list[tuple[dict[str, Tensor], Tensor]] = []
        """Inputs of each piece that the policy was asked about, and its log-probabilities."""
        self.valued: list[tuple[dict[str, Tensor], Tensor]] = []
        """The same of the critic, and its values."""
        self.diagnostics: list[Diagnostics] = []
        for owner, name, into in (
            (trainer.PPOTrainer, "sample", self.said),
            (trainer.PPOTrainer, "judge", self.told),
            (experience, "compute_experience", self.spoken),
            (experience, "make_rollout", self.rollouts),
        ):
            monkeypatch.setattr(owner, name, _kept(getattr(owner, name), into))
        update = rl_update.update

        def watched(evaluate: Any, rollout: Rollout, *args: Any, **kwargs: Any) -> Diagnostics:
            asks = [self._asking(ask) for ask in evaluate]
            return update(asks, rollout, *args, **kwargs)

        monkeypatch.setattr(trainer, "update", _kept(watched, self.diagnostics))

    def _asking(self, ask: Any) -> Any:
        def asking(inputs: dict[str, Tensor]) -> Evaluated:
            found = ask(inputs)
            for value, into in ((found.logps, self.asked), (found.values, self.valued)):
                if value is not None:
                    into.append((inputs, value.detach().clone()))
            return found

        return asking


def _kept(call: Callable[..., Any], into: list[Any]) -> Callable[..., Any]:
    def kept(*args: Any, **kwargs: Any) -> Any:
        into.append(call(*args, **kwargs))
        return into[-1]

    return kept


# Other roads ------------------------------------------------------------------------------------------------------


def plain(folder: Path) -> Any:
    """A policy as anyone loads it."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapter = (folder / "adapter_config.json").is_file()
    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def plain_scorer(folder: Path) -> Any:
    """A reward model as anyone loads it."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    if not (folder / "adapter_config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


def distribution(model: Any, row: Sequence[int], temperature: float) -> Tensor:
    """Log-probabilities ``[time - 1, vocab]`` behind each token but the last: one row, no padding, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
    return (logits.double() / temperature).log_softmax(-1)


def plain_logps(model: Any, of: experience.Completions, temperature: float) -> list[Tensor]:
    """Log-probabilities of each completion's tokens."""
    found = []
    for prompt, row in zip(of.prompts, of.rows, strict=True):
        taken = torch.tensor(row[1:])[:, None]
        logps = distribution(model, row, temperature).gather(-1, taken)[:, 0]
        found.append(logps[len(prompt) - 1 :])
    return found


def plain_score(model: Any, row: Sequence[int]) -> float:
    """What a classifier says of one row alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(row)])).logits.item()


def columns(tensor: Tensor, of: experience.Completions) -> list[Tensor]:
    """The columns in which each completion's tokens are chosen: token k stands behind column k - 1."""
    return [
        row[len(p) - 1 : len(p) - 1 + len(c)]
        for row, p, c in zip(tensor, of.prompts, of.completions, strict=True)
    ]
