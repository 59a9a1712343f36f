"""A world small enough to list every completion: PPO, DPO and the reward model arrive where algebra says.

The policy that maximises E[r] - beta * KL(policy, reference) is p* = reference * exp(r / beta) / Z, and its objective is
beta * log Z, a prompt at a time. PPO is given r itself, DPO labels that the Bradley-Terry model draws from r, and a reward
model learns r from such labels up to a constant for each prompt.

Six words and eos, at most two tokens: eos alone, 6 words and eos, and 36 pairs that are cut off by the limit: 43
completions. The template writes eos behind those that say it and nothing behind a pair, so for PPO and for DPO a completion
is the same tokens. Prompts begin with eos, which no penalty and no length may take for a completion's.
"""

from __future__ import annotations

import itertools
import math
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

from align.config.ppo import PPO
from align.config.training import DPO, Reward
from align.data import tables
from align.rewards import reward_model
from align.runtime import distributed, environment

WORDS = ("a", "b", "c", "d", "e", "f")
PROMPTS = ("a b", "c d e", "f")
LIMIT = 2
BETA = 1.0
SEEDS = (0, 1, 2)
EOS, PAD = "<eos>", "<pad>"
TEMPLATE = (
    "{{ '<eos> ' }}{% for message in messages %}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' and message['content'].split() | length < 2 %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
)
TEXTS = tuple(
    " ".join(said) for n in range(LIMIT + 1) for said in itertools.product(WORDS, repeat=n)
)


def user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@dataclass(frozen=True, slots=True)
class World:
    """A reference in a folder, and the reward of every completion."""

    model: Path
    data: Path
    table: dict[str, dict[str, float]]
    folder: Path

    @property
    def rewards(self) -> Tensor:
        """``[prompt, completion]``"""
        return torch.tensor([list(row.values()) for row in self.table.values()]).double()

    @property
    def reference(self) -> Tensor:
        return distribution(self.model)

    @property
    def optimum(self) -> Tensor:
        return (self.reference + self.rewards / BETA).log_softmax(1)

    def objective(self, policy: Tensor) -> float:
        """E[r] - beta * KL(policy, reference), a mean over the prompts."""
        gains = self.rewards - BETA * (policy - self.reference)
        return (policy.exp() * gains).sum(1).mean().item()

    def distance(self, policy: Tensor) -> float:
        """KL(policy, p*), in nats a completion, a mean over the prompts."""
        return (policy.exp() * (policy - self.optimum)).sum(1).mean().item()

    def share(self, policy: Tensor) -> float:
        """How much of what there is to gain over the reference was gained."""
        least, most = self.objective(self.reference), self.objective(self.optimum)
        return (self.objective(policy) - least) / (most - least)

    def told(self, policy: Tensor) -> str:
        return f"KL {self.distance(policy):.4f}, share {self.share(policy):.4f}"


def distribution(folder: Path) -> Tensor:
    """Log-probabilities of all completions of all prompts, in float64, from the logits of transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = {word: n for n, word in enumerate((EOS, *WORDS))}
    found = torch.zeros(len(PROMPTS), len(TEXTS), dtype=torch.float64)
    for i, prompt in enumerate(PROMPTS):
        head = [ids[word] for word in (EOS, *prompt.split())]
        for n in range(LIMIT + 1):
            places = [j for j, text in enumerate(TEXTS) if len(text.split()) == n]
            said = [[ids[word] for word in TEXTS[j].split()] for j in places]
            said = [[*row, ids[EOS]] if n < LIMIT else row for row in said]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([head + row for row in said])).logits
            logps = logits[:, len(head) - 1 : -1].double().log_softmax(-1)
            taken = logps.gather(2, torch.tensor(said)[..., None])[..., 0]
            found[i, places] = taken.sum(1)
    assert torch.allclose(found.exp().sum(1), torch.ones(len(PROMPTS)).double(), atol=1e-5)
    return found


def make(folder: Path, seed: int, *, pad: str = EOS, layers: int = 1, spread: float = 1.4) -> World:
    """A random reference that is far from uniform, a table of rewards, and the prompts as ``prepare`` writes them."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    environment.quiet_libraries()
    distributed.init_process_group()
    words = {word: n for n, word in enumerate(dict.fromkeys((EOS, *WORDS, pad)))}
    splitter = Tokenizer(tokenizer_models.WordLevel(words))
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
    table = tabulated(random.Random(seed), spread)
    rows = [{"prompt": user(prompt), "prompt_id": str(n)} for n, prompt in enumerate(PROMPTS)]
    write(rows, folder / "data" / "prompts-train.parquet")
    return World(folder / "model", folder / "data", table, folder)


def tabulated(draw: random.Random, spread: float) -> dict[str, dict[str, float]]:
    """Rewards of texts: how the first word suits the prompt, and the second the first. None is 0 by itself."""
    after = {
        (*pair,): draw.gauss(0, spread)
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


# PPO -----------------------------------------------------------------------------------------------------------------

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
RLOO = {"advantages": "rloo", "n_completions": 128}
REINFORCE = {"advantages": "reinforce", "epochs": 1, "normalize_advantages": True}


def ppo(world: World, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Tensor:
    """Run the stage on a reward function in the working directory; the policy's distribution at the end."""
    from align.stages import ppo as stages_ppo

    name = "world_" + "".join(c for c in world.folder.name if c.isalnum())
    (world.folder / f"{name}.py").write_text(
        f"TABLE = {world.table!r}\n\n\n"
        "def score(prompts, completions):\n"
        "    said = zip(prompts, completions)\n"
        "    return [TABLE[prompt[-1]['content']][text] for prompt, text in said]\n"
    )
    monkeypatch.chdir(world.folder)
    found = PPO.model_validate(
        {"model": "model", "rewards": [f"{name}:score"], **ON_POLICY, **settings}
    )
    inputs = {"model": world.model, "prompts": world.data}
    stage(stages_ppo, found, inputs, world.folder / "ppo")
    return distribution(world.folder / "ppo")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("settings", "share"),
    [
        pytest.param(GAE | {"steps": 200}, 0.99, id="gae"),
        pytest.param(RLOO | {"steps": 150}, 0.99, id="rloo"),
        pytest.param(REINFORCE | {"steps": 150}, 0.9, id="reinforce"),
    ],
)
def test_ppo_on_an_exact_reward_reaches_the_optimal_policy(
    tmp_path, monkeypatch, seed, settings, share
):
    """The share is (J - J_ref) / (J* - J_ref), and as J* - J = beta * KL(policy, p*) it is a distance as well.

    At the optimum r - beta * log(policy / reference) is the same for all completions, so leave-one-out advantages and
    those of an exact critic are 0 and cease to shake the policy. REINFORCE's are not, and it stays farther off.
    """
    world = make(tmp_path, seed)
    policy = ppo(world, monkeypatch, seed=seed, **settings)
    assert world.share(world.reference) == 0
    assert world.share(world.optimum) == 1
    assert world.distance(world.reference) > 1
    print(world.told(policy))  # `pytest -rP` shows it
    assert world.share(policy) >= share, world.told(policy)
    if share == 0.99:
        assert world.distance(policy) <= 0.02, world.told(policy)


def test_ppo_goes_most_of_the_way_to_the_optimal_policy_in_a_few_steps(tmp_path, monkeypatch):
    world = make(tmp_path, 0)
    policy = ppo(world, monkeypatch, **RLOO | {"steps": 30, "batch_size": 192, "n_completions": 64})
    assert world.share(policy) >= 0.8, world.told(policy)


def test_the_objective_of_the_optimum_is_beta_times_the_log_of_its_normaliser(tmp_path):
    # J* = beta * log E_ref[exp(r / beta)], and J* - J = beta * KL(policy, p*) for any policy: here the reference
    world = make(tmp_path, 0)
    weights = world.reference.exp() * (world.rewards / BETA).exp()
    best = (BETA * weights.sum(1).log()).mean().item()
    assert world.objective(world.optimum) == pytest.approx(best)
    lost = best - world.objective(world.reference)
    assert lost == pytest.approx(BETA * world.distance(world.reference))
    assert len(TEXTS) == 1 + 6 + 36


# Labels --------------------------------------------------------------------------------------------------------------


def labelled(world: World, n: int, seed: int, chances: Tensor) -> list[dict[str, Any]]:
    """``n`` pairs a prompt, both sides drawn by ``chances``, the chosen one by sigmoid of the reward difference.

    Labels are drawn systematically, over the pairs in order and from one random offset: each is 1 with just its
    probability, and how often a completion wins is what is expected to within a label or so, not to within a root.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        sides = torch.multinomial(chances[i], 2 * n, replacement=True, generator=draw).view(n, 2)
        pairs = sorted(sides.tolist())
        r = world.rewards[i]
        total = float(torch.rand((), generator=draw))
        for one, other in pairs:
            before, total = total, total + float(torch.sigmoid(r[one] - r[other]))
            won = math.floor(total) > math.floor(before)
            chosen, rejected = (one, other) if won else (other, one)
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

    world = make(tmp_path, seed, spread=0.8)
    rows = labelled(world, 4000, seed, world.reference.exp())
    write(rows, world.data / "pairs-train.parquet")
    found = DPO(
        model="model",
        beta=BETA,
        seed=seed,
        prefix_sharing=False,
        trainer=TRAINER | {"num_train_epochs": 3},
    )
    stage(dpo, found, {"model": world.model, "pairs": world.data}, tmp_path / "dpo")
    policy = distribution(tmp_path / "dpo")
    assert world.distance(world.reference) > 0.2
    print(world.told(policy))
    assert world.distance(policy) <= 0.05, world.told(policy)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reward_model_recovers_the_reward_up_to_a_constant_for_each_prompt(tmp_path, seed):
    """Correlation over all completions of a prompt, each counting the same; so pairs are drawn evenly too."""
    from align.stages import reward

    world = make(tmp_path, seed, pad=PAD, layers=3)
    even = torch.ones(len(PROMPTS), len(TEXTS))
    rows = labelled(world, 6000, seed, even)
    write(rows, world.data / "pairs-train.parquet")
    said = [
        {"prompt": row["prompt"], "completion": row["chosen"], "prompt_id": row["prompt_id"]}
        for row in rows[::10]
    ]
    write(said, world.data / "demonstrations-train.parquet")
    found = Reward(
        model="model",
        seed=seed,
        prefix_sharing=False,
        trainer=TRAINER
        | {"num_train_epochs": 6, "learning_rate": 1.5e-3, "per_device_train_batch_size": 128},
    )
    metrics = stage(reward, found, {"model": world.model, "pairs": world.data}, tmp_path / "reward")
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
    centred = torch.cat(
        [scores(row["prompt"][0]["content"], [row["completion"][0]["content"]]) for row in said]
    )
    assert centred.mean().item() == pytest.approx(0, abs=1e-3)
    assert metrics["centre"]["demonstrations"] == len(said)
