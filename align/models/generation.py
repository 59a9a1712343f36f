"""Batched sampling of completions, and their log-probabilities under a model.

Prompts are padded left, completions right, and lengths decide what is real: a pad token may equal eos.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.models.tokenization import pad_rows, tokenize_prompts, until_stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.models.tokenization import Message


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled text, its tokens without eos, and whether it ended by itself."""

    text: str
    n_tokens: int
    finished: bool


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    n_completions: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, list[Completion]]:
    """Sample completions of those prompts that fall to ``rank``, by the prompt's index.

    Prompts of like length go together, ``batch_size`` completions at a time. Each batch has a random state of its own,
    from the seed and its place, so any number of processes samples the same completions.
    """
    import torch

    tokens = tokenize_prompts(tokenizer, prompts)
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    size = max(1, batch_size // n_completions)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = list(enumerate(batches))[rank::world_size]
    stops = set_sampling(
        model, tokenizer, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens
    )
    found: dict[int, list[Completion]] = {}
    model.eval()
    for done, (place, batch) in enumerate(mine):
        torch.manual_seed(seed * 1_000_003 + place)
        rows = [tokens[i] for i in batch for _ in range(n_completions)]
        completions = [
            _completion(row, stops, tokenizer) for row in generate_tokens(model, rows, stops)
        ]
        for k, i in enumerate(batch):
            found[i] = completions[k * n_completions : (k + 1) * n_completions]
        progress(done + 1, len(mine))
    return found


def generate_tokens(
    model: Any, rows: Sequence[Sequence[int]], stops: Collection[int]
) -> list[list[int]]:
    """Sample one continuation of each row by ``model.generation_config``: its tokens, the stop included if it has one.

    What ``generate`` writes behind a stop, where other rows of the batch go on, is cut off.
    """
    import torch

    pad = model.generation_config.pad_token_id
    inputs, mask = pad_rows(rows, pad=pad, side="left", device=model.device)
    with torch.inference_mode():
        output = model.generate(input_ids=inputs, attention_mask=mask)
    return [until_stop(row, stops) for row in output[:, inputs.shape[1] :].tolist()]


def sample_on_all_ranks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    **how: Any,
) -> list[list[Completion]]:
    """What :func:`sample` finds for all prompts, in their order, on every process; the processes share the work."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    mine = sample(
        model,
        tokenizer,
        prompts,
        rank=state.process_index,
        world_size=state.num_processes,
        **how,
    )
    merged = dict(gather_object(list(mine.items())))
    return [merged[i] for i in range(len(prompts))]


def set_sampling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> set[int]:
    """Make ``model.generate`` sample from the policy and nothing else. Returns the tokens that end a completion.

    A model's folder may ask for more than we are told, such as Qwen2.5's ``repetition_penalty: 1.1``, and ``generate`` adds
    it even to a configuration that it is given: so the model's own is replaced. Its stop tokens stay.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    stops = {i for i in [*own, tokenizer.eos_token_id] if i is not None}
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(stops) or None,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    return stops


def _completion(row: list[int], stops: set[int], tokenizer: PreTrainedTokenizerBase) -> Completion:
    finished = row[-1] in stops
    kept = row[:-1] if finished else row
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Completion(text, len(kept), finished)
