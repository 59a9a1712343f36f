"""models.logps"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from align.models.tokenization import common_prefix, pad_rows, tokenize_prompts

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

    A row is a prompt and its completion, both lists of messages. Like TRL's trainers, the completion begins where the
    tokens of the prompt alone and of the whole differ, and a row is cut off at ``max_length`` tokens. Where nothing of the
    completion is left the result is NaN.
    """
    import torch
    from torch.nn.functional import cross_entropy

    heads = tokenize_prompts(tokenizer, [prompt for prompt, _ in rows])
    wholes = [
        tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)[:max_length]
        for prompt, completion in rows
    ]
    starts = [common_prefix(head, whole) for head, whole in zip(heads, wholes, strict=True)]
    # Long prompts first, completions of one prompt together: prefix sharing then computes it once.
    order = sorted(range(len(rows)), key=lambda i: (-len(heads[i]), heads[i], -len(wholes[i])))
    result = torch.zeros(len(rows), dtype=torch.float64)
    model.eval()
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, mask = pad_rows(
            [wholes[i] for i in batch],
            pad=tokenizer.pad_token_id,
            side="right",
            device=model.device,
        )
        places = torch.arange(ids.shape[1], device=ids.device)
        begin = torch.tensor([starts[i] for i in batch], device=ids.device)
        scored = (mask.bool() & (places >= begin[:, None]))[:, 1:]
        # Only the completion's positions reach the vocabulary: the rest of the logits are never made. What a model does
        # to its logits after its head (Gemma's soft cap, Granite's scale) stays.
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, given, scored=scored: (given[0][:, :-1][scored][None],)
        )
        with hook, torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            logps = -cross_entropy(logits, ids[:, 1:][scored], reduction="none")
        row = torch.arange(len(batch), device=ids.device)[:, None].expand_as(scored)[scored]
        sums = torch.zeros(len(batch), dtype=torch.float64)
        sums.index_add_(0, row.cpu(), logps.double().cpu())
        sums[~scored.any(dim=1).cpu()] = torch.nan
        result[torch.tensor(batch)] = sums
        progress(min(first + batch_size, len(order)), len(order))
    return result


@contextlib.contextmanager
def small_vocabulary_tiles() -> Iterator[None]:
    """On CPU, let TRL's LM head take 256 tokens at a time, for as long as this lasts; sums change by rounding.

    Its 4,096 suit a GPU: a tile of logits is then 128 MiB at a vocabulary of 8,192 and goes through memory several
    times, where one of 8 MiB stays in the cache.
    """
    from accelerate import PartialState
    from trl.kernels import chunked_logprob

    usual = chunked_logprob.TOKEN_CHUNK_SIZE
    if PartialState().device.type == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE = min(usual, 256)
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = usual
