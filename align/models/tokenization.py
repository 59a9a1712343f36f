"""Conversations to token ids and back, with a tokenizer of transformers; padding; tokenizers.

What a row is defines :mod:`align.models.conversations`. TRL tokenizes the rows of SFT, DPO and KTO
when a trainer is built; within :func:`rows_for_trl` it does so by the same definition.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.chat_templates import ChatTemplate
from align.models.conversations import Conversations, TokenRow
from align.models.files import ADAPTER_CONFIG, read_adapter_base
from align.models.loading import adapter_base, cannot_load
from align.models.tokenizer_files import (
    GENERATION_CONFIG,
    NO_TEMPLATE,
    listed_ends,
    read_end_tokens,
    token_ids,
)

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""One turn of a conversation; :mod:`align.data.rows` has the same type for the rows of tables."""
ENDS = "end_token_ids"
"""Attribute of a loaded tokenizer: the end tokens that the files of its model list."""


def conversations(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> Conversations:
    """A tokenizer with its chat template, or with another one.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    if tokenizer.chat_template is None and chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: {NO_TEMPLATE}; train it with an "
            "`sft` stage that sets "
            "one: `trainer: {chat_template_path: FOLDER_OR_HUB_ID_OR_JINJA_FILE}`"
        )
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    ends = end_tokens(tokenizer)
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {content for content, is_special in added.items() if is_special}
    special |= added.keys() & {str(token) for token in tokenizer.convert_ids_to_tokens(list(ends))}
    return Conversations(
        ChatTemplate(
            chat_template or tokenizer.get_chat_template(),
            str(tokenizer.name_or_path),
            tokenizer.special_tokens_map,
        ),
        functools.partial(_encode_batch, tokenizer),
        ends,
        frozenset(special),
        frozenset(added),
    )


def _encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens at which a policy with this tokenizer stops: eos, and those its model's files list."""
    listed: frozenset[int] = getattr(tokenizer, ENDS, frozenset())
    return listed | token_ids(tokenizer.eos_token_id)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
) -> list[list[int]]:
    """Token ids of prompts, up to and including the header of the assistant's turn.

    Raises:
        UserError: The tokenizer has no chat template, or the template fails.
    """
    return conversations(tokenizer).prompts(prompts)


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    completions: Sequence[Sequence[Message]],
) -> list[TokenRow]:
    """Prompts with completions as token ids, as SFT, DPO, KTO and evaluation read them.

    Raises:
        UserError: The tokenizer has no chat template, or the template fails.
    """
    return conversations(tokenizer).rows(prompts, completions)


def assistant_turn(text: str) -> list[Message]:
    """Return a completion as messages: a single turn of the assistant."""
    return [{"role": "assistant", "content": text}]


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, finished: bool
) -> str:
    """Text of a sampled completion, without the stop token in which it ends where ``finished``.

    White space remains: a reward model reads the same tokens in this text as the policy sampled.
    """
    tokens = tokens[:-1] if finished else tokens
    return str(
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


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

    A row ends as a completion that a policy has finished. Where the template writes no end token,
    eos is appended.

    Raises:
        UserError: The tokenizer has no chat template or no eos, or the template fails.
    """
    rows = tokenize_rows(tokenizer, prompts, completions)
    eos = tokenizer.eos_token_id
    if eos is None and not all(row.ended for row in rows):
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no eos token, and its chat template "
            "writes no end token; set `eos_token` in its `tokenizer_config.json`"
        )
    return [row.ids if row.ended else [*row.ids, eos] for row in rows]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token in which a completion ends as a reward model reads it.

    Raises:
        UserError: The tokenizer has no chat template or no eos, or the template fails.
    """
    turns = {"role": "user", "content": "User"}, {"role": "assistant", "content": "Assistant"}
    return tokenize_for_reward(tokenizer, [turns[:1]], [turns[1:]])[0][-1]


class RowsForTRL:
    """Replaces ``apply_chat_template`` of a tokenizer while TRL tokenizes conversations.

    TRL then reads the rows of :class:`align.models.conversations.Conversations`: the same context,
    the same end and the same errors as everywhere else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, end_repair: str | None) -> None:
        self.tokenizer = tokenizer
        self.end_repair = end_repair
        self._known: dict[Any, Conversations] = {}

    def __call__(
        self,
        conversation: Sequence[Message],
        *,
        chat_template: str | None = None,
        tools: Any = None,
        add_generation_prompt: bool = False,
        **_: Any,
    ) -> Any:
        """Token ids of a prompt with ``add_generation_prompt``, else of a prompt with completion.

        Raises:
            UserError: The template fails, or writes no end token although one is required.
        """
        template = self.conversations(chat_template)
        if add_generation_prompt:
            (ids,) = template.prompts([conversation], tools=tools)
        else:
            (row,) = template.rows([conversation[:-1]], [conversation[-1:]], tools=tools)
            ids = row.ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def conversations(self, chat_template: str | None = None) -> Conversations:
        """The present template: TRL sets ``chat_template_path`` and ``eos_token`` by itself.

        Raises:
            UserError: The template is malformed, or writes no end token although one is required.
        """
        tokenizer = self.tokenizer
        key = (chat_template or str(tokenizer.chat_template), tokenizer.eos_token, len(tokenizer))
        if key not in self._known:
            self._known[key] = conversations(tokenizer, chat_template)
            if self.end_repair is not None:
                self._known[key].check_end(repair=self.end_repair)
        return self._known[key]

    def __getstate__(self) -> dict[str, Any]:
        """The settings only: `datasets` hashes this object and sends it to its processes."""
        return {"tokenizer": self.tokenizer, "end_repair": self.end_repair, "_known": {}}


@contextlib.contextmanager
def rows_for_trl(tokenizer: PreTrainedTokenizerBase, *, end_repair: str | None) -> Iterator[None]:
    """Inside this block, TRL tokenizes conversations as all other stages do.

    ``end_repair`` is the repair that the error names where the template writes no end token; with
    None, such a template is accepted.
    """
    tokenizer.apply_chat_template = RowsForTRL(tokenizer, end_repair=end_repair)
    try:
        yield
    finally:
        del tokenizer.apply_chat_template


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
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), revision=revision, trust_remote_code=False
        )
        tokenizer("")  # some values of a config are read only here
    except Exception as error:  # its files may break transformers at any place
        raise UserError(cannot_load(source, "tokenizer", error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    setattr(tokenizer, ENDS, listed_end_tokens(source, revision=revision))
    return tokenizer


def listed_end_tokens(source: Path | str, *, revision: str | None = None) -> frozenset[int]:
    """The end tokens that the files of a model list, in a folder or on the Hub.

    Raises:
        UserError: A file is malformed.
    """
    from transformers.utils import cached_file

    if Path(source).is_dir():
        base = adapter_base(source)
        if base is None or (Path(source) / GENERATION_CONFIG).is_file():
            return read_end_tokens(Path(source))
        return listed_end_tokens(base.source, revision=base.hub_revision)
    for name in (GENERATION_CONFIG, ADAPTER_CONFIG, "config.json"):
        file = cached_file(
            str(source),
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None and name == ADAPTER_CONFIG:
            base = read_adapter_base(Path(file), source)
            return listed_end_tokens(base.source, revision=base.hub_revision)
        if file is not None:
            return listed_ends(json.loads(Path(file).read_text(encoding="utf-8")))
    return frozenset()


def save_end_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``generation_config.json`` into the folder of a reward model.

    transformers writes none for a classifier, but a reward model must read a completion up to the
    tokens at which its policy stops.
    """
    from transformers import GenerationConfig

    GenerationConfig(eos_token_id=sorted(end_tokens(tokenizer))).save_pretrained(str(folder))


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
