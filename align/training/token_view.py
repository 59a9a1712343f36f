"""The tokens that a stage trains on, for ``align data show``.

SFT, DPO and KTO are tokenized by their trainers: each is built around a tiny model that never runs,
and its collator makes the batch. The reward stage and PPO tokenize with
:mod:`align.models.tokenization`. Left out: packing, and fields under ``trainer`` that change the
tokens, since only a source and a model are known here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from align.config.data import Prepare
from align.config.stages import ONLINE_RL, STAGES
from align.data.prepare import prepare
from align.data.rows import Row
from align.errors import DataError

SUPPORTED_STAGES = ("sft", "dpo", "kto", "reward", *ONLINE_RL)
"""The kinds of stages whose tokens can be shown."""
COLUMNS = ("prompt", "completion", "chosen", "rejected", "label")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A sequence of token ids, or a row that the stage leaves out."""

    row: int
    """Index of the row."""
    side: str
    """Which of its sequences this is; empty if the row is left out."""
    ids: list[int]
    tokens: list[str]
    """Text of each token."""
    trained: list[bool]
    """Whether the loss includes the token."""
    remark: str
    """Whether an end token is trained, or the reason for which the row is left out."""

    @property
    def title(self) -> str:
        """The number of the row, and which of its sequences this is."""
        return f"row {self.row + 1}{f', {self.side}' if self.side else ''}"


def trained_tokens(rows: Sequence[TokenizedRow]) -> str:
    """How many tokens of a row are trained, in words; those of a pair are on both of its sides."""
    counts: dict[int, int] = {}
    for row in rows:
        counts[row.row] = counts.get(row.row, 0) + sum(row.trained)
    values = list(counts.values())
    unit = "pair" if any(row.side == "rejected" for row in rows) else "row"
    line = f"trained tokens per {unit}: mean {sum(values) / len(values):.1f}, median {median(values):g}"
    none = values.count(0)
    return f"{line}; {none} of {len(values)} {unit}s: none" if none else line


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that TRL has collated."""

    tensors: Mapping[str, Any] | None
    """None if TRL leaves out all rows."""
    row_indices: list[int]
    """Index of the row of each sequence."""
    max_length: int | None


def tokenized_rows(
    config: Prepare, stage: str, model: str, n: int, *, train_on: str = "all"
) -> list[TokenizedRow]:
    """Tokenize the first ``n`` training rows of a source as ``stage`` does.

    ``train_on`` are the turns that ``sft`` trains.

    Raises:
        UserError: The source has no such rows, or the tokenizer has no chat template.
    """
    from align.models import tokenization
    from align.training import trl_trainer

    tokenizer = tokenization.load_tokenizer(model)
    tokenization.conversations(tokenizer)
    rows = _training_rows(config, STAGES[stage].reads[0].kind, n)
    if stage in ONLINE_RL:
        return _prompts(rows, tokenizer)
    if stage == "reward":
        return _reward_rows(rows, tokenizer)
    with (
        trl_trainer.trl_errors_as_user_errors(),
        tokenization.rows_for_trl(tokenizer, end_repair=None),
    ):
        batch = _collate(rows, stage, tokenizer, train_on)
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


def _collate(rows: Sequence[Row], stage: str, tokenizer: Any, train_on: str) -> _Batch:
    """Collate the rows as the TRL trainer of a stage does."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig

    from align.models.tokenization import RowsForTRL
    from align.training import trl_trainer
    from align.training.demonstration_trainer import DEMONSTRATION, DemonstrationTrainer, token_rows

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    trainer_class: Any = getattr(trl, f"{stage.upper()}Trainer")
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
        options: dict[str, Any] = {}
        if stage == "sft":
            trainer_class = DemonstrationTrainer
            options |= {"rows": RowsForTRL(tokenizer, end_repair=None), "train_on": train_on}
        else:  # TRL would load a reference by the name of the model, and this model has none
            options["ref_model"] = AutoModelForCausalLM.from_config(shape)
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_config(shape),
            **options,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        kept = list(trainer.train_dataset)
        tensors = trainer.data_collator(kept) if kept else None
        if stage == "sft":
            indices = [row[DEMONSTRATION] for row in kept for _ in token_rows(row)]
        else:  # a batch of pairs has all chosen, then all rejected completions
            indices = [row["index"] for row in kept] * (2 if stage == "dpo" else 1)
        return _Batch(tensors, indices, arguments.max_length)


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
    sequences = zip(batch.row_indices, tensors["input_ids"], trained, real, strict=True)
    for i, (index, ids, mask, tokens) in enumerate(sequences):
        if stage == "kto":
            side = f"completion, {'desirable' if rows[index]['label'] else 'undesirable'}"
        elif stage == "sft":
            side = _part(batch.row_indices, i)
        else:
            side = "chosen" if i < len(batch.row_indices) / 2 else "rejected"
        kept, marks = ids[tokens].tolist(), mask[tokens].tolist()
        tokenized.append(_tokenized_row(index, side, kept, marks, tokenizer, limit))
    return tokenized


def _part(row_indices: Sequence[int], i: int) -> str:
    """The name of a sequence of a demonstration, with its number if there are several."""
    several = row_indices.count(row_indices[i])
    number = row_indices[: i + 1].count(row_indices[i])
    return "demonstration" if several == 1 else f"demonstration, sequence {number} of {several}"


def _prompts(rows: Sequence[Row], tokenizer: Any) -> list[TokenizedRow]:
    """Prompts as online RL tokenizes them."""
    from align.models import tokenization

    remark = "the policy continues here; the tokens that it samples, with their end, are trained"
    prompts = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    return [
        TokenizedRow(
            i,
            "prompt",
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
            tokenized.append(_tokenized_row(i, side, ids, trained, tokenizer))
    return tokenized


def _left_out(index: int, reason: str) -> TokenizedRow:
    return TokenizedRow(index, "", [], [], [], reason)


def _tokenized_row(
    index: int,
    side: str,
    ids: list[int],
    mask: Sequence[Any],
    tokenizer: Any,
    limit: int | None = None,
) -> TokenizedRow:
    from align.models import tokenization

    trained = [bool(flag) for flag in mask]
    ends = tokenization.end_tokens(tokenizer)
    last = [i for i, now in enumerate(trained) if now and not any(trained[i + 1 : i + 2])]
    if not any(trained):
        remark = "no token is trained: the prompt alone fills `max_length`"
    elif trained[-1] and all(ids[i] in ends for i in last):
        remark = f"end token {tokenizer.decode([ids[-1]])!r} is included and trained"
        if len(last) > 1:
            remark += f", in each of {len(last)} turns"
    elif len(ids) == limit:
        remark = f"cut at `max_length` {limit}: the end token is lost"
    else:
        remark = (
            f"no end token ({_names(tokenizer, ends)}) at the end: a model trained on this does "
            "not learn to stop"
        )
    texts = [tokenizer.decode([token]) for token in ids]
    return TokenizedRow(index, side, ids, texts, trained, remark)


def _names(tokenizer: Any, ids: Collection[int]) -> str:
    return (
        ", ".join(repr(tokenizer.decode([token])) for token in sorted(ids)) or "the model has none"
    )
