"""Log-probabilities of completions under a model, and the tile size of TRL's LM head on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from align.errors import UserError
from align.models.tokenization import pad_rows, tokenize_rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.models.tokenization import Message


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
    starts = [row.start for row in tokenized]
    prompts = [row.ids[: row.start] for row in tokenized]
    # Completions of one prompt share a batch, so that prefix sharing computes the prompt once.
    order = sorted(
        range(len(rows)), key=lambda i: (-len(prompts[i]), prompts[i], -len(sequences[i]))
    )
    result = torch.zeros(len(rows), dtype=torch.float64)
    model.eval()
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, mask = pad_rows(
            [sequences[i] for i in batch],
            pad=tokenizer.pad_token_id,
            side="right",
            device=model.device,
        )
        columns = torch.arange(ids.shape[1], device=ids.device)
        begin = torch.tensor([starts[i] for i in batch], device=ids.device)
        scored = (mask.bool() & (columns >= begin[:, None]))[:, 1:]  # [batch, time - 1]
        # The head computes logits of the completions' positions only. Operations that a model
        # applies to its logits (Gemma's soft cap, Granite's scale) still run.
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args, scored=scored: (args[0][:, :-1][scored][None],)
        )
        with hook, torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            logps = -cross_entropy(logits, ids[:, 1:][scored], reduction="none")
        row = torch.arange(len(batch), device=ids.device)[:, None].expand_as(scored)[scored]
        sums = torch.zeros(len(batch), dtype=torch.float64)
        sums.index_add_(0, row.cpu(), logps.double().cpu())
        _check_finite(sums, model)
        sums[~scored.any(dim=1).cpu()] = torch.nan
        result[torch.tensor(batch)] = sums
        progress(min(first + batch_size, len(order)), len(order))
    return result


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
