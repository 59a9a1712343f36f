"""The exact numbers of tokens of the rows that training stages read, before anything runs.

Rows are tokenized as the stages do, with the chat template, but neither torch nor transformers is
imported. Left out: tokenizers without a ``tokenizer.json``, and models on the Hub that are not in
the local cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from align.config.base import NewModel
from align.config.training import KTO
from align.config.training_base import TRLStage
from align.errors import ArtifactError
from align.models import files, gguf_checks, gguf_files, tokenizer_files, turn_fields
from align.models.chat_templates import REPAIR_OF_NAMED
from align.models.conversations import Conversations, TrainedRow
from align.pipeline.plan import PlannedStage
from align.runtime import artifacts, hub
from align.training import row_limits
from align.training.row_errors import naming_row

T = TypeVar("T")
Tables = Mapping[str, Mapping[str, Sequence[Any]]]
"""The rows of prepared data, by kind and split."""
TOKENIZERS = ("tokenizer.json",)
"""What a model in the cache of the Hub must have, for its tokens to be counted."""
SAMPLE = 200
"""Number of rows whose tokens are counted in any case."""
BATCH = 1_000
"""Number of rows that are tokenized at once."""
MARGIN = 16
"""Tokens by which the template of a row may exceed that of the rows in the sample."""


@dataclass(frozen=True, slots=True)
class TokenizedModel:
    """What is known of the model of a stage before it runs."""

    conversations: Conversations | None = None
    positions: int | None = None
    no_template: str = ""
    """The error where the template of a model without one is needed; empty for others."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of a row, which a stage keeps or leaves out together."""

    prompt: Any
    completions: tuple[Any, ...]
    number: int = 0
    """Number of the row in its table, from 1."""
    table: str = ""

    @property
    def place(self) -> str:
        """The place of the row in messages."""
        return f"row {self.number:,} of {self.table}"


@dataclass(frozen=True, slots=True)
class Counts:
    """The tokens of the rows of a stage."""

    lengths: list[int]
    """Tokens of the longest sequence of each row of a sample."""
    trained: list[int]
    """Trained tokens of each row of the sample, in all of its sequences."""
    lost: int
    """Rows of which nothing can be trained on."""
    truncated: int
    limit: int | None
    """Largest number of tokens of a row."""


def rows_of(stage: TRLStage, tables: Tables) -> list[Sequences]:
    """The training rows of a stage; KTO reads both sides of a pair as rows."""
    rows: list[Sequences] = []
    for table in stage.reads:
        found = tables.get(table.kind, {}).get("train", ())
        if rows and found and not isinstance(stage, KTO):
            break  # of several tables, other stages read the first
        columns = ("chosen", "rejected") if table.kind == "pairs" else ("completion",)
        name = f"{table.kind}-train"
        for number, row in enumerate(found, 1):
            sides = tuple(row[column] for column in columns)
            parts = [(side,) for side in sides] if isinstance(stage, KTO) else [sides]
            rows += [Sequences(row["prompt"], part, number, name) for part in parts]
    return rows


def read_model(
    stage: PlannedStage, rows: Sequence[Sequences], known: Mapping[Path, TokenizedModel]
) -> TokenizedModel:
    """The tokenizer and the positions of the model that a stage starts from.

    A new tokenizer is trained on ``rows``; ``known`` are the models that earlier stages will write.

    Raises:
        UserError: A file is malformed, or there is no chat template.
    """
    config = stage.config
    model = getattr(config, "model", None)
    if isinstance(model, NewModel):
        return _new_model(model, rows)
    fields = config.trl_arguments() if isinstance(config, TRLStage) else {}
    source = stage.inputs["model"]
    revision = getattr(config, "revision", None)
    template, eos_token = fields.get("chat_template_path"), fields.get("eos_token")
    if template is None and eos_token is None:
        return find_model(source, known, revision=revision)
    if template is not None:
        template = Path(template)
        if not template.exists():
            template = hub.cached_folder(str(template), containing=TOKENIZERS)
    is_unknown = template is None and fields.get("chat_template_path") is not None
    if isinstance(source, Path) and source in known:
        model = known[source]
        file = stage.gguf_files.get(source)
        if template is None and model.no_template:
            raise ArtifactError(model.no_template)
        is_unread = model.conversations is None and not model.no_template
        if is_unknown or file is None or is_unread:
            return TokenizedModel(None, model.positions)
        return read_gguf_tokenizer(file, template=template, eos_token=eos_token)
    folder = _folder(source, revision)
    if folder is None:
        return TokenizedModel()
    positions = files.read_position_limit(folder)
    if is_unknown:
        return TokenizedModel(None, positions)
    conversations = tokenizer_files.read_conversations(
        folder, template=template, eos_token=eos_token
    )
    if conversations is not None and template is not None:
        conversations = _with_named_template(conversations, template)
    return TokenizedModel(conversations, positions)


def _with_named_template(conversations: Conversations, template: Path) -> Conversations:
    """Conversations whose errors name the template that the recipe names."""
    named = replace(conversations.template, name=str(template), repair=REPAIR_OF_NAMED)
    return replace(conversations, template=named)


def find_model(
    source: Path | str, known: Mapping[Path, TokenizedModel], *, revision: str | None = None
) -> TokenizedModel:
    """The tokenizer and the positions of a model, given by its folder or Hub id.

    Raises:
        UserError: A file is malformed, or there is no chat template.
    """
    if isinstance(source, Path) and source in known:
        if known[source].no_template:
            raise ArtifactError(known[source].no_template)
        return known[source]
    folder = _folder(source, revision)
    if folder is None:
        return TokenizedModel()
    conversations = tokenizer_files.read_conversations(folder)
    return TokenizedModel(conversations, files.read_position_limit(folder))


def unconverted(stages: Sequence[PlannedStage]) -> dict[Path, TokenizedModel]:
    """The models of GGUF files that are not converted yet, without their tokenizers."""
    return {
        folder: TokenizedModel(None, gguf_files.read_header(file).positions)
        for stage in stages
        for folder, file in stage.gguf_files.items()
        if not (folder / artifacts.FILE).is_file()
    }


def read_gguf_tokenizer(
    file: Path, *, template: Path | None = None, eos_token: str | None = None
) -> TokenizedModel:
    """The model of a GGUF file that is not converted yet; transformers reads its tokenizer.

    ``template`` and ``eos_token`` replace its own, as in
    :func:`~align.models.tokenizer_files.read_conversations`.

    A file without a chat template has no conversations, but an error for those who need it.

    Raises:
        UserError: The file cannot be converted, or its tokenizer cannot be read.
    """
    from align.models import gguf_conversion

    header = gguf_files.read_header(file)
    if template is None and not gguf_checks.has_template(header):
        gguf_checks.check_convertible(file)
        return TokenizedModel(None, header.positions, gguf_checks.no_template(file))
    with gguf_conversion.tokenizer_folder(file) as folder:
        conversations = tokenizer_files.read_conversations(
            folder, template=template, eos_token=eos_token
        )
    assert conversations is not None  # the folder has a tokenizer.json
    if template is not None:
        conversations = _with_named_template(conversations, template)
    else:
        named = replace(conversations.template, name=str(file))
        conversations = replace(conversations, template=named)
    return TokenizedModel(conversations, header.positions)


def _folder(source: Path | str, revision: str | None) -> Path | None:
    """The folder of a model; None if it is not on this machine."""
    if isinstance(source, Path):
        return source
    return hub.cached_folder(source, revision=revision, containing=TOKENIZERS)


def _new_model(model: NewModel, rows: Sequence[Sequences]) -> TokenizedModel:
    if not rows:
        return TokenizedModel(None, model.max_position_embeddings)
    from align.models import tokenization

    messages = (m for row in rows for m in [*row.prompt, *row.completions[0]])
    tokenizer = tokenization.train_bpe(
        (message["content"] for message in messages), vocab_size=model.vocab_size
    )
    special = {"eos_token": tokenization.END, "pad_token": tokenization.END_OF_TEXT}
    return TokenizedModel(
        tokenizer_files.conversations(
            tokenizer, "a new model", template=tokenization.CHATML, special_tokens=special
        ),
        model.max_position_embeddings,
    )


def count(stage: TRLStage, rows: Sequence[Sequences], model: TokenizedModel) -> Counts:
    """Count the rows that are lost or truncated, and the tokens of a sample of the rows.

    A row whose text, with what the template adds to the rows of the sample, stays below the limit
    is not tokenized as a whole.

    Raises:
        UserError: The template refuses a row, or ``max_length`` exceeds the model's positions.
    """
    assert model.conversations is not None
    limit = row_limits.max_length(stage, model.positions)
    sample = range(0, len(rows), max(1, len(rows) // SAMPLE))
    tokens = dict(_tokenized(stage, rows, sample, model.conversations))
    lengths = [_longest(tokens[i]) for i in sample]
    trained = [row_limits.count_trained(stage, tokens[i], limit) for i in sample]
    lost, truncated = trained.count(0), 0
    if limit is not None:
        truncated = sum(length > limit for length in lengths)
        near = _near_limit(rows, sample, lengths, limit, model.conversations)
        for _, own in _tokenized(stage, rows, near, model.conversations):
            lost += row_limits.count_trained(stage, own, limit) == 0
            truncated += _longest(own) > limit
    return Counts(lengths, trained, lost, truncated, limit)


def _longest(rows: Sequence[TrainedRow]) -> int:
    return max(len(row.ids) for row in rows)


def _near_limit(
    rows: Sequence[Sequences],
    sample: range,
    lengths: Sequence[int],
    limit: int,
    conversations: Conversations,
) -> list[int]:
    """The rows outside of a sample, whose rows have ``lengths``, that may exceed the limit."""
    sizes = _text_tokens([rows[i] for i in sample], conversations)
    added = [length - size for length, size in zip(lengths, sizes, strict=True)]
    per_row = max(*added, 0)
    per_turn = max(count / _turns(rows[i]) for i, count in zip(sample, added, strict=True))

    def may_exceed(i: int, size: int) -> bool:
        return size + max(per_row, per_turn * _turns(rows[i])) + MARGIN > limit

    others = [i for i in range(len(rows)) if i not in sample]
    # No token is shorter than a byte, so most rows need not be tokenized.
    others = [i for i in others if may_exceed(i, _bytes(rows[i]))]
    sizes = _text_tokens([rows[i] for i in others], conversations)
    return [i for i, size in zip(others, sizes, strict=True) if may_exceed(i, size)]


def _tokenized(
    stage: TRLStage,
    rows: Sequence[Sequences],
    chosen: Sequence[int],
    conversations: Conversations,
) -> Iterator[tuple[int, list[TrainedRow]]]:
    """The token rows of rows as a stage trains on them, with the index of each row."""

    def tokenize(*parts: Sequences) -> list[list[TrainedRow]]:
        pairs = [(row.prompt, side) for row in parts for side in row.completions]
        prompts, completions = [p for p, _ in pairs], [c for _, c in pairs]
        return conversations.trained_rows(prompts, completions, train_on=stage.trained_turns)

    for indices in _batches(chosen):
        batch = [rows[i] for i in indices]
        with naming_row(batch, tokenize, lambda row: row.place):
            tokenized = iter(tokenize(*batch))
        for i in indices:
            yield i, [row for _ in rows[i].completions for row in next(tokenized)]


def _text_tokens(rows: Sequence[Sequences], conversations: Conversations) -> list[int]:
    """The tokens of the messages of the longest sequence of each row, without the template.

    A text that several rows have, as rows of one prompt do, is tokenized once.
    """
    longest = []
    sizes: dict[str, int] = {}
    for batch in _batches(rows):
        texts = dict.fromkeys(t for row in batch for side in _texts(row) for t in side)
        new = [text for text in texts if text not in sizes]
        sizes |= zip(new, map(len, conversations.encode_batch(new)), strict=True)
        longest += [max(sum(sizes[t] for t in side) for side in _texts(row)) for row in batch]
    return longest


def _texts(row: Sequences) -> list[list[str]]:
    """The texts of the messages of each sequence of a row."""
    return [
        [text for message in [*row.prompt, *completion] for text in turn_fields.texts(message)]
        for completion in row.completions
    ]


def _bytes(row: Sequences) -> int:
    """The bytes of the messages of the longest sequence of a row."""
    return max(sum(len(text.encode()) for text in side) for side in _texts(row))


def _turn_bytes(turn: Mapping[str, Any]) -> int:
    """Bytes of the texts of a turn; its tools may be written with indentation."""
    size = sum(len(text.encode()) for text in turn_fields.texts(turn))
    return size + 3 * len(turn.get("tools") or "")


def _turns(row: Sequences) -> int:
    return len(row.prompt) + 1


def _batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Consecutive parts: the tokens of a million rows at once would take tens of gigabytes."""
    return (values[first : first + BATCH] for first in range(0, len(values), BATCH))


def count_long_prompts(
    rows: Sequence[Sequences], model: TokenizedModel, max_new_tokens: int
) -> int:
    """The number of prompts that, with a completion, exceed the positions of a model.

    Raises:
        UserError: The template refuses a prompt.
    """
    if model.conversations is None or model.positions is None:
        return 0
    left = model.positions - max_new_tokens
    # No token is shorter than a byte.
    sizes = [sum(_turn_bytes(turn) + MARGIN * 4 for turn in row.prompt) for row in rows]
    near = [row for row, size in zip(rows, sizes, strict=True) if size + MARGIN * 8 > left]
    tokenize = model.conversations.prompts
    with naming_row(near, lambda row: tokenize([row.prompt]), lambda row: row.place):
        return sum(len(ids) > left for ids in tokenize([row.prompt for row in near]))
