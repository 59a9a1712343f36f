"""The tokens that a stage trains on, for ``align data show``.

SFT, DPO and KTO are tokenized by TRL: its trainer is built around a tiny model that never runs, and
its collator makes the batch. The reward stage and PPO tokenize with
:mod:`align.models.tokenization`. Left out: packing, and fields under ``trainer`` that change the
tokens, since only a source and a model are known here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from align.config.data import Prepare
from align.config.stages import STAGES
from align.data.prepare import prepare
from align.data.rows import Row
from align.errors import DataError

SUPPORTED_STAGES = ("sft", "dpo", "kto", "reward", "ppo")
"""The kinds of stages whose tokens can be shown."""
COLUMNS = ("prompt", "completion", "chosen", "rejected", "label")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A sequence of token ids, or a row that the stage leaves out."""

    title: str
    """Number of the row, and which of its completions this is."""
    ids: list[int]
    tokens: list[str]
    """Text of each token."""
    trained: list[bool]
    """Whether the loss includes the token."""
    remark: str
    """Whether an end token is trained, or the reason for which the row is left out."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that TRL has collated."""

    tensors: Mapping[str, Any] | None
    """None if TRL leaves out all rows."""
    row_indices: list[int]
    """Indices of the rows that are not left out."""
    max_length: int | None


def tokenized_rows(config: Prepare, stage: str, model: str, n: int) -> list[TokenizedRow]:
    """Tokenize the first ``n`` training rows of a source as ``stage`` does.

    Raises:
        UserError: The source has no such rows, or the tokenizer has no chat template.
    """
    from align.models import tokenization
    from align.training import trl_trainer

    tokenizer = tokenization.load_tokenizer(model)
    tokenization.conversations(tokenizer)
    rows = _training_rows(config, STAGES[stage].reads[0].kind, n)
    if stage == "ppo":
        return _prompts(rows, tokenizer)
    if stage == "reward":
        return _reward_rows(rows, tokenizer)
    with (
        trl_trainer.trl_errors_as_user_errors(),
        tokenization.rows_for_trl(tokenizer, end_repair=None),
    ):
        batch = _collate(rows, stage, tokenizer)
    return _trl_rows(rows, stage, batch, tokenizer)


def _training_rows(config: Prepare, kind: str, n: int) -> list[Row]:
    """The first ``n`` training rows of a kind; without labeled completions, both sides of pairs."""
    prepared = prepare(config)
    read_kind = "pairs" if kind == "unpaired" and kind not in prepared.kinds else kind
    if read_kind not in prepared.table_kinds:
        raise DataError(f"the source contains no {kind}; found {', '.join(prepared.kinds)}")
    rows: list[Row] = []
    for split_row in prepared.rows():
        if split_row.kind == read_kind and split_row.split == "train":
            row = dict(split_row.row)
            if read_kind == kind:
                rows.append(row)
            else:
                rows += [
                    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                    for side in ("chosen", "rejected")
                ]
        if len(rows) >= n:
            break
    return rows[:n]


def _collate(rows: Sequence[Row], stage: str, tokenizer: Any) -> _Batch:
    """Collate the rows as the TRL trainer of a stage does."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig

    from align.training import trl_trainer

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    trainer_class = getattr(trl, f"{stage.upper()}Trainer")
    dataset = Dataset.from_list(
        [
            {column: row[column] for column in COLUMNS if column in row} | {"index": i}
            for i, row in enumerate(rows)
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl_trainer.trl_arguments(
            getattr(trl, f"{stage.upper()}Config"),
            Path(folder),
            seed=0,
            trainer={"bf16": False, "gradient_checkpointing": False},
        )
        # Without a reference, TRL would load one by the name of the model, and this model has none.
        reference = {} if stage == "sft" else {"ref_model": AutoModelForCausalLM.from_config(shape)}
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_config(shape),
            **reference,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        kept = list(trainer.train_dataset)
        tensors = trainer.data_collator(kept) if kept else None
        return _Batch(tensors, [row["index"] for row in kept], arguments.max_length)


def _trl_rows(rows: Sequence[Row], stage: str, batch: _Batch, tokenizer: Any) -> list[TokenizedRow]:
    """The rows that TRL leaves out, then the sequences of its batch."""
    limit = batch.max_length
    tokenized = [
        _left_out(i, f"left out by TRL: its prompt alone fills `max_length` {limit}")
        for i in range(len(rows))
        if i not in batch.row_indices
    ]
    if batch.tensors is None:
        return tokenized
    tensors = batch.tensors
    trained = tensors["labels"] != -100 if "labels" in tensors else tensors["completion_mask"] == 1
    real = tensors["attention_mask"] == 1
    for i, (ids, mask, tokens) in enumerate(zip(tensors["input_ids"], trained, real, strict=True)):
        # DPO's batch has all chosen, then all rejected completions.
        index = batch.row_indices[i % len(batch.row_indices)]
        if stage == "kto":
            side = f"completion, {'desirable' if rows[index]['label'] else 'undesirable'}"
        elif stage == "sft":
            side = "demonstration"
        else:
            side = "chosen" if i < len(batch.row_indices) else "rejected"
        title = f"row {index + 1}, {side}"
        tokenized.append(
            _tokenized_row(title, ids[tokens].tolist(), mask[tokens].tolist(), tokenizer, limit)
        )
    return tokenized


def _prompts(rows: Sequence[Row], tokenizer: Any) -> list[TokenizedRow]:
    """Prompts as PPO tokenizes them."""
    from align.models import tokenization

    remark = "the policy continues here; the tokens that it samples, with their end, are trained"
    prompts = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    return [
        TokenizedRow(
            f"row {i + 1}, prompt",
            ids,
            [tokenizer.decode([token]) for token in ids],
            [False] * len(ids),
            remark,
        )
        for i, ids in enumerate(prompts)
    ]


def _reward_rows(rows: Sequence[Row], tokenizer: Any) -> list[TokenizedRow]:
    """Pairs as the reward stage tokenizes them; the last token, which has the score, is marked."""
    from trl import RewardConfig

    from align.models import tokenization

    defaults: dict[str, Any] = {field.name: field.default for field in fields(RewardConfig)}
    limit = defaults["max_length"]
    tokenized = []
    for i, row in enumerate(rows):
        sides = tokenization.tokenize_for_reward(
            tokenizer, [row["prompt"]] * 2, [row["chosen"], row["rejected"]]
        )
        longest = max(map(len, sides))
        if limit is not None and longest > limit:
            reason = (
                f"left out by the reward stage: its longer side has {longest} tokens, "
                f"`max_length` is {limit}"
            )
            tokenized.append(_left_out(i, reason))
            continue
        for side, ids in zip(("chosen", "rejected"), sides, strict=True):
            trained = [False] * (len(ids) - 1) + [True]
            tokenized.append(_tokenized_row(f"row {i + 1}, {side}", ids, trained, tokenizer))
    return tokenized


def _left_out(index: int, reason: str) -> TokenizedRow:
    return TokenizedRow(f"row {index + 1}", [], [], [], reason)


def _tokenized_row(
    title: str, ids: list[int], mask: Sequence[Any], tokenizer: Any, limit: int | None = None
) -> TokenizedRow:
    from align.models import tokenization

    trained = [bool(flag) for flag in mask]
    ends = tokenization.end_tokens(tokenizer)
    if not any(trained):
        remark = "no token is trained: the prompt alone fills `max_length`"
    elif trained[-1] and ids[-1] in ends:
        remark = f"end token {tokenizer.decode([ids[-1]])!r} is included and trained"
    elif len(ids) == limit:
        remark = f"cut at `max_length` {limit}: the end token is lost"
    else:
        remark = (
            f"no end token ({_names(tokenizer, ends)}) at the end: a model trained on this does "
            "not learn to stop"
        )
    return TokenizedRow(title, ids, [tokenizer.decode([token]) for token in ids], trained, remark)


def _names(tokenizer: Any, ids: Collection[int]) -> str:
    return (
        ", ".join(repr(tokenizer.decode([token])) for token in sorted(ids)) or "the model has none"
    )
