"""How long the rows of a recipe are in tokens, and what its stages would cut, before anything is trained.

Light: the tokenizer is read with ``tokenizers`` alone, and templates are counted as a fixed share a message, so figures
may be off by a token or two a message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import trl_fields
from align.config.base import NewModel
from align.config.data import Prepare
from align.config.recipe import Recipe
from align.config.training import DPO, KTO, SFT, Reward, TRLStage
from align.data import prepare, sources, statistics
from align.errors import UserError
from align.pipeline import preflight
from align.pipeline.plan import PlannedStage

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TOKENS_A_MESSAGE = 5  # ChatML: start, role, newline, end, newline


def examine(recipe: Recipe, steps: Sequence[PlannedStage]) -> Iterator[str]:
    """Read the data of ``prepare`` stages and measure the training stages on it; one line of findings each.

    Raises:
        UserError: The data, or a tokenizer without a chat template.
    """
    tables: dict[Path, dict[str, Any]] = {}
    tokenizers: dict[Path, Tokenizer | None] = {}
    problems: list[str] = []
    for step in steps:
        config = step.config
        if isinstance(config, Prepare):
            hub = [
                n for n, split, _ in config.sources() if not sources.source_files(n, split=split)
            ]
            if hub:
                yield f"{step.name}: {', '.join(hub)} is on the Hub: its rows are checked when the stage runs"
                continue
            prepared = prepare.prepare_rows(**config.model_dump(exclude={"stage"}))
            told = statistics.describe(prepared)
            tables[step.folder] = prepared.tables
            kept = ", ".join(
                f"{kind} {len(splits['train']):,} + {sum(map(len, splits.values())) - len(splits['train']):,} held out"
                for kind, splits in prepared.tables.items()
            )
            dropped = "; ".join(f"{count} × {reason}" for reason, count in prepared.dropped.items())
            yield f"{step.name}: {kept}{f'; dropped: {dropped}' if dropped else ''}"
            yield from (f"{step.name}: warning: {line}" for line in told.get("warnings", []))
            for reader in steps:
                if step.folder in reader.inputs.values():
                    problems += preflight.table_problems(
                        recipe, reader.name, reader.config, *_contents(prepared.tables)
                    )
        elif isinstance(config, SFT | DPO | KTO | Reward):
            role = next(role for role in config.inputs if role != "model")
            kinds = ("unpaired", "pairs") if isinstance(config, KTO) else (role,)
            found = tables.get(Path(step.inputs[role]), {})
            splits = next((found[kind] for kind in kinds if kind in found), None)
            try:
                tokenizer = tokenizers[step.folder] = _tokenizer(step, splits, tokenizers)
            except UserError as error:
                problems += [f"{recipe.at(step.name, 'model')}: {line}" for line in error.lines]
                continue
            if splits is not None and tokenizer is not None:
                yield _measured(step.name, config, splits["train"], tokenizer)
    if problems:
        raise UserError(*problems)


def _contents(
    tables: Mapping[str, Mapping[str, Any]],
) -> tuple[set[str], Callable[[str], list[str]]]:
    """Names of the tables as files have them, and the texts of a split's prompts."""
    names = {f"{kind}-{split}" for kind, splits in tables.items() for split in splits}
    return names, lambda split: [row["prompt"][-1]["content"] for row in tables["prompts"][split]]


def _tokenizer(
    step: PlannedStage, splits: Any, known: dict[Path, Tokenizer | None]
) -> Tokenizer | None:
    from tokenizers import Tokenizer

    model = getattr(step.config, "model", None)
    if isinstance(model, NewModel):
        if splits is None:
            return None
        from align.models import tokenization

        return tokenization.train_bpe(_texts(splits["train"]), vocab_size=model.vocab_size)
    source = step.inputs["model"]
    if isinstance(source, str):
        return None  # on the Hub
    if source in known:
        return known[source]
    file = source / "tokenizer.json"
    if not file.is_file():
        return None  # not a fast tokenizer, or not trained yet
    if not _has_template(source) and "chat_template_path" not in getattr(
        step.config, "trainer", {}
    ):
        raise UserError(
            f"{source}: its tokenizer has no chat template; name one in its `sft` stage: "
            "`trainer: {chat_template_path: FOLDER_OR_HUB_ID_OR_JINJA_FILE}`"
        )
    return Tokenizer.from_file(str(file))


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))


def _texts(rows: Sequence[Any]) -> Iterator[str]:
    return (m["content"] for row in rows for m in [*row["prompt"], *row["completion"]])


def _measured(name: str, config: TRLStage, rows: Sequence[Any], tokenizer: Tokenizer) -> str:
    sides = ("completion",) if "completion" in rows[0] else ("chosen", "rejected")
    counts = {side: [] for side in ("prompt", *sides)}  # type: dict[str, list[int]]
    for side in counts:
        texts = ["\n".join(m["content"] for m in row[side]) for row in rows]
        messages = [len(row[side]) for row in rows]
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        counts[side] = [
            len(e) + TOKENS_A_MESSAGE * n for e, n in zip(encoded, messages, strict=True)
        ]
    longest = [
        prompt + max(counts[side][i] for side in sides) for i, prompt in enumerate(counts["prompt"])
    ]
    limit = _limit(config)
    ordered = sorted(longest)
    shown = f"median {ordered[len(ordered) // 2]}, 95th {ordered[int(0.95 * (len(ordered) - 1))]}, longest {ordered[-1]}"
    if limit is None:
        return f"{name}: tokens a row: {shown}; nothing is cut"
    cut = sum(length > limit for length in longest)
    lost = sum(prompt >= limit for prompt in counts["prompt"])
    hint = " (warning: they teach nothing; raise `max_length`)" if lost else ""
    verdict = (
        "none is cut"
        if not cut
        else f"{cut:,} of {len(rows):,} are cut there, {lost:,} lose the whole completion{hint}"
    )
    return f"{name}: tokens a row: {shown}; `max_length` {limit}: {verdict}"


def _limit(config: TRLStage) -> int | None:
    if "max_length" in config.trainer:
        return config.trainer["max_length"]
    default = trl_fields.trl_fields(str(config.trainer_config))["max_length"].default
    return None if default in (None, "None") else int(default)
