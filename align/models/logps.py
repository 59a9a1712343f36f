"""Log-probabilities of completions under a model, and the tile size of TRL's LM head on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.errors import UserError
from align.models.tokenization import pad_rows, tokenize_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.models.tokenization import Message

ROWS = 512
"""Rows of logits whose probabilities are computed at once, which bounds the memory."""
LOGITS = 2**28
"""Logits in memory at once, 1 GiB in float32; more only if a single completion has more."""


def completion_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[Message], Sequence[Message]]],
    *,
    batch_size: int,
    max_length: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, " rows"]:
    """Log-probability of each completion given its prompt, summed over its tokens, eos included.

    A row is a prompt and its completion, both lists of messages, with the tokens on which the
    stages train. Rows are truncated to ``max_length`` tokens. NaN where truncation leaves nothing
    of a completion.

    Raises:
        UserError: A log-probability is not finite for another reason.
    """
    import torch
    from torch.nn.functional import cross_entropy

    tokenized = tokenize_rows(tokenizer, [row[0] for row in rows], [row[1] for row in rows])
    sequences = [row.ids[:max_length] for row in tokenized]
    prompts = [row.ids[: row.start] for row in tokenized]
    result = torch.zeros(len(rows), dtype=torch.float64)
    done = 0
    for batch in _batches(model, tokenizer, prompts, sequences, batch_size=batch_size):
        logps = -cross_entropy(batch.logits, batch.tokens, reduction="none")
        sums = batch.sum_rows(logps)
        _check_finite(sums, model)
        sums[~batch.has_tokens] = torch.nan
        result[torch.tensor(batch.rows)] = sums
        done += len(batch.rows)
        progress(done, len(rows))
    return result


@dataclass(frozen=True, slots=True)
class SampledLogps:
    """Log-probabilities and entropies of sampled completions, summed over their tokens."""

    logps: Float[Tensor, " rows"]
    entropies: Float[Tensor, " rows"]
    """Sum over the tokens of the entropy of the distribution that each is drawn from, in nats."""


def sampled_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    temperature: float,
    batch_size: int,
) -> SampledLogps:
    """Log-probabilities of sampled tokens at a sampling temperature, the stop token included.

    A row is a tokenized prompt and the tokens that a policy sampled for it. Reading the tokens, and
    not their text, matters: encoding a text again may give other tokens than were sampled.

    Raises:
        UserError: A log-probability is not finite.
    """
    import torch

    sequences = [[*prompt, *completion] for prompt, completion in rows]
    prompts = [list(prompt) for prompt, _ in rows]
    logps, entropies = (torch.zeros(len(rows), dtype=torch.float64) for _ in range(2))
    for batch in _batches(model, tokenizer, prompts, sequences, batch_size=batch_size):
        parts = zip(batch.logits.split(ROWS), batch.tokens.split(ROWS), strict=True)
        columns = []
        for logits, tokens in parts:
            distribution = torch.log_softmax(logits / temperature, dim=-1)
            entropy = torch.special.entr(distribution.exp()).sum(dim=-1)
            columns.append(torch.stack([distribution.gather(1, tokens[:, None])[:, 0], entropy]))
        token_logps, token_entropies = torch.cat(columns, dim=1)
        where = torch.tensor(batch.rows)
        logps[where] = batch.sum_rows(token_logps)
        entropies[where] = batch.sum_rows(token_entropies)
    _check_finite(logps, model)
    return SampledLogps(logps, entropies)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Logits of the completions of some rows."""

    rows: list[int]
    """Index of each row."""
    logits: Float[Tensor, "tokens vocabulary"]
    """Logits in float32 at each position before a token of a completion."""
    tokens: Int[Tensor, " tokens"]
    row_of_token: Int[Tensor, " tokens"]
    """Place in ``rows`` of each token's row."""
    has_tokens: Bool[Tensor, " rows"]
    """Whether a row has a token of a completion."""

    def sum_rows(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " rows"]:
        """Sum of the values of each row's tokens, in float64 on the CPU."""
        import torch

        sums = torch.zeros(len(self.rows), dtype=torch.float64)
        return sums.index_add_(0, self.row_of_token.cpu(), values.double().cpu())


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sequences: Sequence[list[int]],
    *,
    batch_size: int,
) -> Iterator[_Batch]:
    """Logits of the tokens behind the prompt of each sequence.

    A batch has at most ``batch_size`` rows and, unless it is a single row, :data:`LOGITS` logits.
    """
    import torch

    # Completions of one prompt share a batch, so that prefix sharing computes the prompt once.
    order = sorted(
        range(len(sequences)), key=lambda i: (-len(prompts[i]), prompts[i], -len(sequences[i]))
    )
    model.eval()
    n_tokens = [len(ids) - len(p) for ids, p in zip(sequences, prompts, strict=True)]
    most = LOGITS // len(tokenizer)
    for batch in _divide(order, n_tokens, most_rows=batch_size, most_tokens=most):
        ids, mask = pad_rows(
            [sequences[i] for i in batch],
            pad=tokenizer.pad_token_id,
            side="right",
            device=model.device,
        )
        columns = torch.arange(ids.shape[1], device=ids.device)
        begin = torch.tensor([len(prompts[i]) for i in batch], device=ids.device)
        scored = (mask.bool() & (columns >= begin[:, None]))[:, 1:]  # [batch, time - 1]
        # The head computes logits of the completions' positions only. Operations that a model
        # applies to its logits (Gemma's soft cap, Granite's scale) still run.
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args, scored=scored: (args[0][:, :-1][scored][None],)
        )
        with hook, torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
        row = torch.arange(len(batch), device=ids.device)[:, None].expand_as(scored)[scored]
        yield _Batch(batch, logits, ids[:, 1:][scored], row, scored.any(dim=1).cpu())


def _divide(
    order: Sequence[int], n_tokens: Sequence[int], *, most_rows: int, most_tokens: int
) -> Iterator[list[int]]:
    """Divide rows into batches with at most so many rows and tokens; a longer row is alone."""
    batch: list[int] = []
    for row in order:
        if batch and (
            len(batch) == most_rows or sum(n_tokens[i] for i in [*batch, row]) > most_tokens
        ):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _check_finite(sums: Tensor, model: PreTrainedModel) -> None:
    if not bool(sums.isfinite().all()):
        raise UserError(
            f"{model.name_or_path}: its log-probabilities are not finite numbers, so its weights "
            "are damaged or its data type is too small; train or download it again"
        )


@contextlib.contextmanager
def small_vocabulary_tiles() -> Iterator[None]:
    """On a CPU, TRL's LM head computes 256 tokens at a time inside this block.

    TRL's tile of 4,096 tokens suits a GPU. With a vocabulary of 8,192, its logits take 128 MiB and
    pass through memory several times, whereas 8 MiB remain in the cache. Sums change by rounding.
    """
    from accelerate import PartialState
    from trl.kernels import chunked_logprob

    default = chunked_logprob.TOKEN_CHUNK_SIZE
    if PartialState().device.type == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE = min(default, 256)
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = default
