"""Token streams: what a stage trains on, token by token, with the trained ones marked.

SFT, DPO and KTO are tokenised by TRL itself: its trainer is built around a model of a few weights that never runs, and its
collator makes the batch. PPO and the reward model see the prompt under the chat template, and a completion up to and
including the first end-of-sequence token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from align.config.data import Prepare
from align.data.prepare import prepare
from align.errors import UserError

KINDS = {
    "sft": "demonstrations",
    "dpo": "pairs",
    "kto": "unpaired",
    "reward": "pairs",
    "ppo": "prompts",
}


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One sequence of a batch: its tokens as text, which of them are trained on, and what it ends in."""

    title: str
    ids: list[int]
    tokens: list[str]
    trained: list[bool]
    remark: str


def tokenized_rows(config: Prepare, stage: str, model: str, n: int) -> list[TokenizedRow]:
    """The first ``n`` training rows of a source as ``stage`` would see them, under the tokenizer of ``model``.

    Raises:
        UserError: The source has no such rows, or the tokenizer no chat template.
    """
    from align.models import tokenization
    from align.training import trl_trainer

    tokenizer = tokenization.load_tokenizer(model)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{model}: its tokenizer has no chat template; name a model that was tuned to follow instructions"
        )
    rows = _rows(config, KINDS[stage], n)
    if stage in ("reward", "ppo"):
        return _plain(rows, stage, tokenizer)
    with trl_trainer.trl_errors_as_user_errors():
        batch, places, limit = _batch(rows, stage, tokenizer)
    found = [
        _left_out(f"row {i + 1}", f"left out by TRL: its prompt alone fills `max_length` {limit}")
        for i in range(len(rows))
        if i not in places
    ]
    if not places:
        return found
    masks = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"] == 1
    inside = batch["attention_mask"] == 1
    for i, (ids, mask, real) in enumerate(zip(batch["input_ids"], masks, inside, strict=True)):
        side = {"sft": "demonstration", "kto": "completion"}.get(
            stage, "chosen" if i < len(places) else "rejected"
        )
        place = places[i % len(places)]
        if stage == "kto":
            side = f"completion, {'desirable' if rows[place]['label'] else 'undesirable'}"
        found.append(
            _stream(
                f"row {place + 1}, {side}",
                ids[real].tolist(),
                mask[real].tolist(),
                tokenizer,
                limit,
            )
        )
    return found


def _rows(config: Prepare, kind: str, n: int) -> list[dict[str, Any]]:
    prepared = prepare(config)
    wanted = "pairs" if kind == "unpaired" and kind not in prepared.kinds else kind
    if wanted not in prepared.table_kinds:
        raise UserError(f"the source gives no {kind}; found {', '.join(prepared.kinds)}")
    found: list[dict[str, Any]] = []
    for placed in prepared.rows():
        if placed.kind == wanted and placed.split == "train":
            row = dict(placed.row)
            if wanted == kind:
                found.append(row)
            else:  # both sides of a pair, each with its label
                found += [
                    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                    for side in ("chosen", "rejected")
                ]
        if len(found) >= n:
            break
    return found[:n]


def _batch(
    rows: Sequence[dict[str, Any]], stage: str, tokenizer: Any
) -> tuple[Any, list[int], int | None]:
    """The batch that TRL makes, the places of the rows that are in it, and the length at which it cuts."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig

    from align.training import trl_trainer

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    trainer_class = getattr(trl, f"{stage.upper()}Trainer")
    keep = ("prompt", "completion", "chosen", "rejected", "label")
    data = Dataset.from_list(
        [{k: row[k] for k in keep if k in row} | {"place": i} for i, row in enumerate(rows)]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl_trainer.trl_arguments(
            getattr(trl, f"{stage.upper()}Config"),
            folder,  # type: ignore[arg-type]
            seed=0,
            trainer={"bf16": False, "gradient_checkpointing": False},
        )
        # without a reference, TRL would look for one under the model's name, and this one has none
        reference = {} if stage == "sft" else {"ref_model": AutoModelForCausalLM.from_config(shape)}
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_config(shape),
            **reference,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
        )
        left = list(trainer.train_dataset)
        batch = trainer.data_collator(left) if left else None
        return batch, [row["place"] for row in left], arguments.max_length


def _plain(rows: Sequence[dict[str, Any]], stage: str, tokenizer: Any) -> list[TokenizedRow]:
    from trl import RewardConfig

    from align.models import tokenization

    defaults: dict[str, Any] = {field.name: field.default for field in fields(RewardConfig)}
    limit = defaults["max_length"]
    found = []
    for i, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if stage == "ppo":
            stream = _stream(f"row {i + 1}, prompt", prompt, [False] * len(prompt), tokenizer)
            words = "the policy writes on from here; what it samples, eos included, is trained on"
            found.append(
                TokenizedRow(stream.title, stream.ids, stream.tokens, stream.trained, words)
            )
            continue
        both = tokenization.tokenize_for_reward(
            tokenizer, [row["prompt"]] * 2, [row["chosen"], row["rejected"]]
        )
        longest = max(map(len, both))
        if limit is not None and longest > limit:
            words = f"left out by the reward stage: its longer side has {longest} tokens, `max_length` is {limit}"
            found.append(_left_out(f"row {i + 1}", words))
            continue
        for side, ids in zip(("chosen", "rejected"), both, strict=True):
            mask = [False] * (len(ids) - 1) + [True]  # the score is read there
            found.append(_stream(f"row {i + 1}, {side}", ids, mask, tokenizer))
    return found


def _left_out(title: str, why: str) -> TokenizedRow:
    return TokenizedRow(title, [], [], [], why)


def _stream(
    title: str, ids: list[int], mask: Sequence[Any], tokenizer: Any, limit: int | None = None
) -> TokenizedRow:
    trained = [bool(flag) for flag in mask]
    marked = [token for token, flag in zip(ids, trained, strict=True) if flag]
    eos = tokenizer.eos_token
    if not marked:
        remark = "no token is trained: the prompt alone fills `max_length`"
    elif tokenizer.eos_token_id in marked:
        remark = f"eos {eos!r} is included and trained"
    elif len(ids) == limit:
        remark = f"cut at `max_length` {limit}: eos {eos!r} is lost"
    else:
        remark = f"eos {eos!r} is missing: a model trained on this does not learn to stop"
    return TokenizedRow(title, ids, [tokenizer.decode([token]) for token in ids], trained, remark)
