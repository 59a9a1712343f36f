"""What the chat templates of a recipe's models do with its rows, before anything runs.

Whether a template refuses a conversation depends on its roles, so one row of each sequence of roles
is rendered. A row whose text alone makes a template fail is found when its stage tokenizes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.base import Stage
from align.config.recipe import ErrorCollector
from align.errors import UserError
from align.models import tokenizer_files
from align.models.conversations import Conversations
from align.pipeline.plan import PlannedStage
from align.pipeline.row_tokens import Sequences, Tables, TokenizedModel


def check_rows(conversations: Conversations, rows: Sequence[Sequences]) -> None:
    """Check that the chat template accepts the roles of all rows.

    Raises:
        UserError: One line for each sequence of roles that it refuses, with the number of rows.
    """
    by_roles: dict[tuple[str, ...], list[Sequences]] = {}
    for row in rows:
        by_roles.setdefault(tuple(str(turn["role"]) for turn in row.prompt), []).append(row)
    lines = []
    for group in by_roles.values():
        first = group[0]
        try:
            conversations.prompts([first.prompt])
            conversations.rows([first.prompt] * len(first.completions), first.completions)
        except UserError as error:
            lines += [f"{len(group):,} of {len(rows):,} rows: {line}" for line in error.lines]
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


def check_prompts(
    errors: ErrorCollector,
    stage: PlannedStage,
    tables: Mapping[Path, Tables],
    models: Mapping[Path, TokenizedModel],
) -> None:
    """Check the prompts of a stage that samples, with the template of each of its policies."""
    rows = [Sequences(row["prompt"], ()) for row in _prompts(stage.config, stage.inputs, tables)]
    for key, source in stage.inputs.items():
        if key != "model" and not key.startswith("policies."):
            continue
        with errors.at(stage.name, *key.split(".")):
            if isinstance(source, str):
                continue  # on the Hub
            known = models.get(source)
            conversations = (
                tokenizer_files.read_conversations(source) if known is None else known.conversations
            )
            if conversations is not None:
                conversations.prompts([[{"role": "user", "content": "User"}]])
                check_rows(conversations, rows)


def _prompts(
    config: Stage, inputs: Mapping[str, Path | str], tables: Mapping[Path, Tables]
) -> Sequence[Any]:
    for table in config.required_tables():
        source = inputs.get(table.input)
        if table.kind == "prompts" and isinstance(source, Path) and source in tables:
            return tables[source].get("prompts", {}).get(table.split, ())
    return ()
