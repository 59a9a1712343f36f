"""The files of a model folder that decide its tokens, read without transformers and torch.

``align check`` counts tokens with them. Only folders with a ``tokenizer.json`` are covered; every
stage loads its tokenizer with :mod:`align.models.tokenization`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ArtifactError, UserError
from align.models.chat_templates import ChatTemplate
from align.models.conversations import Conversations
from align.models.files import ADAPTER_CONFIG, read_adapter_base
from align.models.model_config import WRITTEN_TOKENS, vocabulary_problem, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"
NO_TEMPLATE = "its tokenizer has no chat template"


def conversations(
    tokenizer: Tokenizer,
    name: str,
    *,
    template: str,
    special_tokens: Mapping[str, str],
    ends: frozenset[int] = frozenset(),
) -> Conversations:
    """A tokenizer with its chat template; ``ends`` are end tokens besides its eos token."""
    added = tokenizer.get_added_tokens_decoder()
    eos = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
    ends |= token_ids(eos)
    special = {token.content for i, token in added.items() if token.special or i in ends}
    return Conversations(
        ChatTemplate(template, name, special_tokens),
        functools.partial(_encode_batch, tokenizer),
        ends,
        frozenset(special.union(special_tokens.values())),
        frozenset(token.content for token in added.values()),
    )


def read_conversations(
    folder: Path, *, template: Path | None = None, eos_token: str | None = None
) -> Conversations | None:
    """The tokenizer of a folder with its chat template; None if the folder does not suffice.

    ``template``, a jinja file or the folder of another tokenizer, and ``eos_token`` replace its
    own, as the fields of the same meaning do in TRL's trainers.

    Raises:
        UserError: A file is malformed, or there is no chat template.
    """
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = _read(folder / "tokenizer.json", Tokenizer.from_file)
    special, text = read_special_tokens(folder), read_template(folder)
    ends = read_end_tokens(folder)
    if template is not None and template.is_dir():
        other = _read(template / "tokenizer.json", Tokenizer.from_file)
        tokenizer.add_tokens(
            [
                token
                for token in other.get_added_tokens_decoder().values()
                if tokenizer.token_to_id(token.content) is None
            ]
        )
        text = read_template(template)
        special |= {"eos_token": read_special_tokens(template).get("eos_token", "")}
    elif template is not None:
        text = _read(template, lambda file: Path(file).read_text(encoding="utf-8"))
    if eos_token is not None:
        special["eos_token"] = eos_token
    if text is None:
        raise UserError(
            f"{folder}: {NO_TEMPLATE}; name one in its `sft` stage: "
            "`trainer: {chat_template_path: FOLDER_OR_HUB_ID_OR_JINJA_FILE}`"
        )
    return conversations(tokenizer, str(folder), template=text, special_tokens=special, ends=ends)


def has_token(folder: Path, token: str) -> bool | None:
    """Whether the tokenizer of a folder has a token; None without a ``tokenizer.json``."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer: Tokenizer = _read(file, Tokenizer.from_file)
    return tokenizer.token_to_id(token) is not None


def check_vocabulary(folder: Path, *, embeddings: int | None = None) -> None:
    """Check that the model in a folder has an embedding for every token that a row can have.

    ``embeddings`` is their number, by default that in the config of the model.

    Raises:
        UserError: It has fewer, or a file is malformed.
    """
    from tokenizers import Tokenizer

    if embeddings is None:
        embeddings = vocabulary_size(_read_json(_base_folder(folder) / "config.json"))
    if embeddings is None or not (folder / "tokenizer.json").is_file():
        return
    tokenizer = _read(folder / "tokenizer.json", Tokenizer.from_file)
    tokens = read_special_tokens(folder)
    problem = vocabulary_problem(
        folder,
        tokenizer.get_vocab(),
        special={t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special},
        written=[read_template(folder), *map(tokens.get, WRITTEN_TOKENS)],
        embeddings=embeddings,
    )
    if problem is not None:
        raise ArtifactError(problem)


def _base_folder(folder: Path) -> Path:
    """The folder of the full weights: that of the base of an adapter, or the folder itself."""
    if (folder / ADAPTER_CONFIG).is_file():
        return Path(read_adapter_base(folder / ADAPTER_CONFIG, folder).source)
    return folder


def read_template(folder: Path) -> str | None:
    """The chat template of a folder: its own file, or in ``tokenizer_config.json``."""
    if (folder / TEMPLATE).is_file():
        return str(_read(folder / TEMPLATE, lambda file: Path(file).read_text(encoding="utf-8")))
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several templates by name
        template = {each.get("name"): each.get("template") for each in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a template may write, such as ``bos_token``, by name."""
    values = _read_json(folder / "special_tokens_map.json")
    values |= _read_json(folder / "tokenizer_config.json")
    tokens = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in values.items()
        if key.endswith("_token")
    }
    return {key: token for key, token in tokens.items() if isinstance(token, str)}


MAX_TOKEN_ID = 2**31
"""Token ids are smaller; a larger or negative ``eos_token_id`` is none."""


def read_end_tokens(folder: Path) -> frozenset[int]:
    """The end tokens in ``generation_config.json`` of a model, or else in its ``config.json``.

    Of an adapter, they are those of its base, unless its folder has the first file.
    """
    if (folder / GENERATION_CONFIG).is_file():
        return listed_ends(_read_json(folder / GENERATION_CONFIG))
    if (base := _base_folder(folder)) != folder:
        return read_end_tokens(base)
    return listed_ends(_read_json(folder / "config.json"))


def listed_ends(config: Mapping[str, Any]) -> frozenset[int]:
    """The end tokens in the content of ``generation_config.json`` or ``config.json``."""
    nested = config.get("text_config")
    nested = nested if isinstance(nested, dict) else {}
    return token_ids(config.get("eos_token_id", nested.get("eos_token_id")))


def token_ids(value: Any) -> frozenset[int]:
    """The token ids in an ``eos_token_id``, which is a number, a list or missing."""
    values = value if isinstance(value, list) else [value]
    numbers = (i for i in values if isinstance(i, int) and not isinstance(i, bool))
    return frozenset(i for i in numbers if 0 <= i < MAX_TOKEN_ID)


def _encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    if not file.is_file():
        return {}
    value = _read(file, lambda path: json.loads(Path(path).read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object; save the tokenizer again")
    return value


def _read(file: Path, read: Any) -> Any:
    try:
        return read(str(file))
    except Exception as error:  # `tokenizers` raises plain exceptions
        raise UserError(f"{file}: cannot be read: {error}; save the tokenizer again") from None
