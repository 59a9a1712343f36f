"""A task small enough to list every completion: its models, its data, and exact distributions.

There are 13 completions of at most two tokens: eos alone, 3 words with eos, and 9 pairs of words
that the length limit cuts off. The template writes eos after one word and not after two, so a
completion has the same tokens in online RL and in DPO. Prompts begin with eos; it must not count as
the eos of a completion. Rewards are random, and those of the second prompt spread further.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data import tables
from align.runtime import distributed, environment

WORDS = ("a", "b", "c")
PROMPTS = ("a b", "c")
SPREADS = (0.4, 1.0)
"""Standard deviation of the rewards of the first token, for each prompt."""
SPREAD = 0.5
"""Standard deviation of the rewards of the second token, which do not depend on the prompt."""
LIMIT = 2
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
LENGTHS = torch.tensor([min(len(text.split()) + 1, LIMIT) for text in TEXTS]).double()
"""Tokens of each completion, eos included."""


def user(prompt: str) -> list[dict[str, str]]:
    """A conversation of one prompt."""
    return [{"role": "user", "content": prompt}]


def assistant(text: str) -> list[dict[str, str]]:
    """The turn of a completion."""
    return [{"role": "assistant", "content": text}]


@dataclass(frozen=True, slots=True)
class World:
    """Folders of the reference and the data, and the reward of every completion."""

    folder: Path
    table: dict[str, dict[str, float]]
    """Rewards by prompt and completion."""

    @property
    def model(self) -> Path:
        """The folder of the reference."""
        return self.folder / "model"

    @property
    def data(self) -> Path:
        """The folder of the tables."""
        return self.folder / "data"

    @property
    def rewards(self) -> Tensor:
        """Rewards, ``[prompt, completion]``."""
        return torch.tensor([list(row.values()) for row in self.table.values()]).double()

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The reward of the first word alone, and the rest: two rewards with the sum of all."""
        rows = [[row[text[:1]] for text in TEXTS] for row in self.table.values()]
        first = torch.tensor(rows).double()
        return first, self.rewards - first

    @property
    def reference(self) -> Tensor:
        """Log-probabilities of the reference, ``[prompt, completion]``."""
        return distribution(self.model)

    def binary(self) -> World:
        """The same world with reward 1 where it is above the prompt's mean over texts, else 0."""
        means = {prompt: statistics.mean(row.values()) for prompt, row in self.table.items()}
        return replace(
            self,
            table={
                prompt: {text: float(reward > means[prompt]) for text, reward in row.items()}
                for prompt, row in self.table.items()
            },
        )

    @property
    def preferences(self) -> Tensor:
        """Probability that the first completion is preferred, ``[prompt, first, second]``."""
        return torch.sigmoid(self.rewards[:, :, None] - self.rewards[:, None, :])


class Example(World):
    """A world without a model: its reference is a table. Theory can be computed in it alone."""

    __slots__ = ()

    @property
    def reference(self) -> Tensor:
        """Log-probabilities of a random table, ``[prompt, completion]``."""
        generator = torch.Generator().manual_seed(0)
        shape = (len(PROMPTS), len(TEXTS))
        return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(1)


def distribution(model: Any) -> Tensor:
    """Log-probabilities of all completions of all prompts, in float64, by transformers alone.

    ``model`` is a folder, or a loaded model.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model)
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
            # A pad token, which reward models need, is no action.
            logps = logits[:, len(head) - 1 : -1, : len(ids)].double().log_softmax(-1)
            token_logps = logps.gather(2, torch.tensor(rows)[..., None])[..., 0]
            result[i, places] = token_logps.sum(1)
    assert torch.allclose(result.exp().sum(1), torch.ones(len(PROMPTS)).double(), atol=1e-5)
    return result


def kl(policy: Tensor, other: Tensor) -> float:
    """KL(policy, other) in nats per completion, averaged over the prompts."""
    ratios = torch.where(policy > -math.inf, policy - other, 0.0)
    return (policy.exp() * ratios).sum(1).mean().item()


def make_world(
    folder: Path, seed: int, *, pad: str = EOS, layers: int = 2, spreads: Sequence[float] = SPREADS
) -> World:
    """A random reference far from uniform, random rewards, and prompts as from ``prepare``."""
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    environment.quiet_libraries()
    distributed.init_process_group()
    words = {word: n for n, word in enumerate(dict.fromkeys((EOS, *WORDS, pad)))}
    splitter = Tokenizer(models.WordLevel(words, unk_token=WORDS[0]))
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
    world = World(folder, random_rewards(random.Random(seed), spreads))
    LlamaForCausalLM(config).save_pretrained(world.model)
    tokenizer.save_pretrained(world.model)
    rows = [{"prompt": user(prompt), "prompt_id": str(n)} for n, prompt in enumerate(PROMPTS)]
    write(rows, world.data / "prompts-train.parquet")
    return world


def random_rewards(
    generator: random.Random, spreads: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Rewards: a random number per prompt and first word, plus one per first and second word."""
    after = {
        pair: generator.gauss(0, 1) for pair in itertools.product((*PROMPTS, *WORDS), ("", *WORDS))
    }

    def reward(prompt: str, text: str, spread: float) -> float:
        first, second = [*text.split(), "", ""][:LIMIT]
        return spread * after[prompt, first] + (SPREAD * after[first, second] if first else 0.0)

    return {
        prompt: {text: reward(prompt, text, spread) for text in TEXTS}
        for prompt, spread in zip(PROMPTS, spreads, strict=True)
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a table as ``prepare`` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = tables.TableWriter(path)
    for row in rows:
        writer.add(row)
    writer.close()


# Labels ------------------------------------------------------------------------------------------


def write_pairs(world: World, n: int, seed: int, *, flipped: float = 0.0) -> None:
    """Write ``n`` pairs per prompt: both sides drawn by the reference, Bradley-Terry labels.

    A share of ``flipped`` labels is reversed. Rows are a systematic sample of the outcomes (chosen,
    rejected): each occurs as often as expected, rounded up or down, so that labels add hardly any
    noise. Sides may be equal.
    """
    generator = torch.Generator().manual_seed(seed)
    chances = outcome_chances(world, flipped).flatten(1)
    outcomes = [systematic(each, n, generator) for each in chances]
    _write_outcomes(world, [[divmod(each, len(TEXTS)) for each in rows] for rows in outcomes])


def write_matched_pairs(world: World, n: int, seed: int) -> None:
    """Write ``n`` pairs per prompt for losses that add a term of each side.

    Each side is distributed as in :func:`write_pairs`, a systematic sample as well, and the sides
    are equal as often as that allows. The sum of such a loss over all rows is that of other pairs
    of the same sides. But where sides are equal their gradients cancel at the reference, so batches
    differ less from each other.
    """
    generator = torch.Generator().manual_seed(seed)
    outcomes = []
    for chances in outcome_chances(world):
        sides = [systematic(chances.sum(axis), n, generator) for axis in (1, 0)]
        chosen, rejected = map(Counter, sides)
        same = chosen & rejected
        rest = zip((chosen - same).elements(), (rejected - same).elements(), strict=True)
        outcomes.append([*((each, each) for each in same.elements()), *rest])
    _write_outcomes(world, outcomes)


def _write_outcomes(world: World, outcomes: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Write pairs: the numbers of the chosen and of the rejected completion, by prompt."""
    rows = [
        {
            "prompt": user(prompt),
            "chosen": assistant(TEXTS[chosen]),
            "rejected": assistant(TEXTS[rejected]),
            "prompt_id": str(i),
        }
        for i, prompt in enumerate(PROMPTS)
        for chosen, rejected in outcomes[i]
    ]
    write(rows, world.data / "pairs-train.parquet")


def outcome_chances(world: World, flipped: float = 0.0) -> Tensor:
    """Probability of each pair of chosen and rejected, ``[prompt, chosen, rejected]``."""
    drawn = world.reference.exp()
    drawn = drawn / drawn.sum(1, keepdim=True)
    wins = world.preferences * (1 - flipped) + world.preferences.mT * flipped
    # either side of the pair may be the chosen one
    return 2 * drawn[:, :, None] * drawn[:, None, :] * wins


def write_demonstrations(world: World, chances: Tensor, n: int, seed: int) -> None:
    """Write ``n`` demonstrations per prompt, distributed as ``chances`` of each completion."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {"prompt": user(prompt), "completion": assistant(TEXTS[j]), "prompt_id": str(i)}
        for i, prompt in enumerate(PROMPTS)
        for j in systematic(chances[i], n, generator)
    ]
    write(rows, world.data / "demonstrations-train.parquet")


def systematic(chances: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """``n`` indices, each as often as ``chances`` say, rounded up or down, with a random offset."""
    ends = (chances / chances.sum()).cumsum(0) * n
    offset = torch.rand((), generator=generator).double()
    counts = (ends + offset).floor().diff(prepend=torch.zeros(1).double())
    return torch.repeat_interleave(torch.arange(len(chances)), counts.long()).tolist()
