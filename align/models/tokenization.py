"""Conversations to token ids and back: chat templates, padding, and tokenizers.

SFT, DPO and KTO are not tokenized here: TRL tokenizes their rows when a trainer is built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.loading import cannot_load

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""One turn of a conversation; :mod:`align.data.rows` has the same type for the rows of tables."""


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
) -> list[list[int]]:
    """Token ids of prompts, up to and including the header of the assistant's turn.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; train it with an "
            "`sft` stage that sets "
            "one: `trainer: {chat_template_path: FOLDER_OR_HUB_ID_OR_JINJA_FILE}`"
        )
    return [
        tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
        for prompt in prompts
    ]


def assistant_turn(text: str) -> list[Message]:
    """Return a completion as messages: a single turn of the assistant."""
    return [{"role": "assistant", "content": text}]


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, finished: bool
) -> str:
    """Text of a sampled completion, without the stop token in which it ends where ``finished``."""
    tokens = tokens[:-1] if finished else tokens
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def until_stop(row: Sequence[int], stops: Collection[int]) -> list[int]:
    """The tokens up to and including the first stop token; all tokens if there is none.

    >>> until_stop([5, 6, 2, 7], {2})
    [5, 6, 2]
    """
    end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
    return list(row[: end + 1])


def tokenize_for_reward(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[Sequence[Message]],
) -> list[list[int]]:
    """Token ids of prompts with completions as a reward model reads them, in every stage.

    A row ends in the first eos after the prompt. A template may write more behind it (ChatML writes
    a line feed), which a policy that stops at eos never generates; a template that writes no eos
    gets one appended.
    """
    eos = tokenizer.eos_token_id
    rows = []
    for prompt, completion, prompt_ids in zip(
        prompts, completions, tokenize_prompts(tokenizer, prompts), strict=True
    ):
        ids = tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)
        start = common_prefix(prompt_ids, ids)
        body = until_stop(ids[start:], {eos})
        rows.append(ids[:start] + body + ([] if body[-1:] == [eos] else [eos]))
    return rows


def pad_rows(
    rows: Sequence[Sequence[int]], *, pad: int, side: str, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[rows, time]`` padded on one side, and their mask: 1 where a token is real."""
    import torch

    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        left, right = (fill, 0) if side == "left" else (0, fill)
        ids.append([pad] * left + list(row) + [pad] * right)
        mask.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def new_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_length: int
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with a ChatML template.

    The eos token is ``<|im_end|>``, the pad token ``<|endoftext|>``.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_bpe(texts, vocab_size=vocab_size)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    result.chat_template = CHATML
    return result


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train byte-level BPE; the special tokens of ChatML get the first ids.

    Source: Sennrich et al. 2016, arXiv:1508.07909, applied to bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(source: Path | str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; one without a pad token pads with eos.

    Raises:
        UserError: The tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(cannot_load(source, "tokenizer", error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def set_pad_token_for_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad token that differs from eos.

    A sequence classifier of transformers reads the last token that is not a pad token. If pad were
    eos, it would read the token before the end.

    Raises:
        UserError: The vocabulary has no other special token.
    """
    candidates = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token]
    candidates += [str(token) for token in tokenizer.added_tokens_decoder.values()]
    candidates += ["\u0100", "<0x00>"]  # the null byte in byte-level BPE and in SentencePiece
    eos = tokenizer.eos_token
    vocabulary = tokenizer.get_vocab()
    pad = next(
        (token for token in candidates if token and token != eos and token in vocabulary), None
    )
    if pad is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no special token except eos, but a "
            "reward model needs another one for padding; add a pad token to the tokenizer and "
            "save it"
        )
    tokenizer.pad_token = pad
