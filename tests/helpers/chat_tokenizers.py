"""Tokenizers with a chat template and the special tokens that it names."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import AddedToken, decoders
from transformers import PreTrainedTokenizerFast

from align.models import tokenization

MARKS = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|</?think>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>"
)


def make_tokenizer(template: str, *, listed: tuple[str, ...] = (), eos: str = "</s>") -> Any:
    """A byte-level tokenizer with the tokens of a template; ``listed`` are further end tokens."""
    bpe = tokenization.train_bpe(["the question answer reasons\n\n\n"] * 9, vocab_size=300)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", pad_token="<pad>")
    marks = sorted({*MARKS.findall(template), *listed, eos})
    # as in DeepSeek's tokenizers, the tokens around a turn are not special
    tokenizer.add_tokens(
        [AddedToken(mark, special=not re.search("think|｜", mark)) for mark in marks]
    )
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    tokenizer.name_or_path = "folder"
    ends = frozenset(tokenizer.convert_tokens_to_ids(list(listed)))
    setattr(tokenizer, tokenization.ENDS, ends)
    return tokenizer
