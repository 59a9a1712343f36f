"""Closed forms: a task small enough to list every completion, where the optimal policy is known.

The policy that maximizes E[r] - beta * KL(policy, reference) is p* = reference * exp(r / beta) / Z
for each prompt, with the objective beta * log Z. PPO trains on r itself, DPO on labels drawn from
the Bradley-Terry model of r; both must reach p*. A reward model must recover r from such labels, up
to a constant for each prompt.

There are 43 completions of at most two tokens: eos alone, 6 words with eos, and 36 pairs of words
that the length limit cuts off. The template writes eos after one word and not after two, so a
completion has the same tokens in PPO and in DPO. Prompts begin with eos; it must not count as the
eos of a completion.

``ALIGN_SEEDS=3`` trains with the seeds 0, 1 and 2; the default is one seed.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import stage
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from align.config.stages import STAGES
from align.config.training import DPO, Reward
from align.data import tables
from align.rewards import reward_model
from align.runtime import distributed, environment

WORDS = ("a", "b", "c", "d", "e", "f")
PROMPTS = ("a b", "c d e", "f")
LIMIT = 2
BETA = 1.0
SEEDS = range(int(os.environ.get("ALIGN_SEEDS", "1")))
EOS, PAD = "<eos>", "<pad>"
TEMPLATE = (
    "{{ '<eos> ' }}{% for message in messages %}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' and message['content'].split() | length < 2 %}"
    "{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
)
TEXTS = tuple(
    " ".join(words) for n in range(LIMIT + 1) for words in itertools.product(WORDS, repeat=n)
)


def user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@dataclass(frozen=True, slots=True)
class World:
    """Folders of the reference and the data, and the reward of every completion."""

    model: Path
    data: Path
    table: dict[str, dict[str, float]]
    folder: Path

    @property
    def rewards(self) -> Tensor:
        """Rewards, ``[prompt, completion]``."""
        return torch.tensor([list(row.values()) for row in self.table.values()]).double()

    @property
    def reference(self) -> Tensor:
        return distribution(self.model)

    @property
    def optimum(self) -> Tensor:
        return (self.reference + self.rewards / BETA).log_softmax(1)

    def objective(self, policy: Tensor) -> float:
        """E[r] - beta * KL(policy, reference), averaged over the prompts."""
        gains = self.rewards - BETA * (policy - self.reference)
        return (policy.exp() * gains).sum(1).mean().item()

    def distance(self, policy: Tensor) -> float:
        """KL(policy, p*) in nats per completion, averaged over the prompts."""
        return (policy.exp() * (policy - self.optimum)).sum(1).mean().item()

    def share(self, policy: Tensor) -> float:
        """Share of the possible gain over the reference that the policy achieves."""
        least, most = self.objective(self.reference), self.objective(self.optimum)
        return (self.objective(policy) - least) / (most - least)

    def summary(self, policy: Tensor) -> str:
        return f"KL {self.distance(policy):.4f}, share {self.share(policy):.4f}"


def distribution(folder: Path) -> Tensor:
    """Log-probabilities of all completions of all prompts, in float64, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = {word: n for n, word in enumerate((EOS, *WORDS))}
    result = torch.zeros(len(PROMPTS), len(TEXTS), dtype=torch.float64)
    for i, prompt in enumerate(PROMPTS):
        head = [ids[word] for word in (EOS, *prompt.split())]
        for n in range(LIMIT + 1):
            places = [j for j, text in enumerate(TEXTS) if len(text.split()) == n]
            rows = [[ids[word] for word in TEXTS[j].split()] for j in places]
            rows = [[*row, ids[EOS]] if n < LIMIT else row for row in rows]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([head + row for row in rows])).logits
            logps = logits[:, len(head) - 1 : -1].double().log_softmax(-1)
            token_logps = logps.gather(2, torch.tensor(rows)[..., None])[..., 0]
            result[i, places] = token_logps.sum(1)
    assert torch.allclose(result.exp().sum(1), torch.ones(len(PROMPTS)).double(), atol=1e-5)
    return result


def make_world(
    folder: Path, seed: int, *, pad: str = EOS, layers: int = 1, spread: float = 1.4
) -> World:
    """A random reference far from uniform, random rewards, and prompts as from ``prepare``."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    environment.quiet_libraries()
    distributed.init_process_group()
    words = {word: n for n, word in enumerate(dict.fromkeys((EOS, *WORDS, pad)))}
    splitter = Tokenizer(tokenizer_models.WordLevel(words, unk_token=WORDS[0]))
    splitter.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, eos_token=EOS, pad_token=pad)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=words[EOS],
        pad_token_id=words[pad],
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    table = random_rewards(random.Random(seed), spread)
    rows = [{"prompt": user(prompt), "prompt_id": str(n)} for n, prompt in enumerate(PROMPTS)]
    write(rows, folder / "data" / "prompts-train.parquet")
    return World(folder / "model", folder / "data", table, folder)


def random_rewards(generator: random.Random, spread: float) -> dict[str, dict[str, float]]:
    """Rewards: a random number per prompt and first word, plus one per first and second word."""
    after = {
        (*pair,): generator.gauss(0, spread)
        for pair in itertools.product((*PROMPTS, *WORDS), ("", *WORDS))
    }
    return {
        prompt: {
            text: sum(
                after[pair] for pair in itertools.pairwise([prompt, *text.split(), ""][: LIMIT + 1])
            )
            for text in TEXTS
        }
        for prompt in PROMPTS
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = tables.TableWriter(path)
    for row in rows:
        writer.add(row)
    writer.close()


# PPO

ON_POLICY: dict[str, Any] = {
    "prompts": "data",
    "batch_size": 384,
    "temperature": 1.0,
    "max_new_tokens": LIMIT,
    "kl_coef": BETA,
    "learning_rate": 3.0e-3,
    "epochs": 2,
    "normalize_advantages": False,
    "max_grad_norm": 10.0,
    "prefix_sharing": False,
    "micro_batch_size": 384,
    "sample_batch_size": 384,
}
GAE = {"critic_learning_rate": 1.0e-2, "value_clip": None, "value_coef": 0.5}
RLOO = {"stage": "rloo", "epochs": 4, "n_completions": 128}
LOSS = {**RLOO, "kl_placement": "loss", "learning_rate": 1.5e-3}
REINFORCE = {"stage": "reinforce", "epochs": 1, "normalize_advantages": True}


def ppo(world: World, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Tensor:
    """Run PPO on a reward function in the working directory; returns the policy's distribution."""
    from align.stages import ppo as stages_ppo

    name = "world_" + "".join(c for c in world.folder.name if c.isalnum())
    (world.folder / f"{name}.py").write_text(
        f"TABLE = {world.table!r}\n\n\n"
        "def score(prompts, completions):\n"
        "    pairs = zip(prompts, completions)\n"
        "    return [TABLE[prompt[-1]['content']][text] for prompt, text in pairs]\n"
    )
    monkeypatch.chdir(world.folder)
    settings = {"model": "model", "rewards": [f"{name}:score"], **ON_POLICY, **settings}
    cls = STAGES[settings.pop("stage", "ppo")]
    config = cls.model_validate({k: v for k, v in settings.items() if k in cls.model_fields})
    inputs = {"model": world.model, "prompts": world.data}
    stage(stages_ppo, config, inputs, world.folder / "ppo")
    return distribution(world.folder / "ppo")


METHODS = {  # settings, smallest share
    "gae": (GAE | {"steps": 200}, 0.99),
    "rloo": (RLOO | {"steps": 150}, 0.99),
    "rloo, KL in the loss": (LOSS | {"steps": 200}, 0.98),
    "reinforce": (REINFORCE | {"steps": 150}, 0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "settings", "share"),
    [
        pytest.param(seed, settings, share, id=f"{name}-{seed}")
        for name, (settings, share) in METHODS.items()
        for seed in SEEDS
    ],
)
def test_ppo_on_an_exact_reward_reaches_the_optimal_policy(
    tmp_path, monkeypatch, seed, settings, share
):
    """The share is (J - J_ref) / (J* - J_ref); J* - J = beta * KL(policy, p*), so it is a distance.

    At the optimum, r - beta * log(policy / reference) is equal for all completions, so the
    advantages of RLOO and of an exact critic are 0 and no longer change the policy. Those of
    REINFORCE are not, nor are those of the scores alone when the KL penalty is a term of the loss:
    gradients cancel in the mean only, and the policy stays farther from the optimum.
    """
    world = make_world(tmp_path, seed)
    policy = ppo(world, monkeypatch, seed=seed, **settings)
    assert world.share(world.reference) == 0
    assert world.share(world.optimum) == 1
    assert world.distance(world.reference) > 1
    print(world.summary(policy))  # `pytest -rP` shows it
    assert world.share(policy) >= share, world.summary(policy)
    if share > 0.9:
        assert world.distance(policy) <= 0.02, world.summary(policy)


@pytest.mark.slow
def test_ppo_comes_close_to_the_optimal_policy_in_a_few_steps(tmp_path, monkeypatch):
    world = make_world(tmp_path, 0)
    policy = ppo(world, monkeypatch, **RLOO | {"steps": 30, "batch_size": 192, "n_completions": 64})
    assert world.share(policy) >= 0.8, world.summary(policy)


def test_the_optimal_objective_is_beta_times_the_log_of_its_normalizer(tmp_path):
    # J* = beta * log E_ref[exp(r / beta)], and J* - J = beta * KL(policy, p*) for any policy, such
    # as the reference
    world = make_world(tmp_path, 0)
    weights = world.reference.exp() * (world.rewards / BETA).exp()
    best = (BETA * weights.sum(1).log()).mean().item()
    assert world.objective(world.optimum) == pytest.approx(best)
    difference = best - world.objective(world.reference)
    assert difference == pytest.approx(BETA * world.distance(world.reference))
    assert len(TEXTS) == 1 + 6 + 36


# Labels


def labeled_pairs(world: World, n: int, seed: int, chances: Tensor) -> list[dict[str, Any]]:
    """``n`` pairs per prompt: completions drawn with ``chances``, labels from Bradley-Terry.

    Labels are drawn by systematic sampling over the sorted pairs, with one random offset. Each is 1
    with exactly its probability, and a completion's number of wins differs from its expectation by
    about one label instead of the square root of their number.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        sides = torch.multinomial(chances[i], 2 * n, replacement=True, generator=generator).view(
            n, 2
        )
        pairs = sorted(sides.tolist())
        r = world.rewards[i]
        total = float(torch.rand((), generator=generator))
        for one, other in pairs:
            before, total = total, total + float(torch.sigmoid(r[one] - r[other]))
            first_wins = math.floor(total) > math.floor(before)
            chosen, rejected = (one, other) if first_wins else (other, one)
            rows.append(
                {
                    "prompt": user(prompt),
                    "chosen": assistant(TEXTS[chosen]),
                    "rejected": assistant(TEXTS[rejected]),
                    "prompt_id": str(i),
                }
            )
    return rows


TRAINER = {
    "per_device_train_batch_size": 256,
    "learning_rate": 3.0e-3,
    "lr_scheduler_type": "linear",
    "save_strategy": "no",
    "logging_steps": 50,
    "bf16": False,
    "gradient_checkpointing": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_on_bradley_terry_labels_reaches_the_optimal_policy(tmp_path, seed):
    from align.stages import dpo

    world = make_world(tmp_path, seed, spread=0.8)
    rows = labeled_pairs(world, 4000, seed, world.reference.exp())
    write(rows, world.data / "pairs-train.parquet")
    config = DPO(
        model="model",
        beta=BETA,
        seed=seed,
        prefix_sharing=False,
        trainer=TRAINER | {"num_train_epochs": 3},
    )
    stage(dpo, config, {"model": world.model, "pairs": world.data}, tmp_path / "dpo")
    policy = distribution(tmp_path / "dpo")
    assert world.distance(world.reference) > 0.2
    print(world.summary(policy))
    assert world.distance(policy) <= 0.05, world.summary(policy)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reward_model_recovers_the_reward_up_to_a_constant_for_each_prompt(tmp_path, seed):
    """The correlation weights all completions equally, so pairs are drawn uniformly as well."""
    from align.stages import reward

    world = make_world(tmp_path, seed, pad=PAD, layers=3)
    even = torch.ones(len(PROMPTS), len(TEXTS))
    rows = labeled_pairs(world, 6000, seed, even)
    write(rows, world.data / "pairs-train.parquet")
    demonstrations = [
        {"prompt": row["prompt"], "completion": row["chosen"], "prompt_id": row["prompt_id"]}
        for row in rows[::10]
    ]
    write(demonstrations, world.data / "demonstrations-train.parquet")
    config = Reward(
        model="model",
        seed=seed,
        prefix_sharing=False,
        trainer=TRAINER
        | {"num_train_epochs": 6, "learning_rate": 1.5e-3, "per_device_train_batch_size": 128},
    )
    metrics = stage(
        reward, config, {"model": world.model, "pairs": world.data}, tmp_path / "reward"
    )
    model = reward_model.RewardModel.load(
        tmp_path / "reward", dtype="float32", device="cpu", prefix_sharing=False
    )

    def scores(prompt: str, texts: list[str]) -> Tensor:
        turns = [assistant(text) for text in texts]
        return model.score([user(prompt)] * len(texts), turns, batch_size=64).double()

    for i, prompt in enumerate(PROMPTS):
        both = torch.stack([scores(prompt, list(TEXTS)), world.rewards[i]])
        correlation = torch.corrcoef(both)[0, 1].item()
        print(f"correlation {correlation:.4f}")
        assert correlation >= 0.99, (prompt, correlation)
        # A difference of scores is a log-odds, so the scale is r's too.
        slope = (both.cov()[0, 1] / both[1].var()).item()
        assert slope == pytest.approx(1, abs=0.1), (prompt, slope)
    centered = torch.cat(
        [
            scores(row["prompt"][0]["content"], [row["completion"][0]["content"]])
            for row in demonstrations
        ]
    )
    assert centered.mean().item() == pytest.approx(0, abs=1e-3)
    assert metrics["center"]["demonstrations"] == len(demonstrations)
