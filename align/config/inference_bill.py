"""The memory of stages without gradients, part by part: ``sample``, ``label`` and ``evaluate``.

Policies are in memory one at a time, while they sample and while log-probabilities are computed;
reward models that judge are there from the beginning to the end. Rows have the largest length, and
prompts that rows share count in each of them when they are scored. Left out: libraries,
fragmentation, the masks of padded rows, and the padding of ``compile_decoding``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.config.memory import ModelSize
from align.config.memory_bill import Shape, sampling_bytes
from align.config.training_base import TOKENS_PER_WORD

MIN_ROWS = 4
"""Fewest prompts that are read at once, if the batch has as many rows."""
MOST_LOGITS = 2**28
"""Logits of completions in memory at once, unless a single completion has more."""
ROWS = 512
"""Rows of logits whose probabilities are computed at once."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model as a stage loads it: the shape of its weights, and its adapter."""

    size: ModelSize
    adapter: int = 0
    """Parameters of its adapter, in float32; 0 for none."""

    def weight_bytes(self, dtype: str, quantization: str | None) -> int:
        """Memory of the weights and the adapter."""
        return self.size.weight_bytes(dtype, quantization) + 4 * self.adapter


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of rows of the largest length."""

    number: int
    prompt: int
    """Tokens of a prompt."""
    completion: int
    """Tokens of a completion behind it."""
    is_all: bool = False
    """Whether no batch of this process follows."""

    def within(self, positions: int | None) -> Rows:
        """The rows with prompts that the positions of a model leave room for."""
        if positions is None:
            return self
        completion = min(self.completion, positions)
        return replace(self, prompt=min(self.prompt, positions - completion), completion=completion)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.number * (self.prompt + self.completion)


@dataclass(frozen=True, slots=True)
class InferenceWork:
    """The batches of a stage without gradients."""

    sampled: Rows | None = None
    """Completions that a policy samples at once."""
    prompts: int = 0
    """Their distinct prompts."""
    copies: int = 4
    """Tensors of the size of the last logits, see :func:`sampled_copies`."""
    drift: Rows | None = None
    """Completions whose log-probabilities and entropies a policy computes at once."""
    pairs: Rows | None = None
    """Sides of held-out pairs whose log-probabilities a policy computes at once."""
    judged: Rows | None = None
    """Completions that a reward model scores at once."""

    def halved(self) -> InferenceWork:
        """Batches of half as many rows."""
        names = ("sampled", "drift", "pairs", "judged")
        batches = {name: getattr(self, name) for name in names}
        changes: dict[str, Any] = {
            name: replace(rows, number=max(1, rows.number // 2))
            for name, rows in batches.items()
            if rows is not None
        }
        return replace(self, prompts=max(1, self.prompts // 2), **changes)


@dataclass(frozen=True, slots=True)
class InferenceBill:
    """Bytes of a process. Not all parts are in memory at the same time."""

    weights: int
    """The policy; of several, that with the largest peak."""
    frozen: int
    """Reward models that judge."""
    sampling: int = 0
    """Keys and values with what reads the prompts, or with the logits of the next token."""
    layer: int = 0
    """What a layer of the policy needs while completions are scored."""
    earlier: int = 0
    """Logits of the batch before, which are in memory during that."""
    logits: int = 0
    """Logits of completions, their probabilities, and the states that they are computed from."""
    judging: int = 0
    """What a layer of a reward model needs."""

    @property
    def peak(self) -> int:
        """The largest sum: of a policy in sampling or scoring, or of a judge."""
        policy = self.weights + max(self.sampling, self.earlier + self.layer, self.logits)
        return self.frozen + max(policy, self.judging)

    def parts(self) -> dict[str, int]:
        """The parts by name, as far as the bill of a training stage has them."""
        parts = {"weights": self.weights, "frozen": self.frozen}
        parts |= {"layer": max(self.layer, self.judging), "logits": self.logits}
        return parts | {"sampling": self.sampling}


def inference_bill(
    policies: Sequence[StoredModel],
    judges: Sequence[StoredModel],
    work: InferenceWork,
    *,
    dtype: str,
    quantization: str | None,
) -> InferenceBill:
    """The bill of a stage without gradients, with the policy that needs most."""
    number = 2 if dtype == "bfloat16" else 4
    frozen = sum(judge.weight_bytes(dtype, quantization) for judge in judges)
    judging = 0
    for judge in judges if work.judged is not None else ():
        tokens = work.judged.within(judge.size.positions).tokens  # type: ignore[union-attr]
        judging = max(judging, number * tokens * _numbers_per_token(judge))
    bills = [InferenceBill(0, frozen, judging=judging)]
    for policy in policies:
        layer, earlier, logits = _scoring(policy, work, number)
        bills.append(
            InferenceBill(
                weights=policy.weight_bytes(dtype, quantization),
                frozen=frozen,
                sampling=_sampling(policy, work, number),
                layer=layer,
                earlier=earlier,
                logits=logits,
                judging=judging,
            )
        )
    return max(bills, key=lambda bill: (bill.peak, bill.weights))


def _numbers_per_token(model: StoredModel) -> int:
    """Largest number of values per token in a layer without gradients.

    Rotary embeddings have six vectors of the width and keys and values: the residual stream, its
    norm, the queries, and three in which the queries are rotated. The feed-forward layer has three
    vectors, below the residual stream and its norm, and one more for the sum with an adapter.
    """
    shape = Shape.of(model.size)
    rotation = 6 * shape.width + 2 * shape.key_value
    return max(rotation, 2 * shape.width + (3 + (model.adapter > 0)) * shape.inner)


def _sampling(policy: StoredModel, work: InferenceWork, number: int) -> int:
    """Bytes of reading the prompts, or of the last token of all rows."""
    if work.sampled is None:
        return 0
    shape = Shape.of(policy.size)
    rows = work.sampled.within(policy.size.positions)
    prompts = max(work.prompts, min(MIN_ROWS, rows.number))
    cached = 2 * shape.layers * shape.key_value
    reading = number * prompts * rows.prompt * (cached + _numbers_per_token(policy))
    return max(reading, sampling_bytes(policy.size, rows.number, rows.tokens, number, work.copies))


def _scoring(policy: StoredModel, work: InferenceWork, number: int) -> tuple[int, int, int]:
    """Bytes of a layer, of earlier logits, and of logits, in the batches that need most of them.

    Log-probabilities of pairs need a second tensor of the size of the logits; those of sampled
    completions need three for a part of them. Two batches have logits at the same time.
    """
    layer = earlier = most = 0
    for rows, parts in ((work.drift, 3), (work.pairs, 1)):
        if rows is None:
            continue
        capped = rows.within(policy.size.positions)
        fitting = max(capped.completion, MOST_LOGITS // max(1, policy.size.vocabulary))
        scored = min(capped.number * capped.completion, fitting)
        is_all = capped.is_all and scored == capped.number * capped.completion
        row = capped.prompt + capped.completion
        tokens = min(capped.tokens, scored * row // max(1, capped.completion))
        logits = 4 * scored * policy.size.vocabulary
        further = logits if parts == 1 else 3 * 4 * min(ROWS, scored) * policy.size.vocabulary
        before = 0 if is_all else logits
        half = logits // 2 if number == 2 else 0
        states = number * (tokens + scored) * policy.size.width
        layer = max(layer, number * tokens * _numbers_per_token(policy))
        earlier = max(earlier, before)
        most = max(most, logits + max(further, before + half + states))
    return layer, earlier, most


def sampled_copies(temperature: float, top_p: float) -> int:
    """Tensors of the size of the last logits while the next token is chosen.

    The most likely token needs those of the step before as well. A random one needs probabilities
    and random numbers twice. ``top_p`` needs the scaled ones, sorted, with places in 64 bits,
    probabilities and their sums.
    """
    if temperature == 0:
        return 2
    return 4 if top_p == 1 else 7


def longest_prompt(statistics: Mapping[str, Any], split: str) -> int | None:
    """Tokens of the longest prompt of a split, at 1.35 a word; None if it is unknown."""
    words = statistics.get("longest_prompts", {}).get(split)
    return None if words is None else round(words * TOKENS_PER_WORD)


def inference_reductions(
    config: Any, work: InferenceWork
) -> Iterator[tuple[str, InferenceWork, str, str | None]]:
    """Changes that may lower the peak, each alone: its name, work, ``dtype``, ``quantization``."""
    dtype, quantization = config.dtype, config.quantization
    if config.batch_size > 1:
        yield f"batch_size: {config.batch_size // 2}", work.halved(), dtype, quantization
    if dtype == "float32":
        yield "dtype: bfloat16", work, "bfloat16", quantization
    if quantization is None:
        yield "quantization: nf4", work, dtype, "nf4"
