"""What the chat templates of a recipe's models do with its rows, before anything runs.

Whether a template refuses a conversation, or leaves out a part of it, depends on the roles and the
fields of its turns, so one row of each sequence of them is rendered. A row whose text alone makes a
template fail is found when its stage tokenizes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from align.config.base import Stage
from align.config.recipe import ErrorCollector
from align.config.validation import HUB_ID
from align.errors import UserError
from align.models import tokenizer_files, turn_fields
from align.models.chat_templates import Message
from align.models.conversations import REASONING, Conversations, trained_turns
from align.models.gguf_checks import naming_files
from align.pipeline import row_tokens
from align.pipeline.plan import PlannedStage
from align.pipeline.row_tokens import Sequences, Tables, TokenizedModel

JINJA = (".jinja", ".j2")
"""Suffixes of the files that TRL reads as a chat template."""


def check_chat_templates(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that ``chat_template_path`` is a Jinja file, a folder, or may be a Hub id."""
    for stage in pending:
        template = stage.config.named_paths().get("trainer.chat_template_path")
        if template is None:
            continue
        path, is_jinja = Path(template), template.endswith(JINJA)
        if path.is_dir() or (path.is_file() and is_jinja):
            continue
        if path.exists():
            problem = "is no folder, and no file with the suffix .jinja or .j2"
        elif is_jinja or not HUB_ID.match(template):
            problem = "no such file or folder"
        else:
            continue
        keys = (stage.name, "trainer", "chat_template_path")
        errors.add(keys, f"{template}: {problem}; name one, or a Hub id (owner/name)")


def check_added_tokens(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that a tokenizer has the tokens that ``trainer`` names: the model's, or the template's.

    Tokenizers that are not in a local folder are left out.
    """
    stages = {stage.folder: stage for stage in pending}
    for stage in pending:
        fields = stage.config.trl_arguments()
        tokens = {field: fields.get(field) for field in ("eos_token", "pad_token")}
        named = {field: token for field, token in tokens.items() if isinstance(token, str)}
        folders = _tokenizer_folders(stage, stages) if named else None
        for field, token in named.items():
            known = [tokenizer_files.has_token(folder, token) for folder in folders or ()]
            if known and all(each is False for each in known):
                message = (
                    f"the tokenizer of {' and '.join(map(str, folders or ()))} has no token "
                    f"{token!r}; name one that it has"
                )
                errors.add((stage.name, "trainer", field), message)


def _tokenizer_folders(
    stage: PlannedStage, stages: Mapping[Path, PlannedStage]
) -> list[Path] | None:
    """The folders whose tokens a stage can use: that of the first model, and those of templates.

    None if one of them is not a local folder.
    """
    source = stage.inputs.get("model")
    if not isinstance(source, Path):
        return None
    folders = _tokenizer_folders(stages[source], stages) if source in stages else [source]
    template = stage.config.named_paths().get("trainer.chat_template_path")
    if folders is None or template is None or template.endswith(JINJA):
        return folders
    return [*folders, Path(template)] if Path(template).is_dir() else None


def check_rows(
    conversations: Conversations,
    rows: Sequence[Sequences],
    train_on: Literal["all", "last"] = "last",
) -> None:
    """Check that the chat template accepts the roles of all rows, and writes all of their turns.

    Raises:
        UserError: One line for each sequence of roles that it refuses, with the number of rows and
            the first of them.
    """
    by_shape: dict[Any, list[Sequences]] = {}
    for row in rows:
        turns = itertools.chain(row.prompt, *row.completions)
        by_shape.setdefault(tuple(map(turn_fields.shape, turns)), []).append(row)
    lines = []
    for group in by_shape.values():
        first = group[0]
        try:
            conversations.prompts([first.prompt])
            prompts = [first.prompt] * len(first.completions)
            conversations.trained_rows(prompts, first.completions, train_on=train_on)
        except UserError as error:
            counts = f"{len(group):,} of {len(rows):,} rows: {first.place}: "
            lines += [f"{counts}{line}" for line in error.lines]
    if lines:
        raise UserError(*lines)


def special_token_lines(
    name: str, conversations: Conversations, rows: Sequence[Sequences]
) -> Iterator[str]:
    """A line with the number of rows whose text contains special tokens, if there are any."""
    count = sum(
        any(map(conversations.contains_control_token, (row.prompt, *row.completions)))
        for row in rows
    )
    if count:
        yield (
            f"{name}: {count:,} of {len(rows):,} rows have special tokens of the tokenizer in "
            "their text; they are read as text"
        )


def end_token_lines(name: str, conversations: Conversations, eos_token: Any) -> Iterator[str]:
    """A line if ``trainer: {eos_token: …}`` names a token that the template ends no turn with."""
    if isinstance(eos_token, str) and conversations.writes_end:
        end = conversations.end_of_turn().ids[-1:]
        if conversations.encode_batch([eos_token]) != [end]:
            yield (
                f"{name}: warning: `trainer.eos_token` is {eos_token!r}, but the template ends a "
                "turn with another end token; remove it, or name the token that ends a turn"
            )


def open_reasoning_lines(
    name: str,
    conversations: Conversations,
    rows: Sequence[Sequences],
    train_on: Literal["all", "last"],
) -> Iterator[str]:
    """A line with the number of rows that train an answer within reasoning that never ends.

    The templates of DeepSeek-R1 and others begin an answer with ``<think>`` before sampling.
    """
    turns: list[Message] = [{"role": "user", "content": "User"}]
    before = conversations.template.render(turns, add_generation_prompt=True)
    turns += [{"role": "assistant", "content": "Assistant"}]
    if not before.rstrip().endswith(REASONING[0]) or REASONING[1] in conversations.template.render(
        turns
    ):
        return

    def answers(row: Sequences) -> Iterator[Message]:
        earlier = trained_turns(row.prompt) if train_on == "all" else []
        return itertools.chain((row.prompt[k] for k in earlier), *row.completions)

    count = sum(any(not _ends_reasoning(turn) for turn in answers(row)) for row in rows)
    if count:
        yield (
            f"{name}: warning: {count:,} of {len(rows):,} rows have an answer without reasoning "
            f"behind the `{REASONING[0]}` that the template writes before it, so the policy learns "
            f"to answer within its reasoning; add `{turn_fields.REASONING[0]}` to them, or "
            f"{conversations.template.repair}"
        )


def _ends_reasoning(turn: Message) -> bool:
    has_field = turn_fields.has_reasoning([turn])
    return has_field or REASONING[1] in str(turn.get("content") or "")


def check_prompts(
    errors: ErrorCollector,
    stage: PlannedStage,
    tables: Mapping[Path, Tables],
    models: dict[Path, TokenizedModel],
    gguf_files: Mapping[Path, Path],
) -> None:
    """Check the prompts of a stage that samples, with each of its policies.

    The template must accept them, and they must leave positions for the completions. Errors about a
    folder of ``gguf_files`` name the file that it is converted from.
    """
    config: Any = stage.config
    rows = _prompts(config, stage.inputs, tables)
    for key, source in stage.inputs.items():
        if key not in ("model", "baseline") and not key.startswith("policies."):
            continue
        with errors.at(stage.name, *key.split(".")), naming_files(gguf_files):
            revision = getattr(config, "revision", None)
            model = row_tokens.find_model(source, models, revision=revision)
            if key == "model":
                models[stage.folder] = model
            if model.conversations is not None:
                model.conversations.prompts([[{"role": "user", "content": "User"}]])
                check_rows(model.conversations, rows)
                _check_positions(errors, stage, rows, model)


def _check_positions(
    errors: ErrorCollector, stage: PlannedStage, rows: Sequence[Sequences], model: TokenizedModel
) -> None:
    new_tokens = getattr(stage.config, "max_new_tokens", 0)
    prompts = rows[: getattr(stage.config, "n_prompts", None)]
    n_long = row_tokens.count_long_prompts(prompts, model, new_tokens)
    if n_long:
        errors.add(
            (stage.name, "max_new_tokens"),
            f"{n_long:,} of {len(prompts):,} prompts plus {new_tokens} new tokens exceed the "
            f"{model.positions} positions of the model; lower it, or drop long prompts in `prepare`",
        )


def _prompts(
    config: Stage, inputs: Mapping[str, Path | str], tables: Mapping[Path, Tables]
) -> list[Sequences]:
    for table in config.required_tables():
        source = inputs.get(table.input)
        if table.kind == "prompts" and isinstance(source, Path) and source in tables:
            found = tables[source].get("prompts", {}).get(table.split, ())
            name = f"prompts-{table.split}"
            return [Sequences(row["prompt"], (), n, name) for n, row in enumerate(found, 1)]
    return []
