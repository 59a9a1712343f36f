"""The prompts of a run in their order, as the rows that verl and OpenRLHF read.

The files have the prompts of every update of the run, so that the number of updates, the prompts of
each and their order in verl are those of Align. The tokens that the other trainer computes from
a prompt are compared with Align's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.cli.clusters.job import Job
from align.config.online_rl import OnlineRL
from align.data import tables
from align.data.rows import UNTRAINED, Row
from align.errors import DataError, UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the training data."""

    messages: list[dict[str, str]]
    text: str
    """The prompt as the chat template writes it, with the header of the assistant's turn."""
    n_tokens: int
    row: str
    """What reward functions read, as JSON: the messages, the columns, and the decoded tokens."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a run, and the tokens that end a completion."""

    prompts: Sequence[Prompt]
    order: list[int]
    """Indices of the prompts of each update, one after the other."""
    ends: list[str]
    special_tokens: list[str]
    """Texts of the special tokens, the longest first."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(prompt.n_tokens for prompt in self.prompts)


def read_prompts(job: Job) -> PromptSet:
    """The prompts of a stage.

    Raises:
        UserError: There are none, the tokenizer cannot be loaded, or a prompt has a part that the
            files cannot hold.
    """
    from align.models import tokenization

    file = tables.table_file(job.prompts, "prompts", "train")
    rows = tables.read(job.prompts, "prompts", "train", required_by=job.at("prompts"))
    if not rows:
        raise DataError(f"{file}: no prompts")
    tokenizer: Any = tokenization.load_tokenizer(job.model)
    conversations = tokenization.conversations(tokenizer)
    messages = [_messages(row, f"{file}: row {k}") for k, row in enumerate(rows, 1)]
    tokens = tokenization.tokenize_prompts(tokenizer, messages)
    prompts = []
    for k, (row, turns, ids) in enumerate(zip(rows, messages, tokens, strict=True), 1):
        text = conversations.template.render(turns, add_generation_prompt=True)
        _check_tokens(tokenizer, turns, text, ids, f"{file}: row {k}")
        head = tokenizer.decode(ids, skip_special_tokens=False)
        prompts.append(Prompt(turns, text, len(ids), _row(row, turns, head, f"{file}: row {k}")))
    ends = sorted(tokenizer.decode([token]) for token in tokenization.end_tokens(tokenizer))
    special = sorted({*tokenizer.all_special_tokens, *ends}, key=lambda token: (-len(token), token))
    return PromptSet(prompts, _order(len(prompts), job.config), ends, special)


def _order(n_prompts: int, config: OnlineRL) -> list[int]:
    """Indices of the prompts of all updates."""
    from align.online_rl.prompts import prompt_indices

    return [
        index
        for step in range(config.steps)
        for index in prompt_indices(step, n_prompts, config)[:: config.n_completions]
    ]


def _messages(row: Row, place: str) -> list[dict[str, str]]:
    """The turns of a prompt with nothing but role and content.

    Raises:
        DataError: A turn has more.
    """
    for turn in row["prompt"]:
        further = [k for k in turn if turn[k] and k not in ("role", "content", UNTRAINED)]
        if further:
            raise DataError(f"{place}: a turn has `{further[0]}`, which the files cannot hold")
    return [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]


def _check_tokens(
    tokenizer: Any, messages: list[dict[str, str]], text: str, ids: list[int], place: str
) -> None:
    """Compare the tokens that the trainers compute with those of Align.

    Raises:
        UserError: They differ, such as where the text of a turn contains a special token.
    """
    by_template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    if not isinstance(by_template, list):  # a mapping, by the version of transformers
        by_template = by_template["input_ids"]
    by_text = tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(by_template) != ids or list(by_text) != ids:
        raise UserError(
            f"{place}: the chat template writes other tokens there than in Align, such as where "
            "a turn contains a special token; remove the row"
        )


def _row(row: Row, messages: list[dict[str, str]], head: str, place: str) -> str:
    """What reward functions read, as JSON.

    Raises:
        DataError: A column has a value that JSON cannot hold.
    """
    columns = {key: value for key, value in row.items() if key != "prompt"}
    try:
        return json.dumps({"prompt": messages, "columns": columns, "head": head})
    except TypeError as error:
        raise DataError(f"{place}: {error}; convert the column to text or numbers") from None


def write_parquet(prompts: PromptSet, file: Path) -> None:
    """Write the columns that verl reads: data_source, prompt, reward_model and extra_info."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(turn)),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct([("index", pa.int64())])),
        ]
    )
    rows = [
        {
            "data_source": "align",
            "prompt": prompts.prompts[index].messages,
            "reward_model": {"style": "rule", "ground_truth": prompts.prompts[index].row},
            "extra_info": {"index": index},
        }
        for index in prompts.order
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)


def write_jsonl(prompts: PromptSet, file: Path) -> None:
    """Write the keys that OpenRLHF reads: input and label."""
    with file.open("w", encoding="utf-8") as lines:
        for index in prompts.order:
            prompt = prompts.prompts[index]
            lines.write(json.dumps({"input": prompt.text, "label": prompt.row}) + "\n")
