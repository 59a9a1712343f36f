"""Batched sampling of completions, and their log-probabilities under a model.

Prompts are padded left, completions right, and lengths decide what is real: a pad token may equal eos.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.errors import UserError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled text, its tokens without eos, and whether it ended by itself."""

    text: str
    n_tokens: int
    finished: bool


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
) -> list[list[int]]:
    """Tokens of prompts up to where the assistant's turn begins.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; train it with an `sft` stage that names "
            "one: `trainer: {chat_template_path: FOLDER_OR_HUB_ID_OR_JINJA_FILE}`"
        )
    return [
        tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
        for prompt in prompts
    ]


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

    tokens = prompt_ids(tokenizer, prompts)
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
            _completion(row, stops, tokenizer) for row in continuations(model, rows, stops)
        ]
        for k, i in enumerate(batch):
            found[i] = completions[k * n_completions : (k + 1) * n_completions]
        progress(done + 1, len(mine))
    return found


def continuations(
    model: Any, rows: Sequence[Sequence[int]], stops: Collection[int]
) -> list[list[int]]:
    """Sample one continuation of each row by ``model.generation_config``: its tokens, the stop included if it has one.

    What ``generate`` writes behind a stop, where other rows of the batch go on, is cut off.
    """
    import torch

    pad = model.generation_config.pad_token_id
    inputs, mask = padded(rows, pad=pad, side="left", device=model.device)
    with torch.inference_mode():
        output = model.generate(input_ids=inputs, attention_mask=mask)
    return [until_stop(row, stops) for row in output[:, inputs.shape[1] :].tolist()]


def until_stop(row: Sequence[int], stops: Collection[int]) -> list[int]:
    """The tokens up to and including the first stop; all where there is none.

    >>> until_stop([5, 6, 2, 7], {2})
    [5, 6, 2]
    """
    end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
    return list(row[: end + 1])


def judged_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[Sequence[Message]],
) -> list[list[int]]:
    """Tokens of prompts and completions as a reward model reads them, in training, evaluation and PPO alike.

    They end in the first eos after the prompt. A template may write more behind it (ChatML a line feed), which a policy
    that stops at eos never says; and one that writes no eos gets one.
    """
    eos = tokenizer.eos_token_id
    found = []
    for prompt, completion, head in zip(
        prompts, completions, prompt_ids(tokenizer, prompts), strict=True
    ):
        whole = tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)
        start = _common(head, whole)
        body = until_stop(whole[start:], {eos})
        found.append(whole[:start] + body + ([] if body[-1:] == [eos] else [eos]))
    return found


def sample_together(
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


def padded(
    rows: Sequence[Sequence[int]], *, pad: int, side: str, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[rows, time]`` and their mask, 1 where a token is real."""
    import torch

    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        left, right = (fill, 0) if side == "left" else (0, fill)
        ids.append([pad] * left + list(row) + [pad] * right)
        mask.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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

    heads = prompt_ids(tokenizer, [prompt for prompt, _ in rows])
    wholes = [
        tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)[:max_length]
        for prompt, completion in rows
    ]
    starts = [_common(head, whole) for head, whole in zip(heads, wholes, strict=True)]
    # Long prompts first, completions of one prompt together: prefix sharing then computes it once.
    order = sorted(range(len(rows)), key=lambda i: (-len(heads[i]), heads[i], -len(wholes[i])))
    result = torch.zeros(len(rows), dtype=torch.float64)
    model.eval()
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, mask = padded(
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


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
