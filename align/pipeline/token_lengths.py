"""Token lengths of the rows of a recipe, and how many rows its stages would truncate.

Only the ``tokenizers`` library is used, without chat templates: a fixed number of tokens is added
for each message, so a length may be wrong by a token or two for each message. ``align data show``
prints the exact tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from align.config.base import NewModel, Stage
from align.config.data import Prepare
from align.config.recipe import ErrorCollector
from align.data import sources, statistics
from align.data.prepare import prepare
from align.errors import UserError
from align.pipeline.plan import PlannedStage
from align.pipeline.table_checks import PreparedTables, check_contents

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENS_PER_MESSAGE = 5  # ChatML: start, role, newline, end, newline
Tables = Mapping[str, Mapping[str, Sequence[Any]]]  # kind → split → rows


def examine(errors: ErrorCollector, stages: Sequence[PlannedStage]) -> Iterator[str]:
    """Prepare the data in memory and measure the rows of training stages; yield lines."""
    tables: dict[Path, Tables] = {}
    tokenizers: dict[Path, Tokenizer | None] = {}
    for stage in stages:
        if stage.config.prepares_data:
            with errors.at(stage.name):
                yield from _prepared_lines(stage, stages, tables, errors)
        elif stage.config.trainer_config:
            rows = _training_rows(stage, tables)
            with errors.at(stage.name, "model"):
                tokenizer = tokenizers[stage.folder] = _tokenizer(stage, rows, tokenizers)
                if rows is not None and tokenizer is not None:
                    yield _length_line(stage.name, stage.config, rows, tokenizer)


def _prepared_lines(
    stage: PlannedStage,
    stages: Sequence[PlannedStage],
    tables: dict[Path, Tables],
    errors: ErrorCollector,
) -> Iterator[str]:
    """Prepare the data of one stage in memory; its counts, dropped rows and warnings."""
    read = [s for s in stage.config.external_sources() if s.split]
    remote = [s.name for s in read if not sources.source_files(s.name, split=s.split)]
    if remote:
        hub = ", ".join(remote)
        yield f"{stage.name}: {hub} is on the Hub; its rows are checked when the stage runs"
        return
    prepared = prepare(cast(Prepare, stage.config))
    tables[stage.folder] = prepared.tables()
    counts = []
    for kind, splits in tables[stage.folder].items():
        n_train, total = len(splits["train"]), sum(map(len, splits.values()))
        counts.append(f"{kind} {n_train:,} + {total - n_train:,} held out")
    dropped = "; ".join(f"{count} × {reason}" for reason, count in prepared.dropped.items())
    yield f"{stage.name}: {', '.join(counts)}{f'; dropped: {dropped}' if dropped else ''}"
    for warning in statistics.collect(prepared).summary()["warnings"]:
        yield f"{stage.name}: warning: {warning}"
    names = {f"{kind}-{split}" for kind, splits in tables[stage.folder].items() for split in splits}
    contents = PreparedTables(
        names,
        lambda split: [
            row["prompt"][-1]["content"] for row in tables[stage.folder]["prompts"][split]
        ],
    )
    check_contents(errors, stage.folder, contents, stages)


def _training_rows(stage: PlannedStage, tables: Mapping[Path, Tables]) -> Sequence[Any] | None:
    """The training rows of a stage, if its data were prepared in memory."""
    for table in stage.config.reads:
        kinds = tables.get(Path(stage.inputs[table.input]), {})
        if table.kind in kinds:
            return kinds[table.kind]["train"]
    return None


def _tokenizer(
    stage: PlannedStage, rows: Sequence[Any] | None, known: Mapping[Path, Tokenizer | None]
) -> Tokenizer | None:
    """The tokenizer of a stage, a new one trained on ``rows``; None if it is not available yet."""
    from tokenizers import Tokenizer

    model = getattr(stage.config, "model", None)
    if isinstance(model, NewModel):
        if rows is None:
            return None
        from align.models import tokenization

        return tokenization.train_bpe(_texts(rows), vocab_size=model.vocab_size)
    source = stage.inputs["model"]
    if isinstance(source, str):
        return None  # on the Hub
    if source in known:
        return known[source]
    file = source / "tokenizer.json"
    if not file.is_file():
        return None  # not a fast tokenizer, or a stage that has not run
    if not _has_template(source) and "chat_template_path" not in stage.config.trl_arguments():
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


def _length_line(name: str, config: Stage, rows: Sequence[Any], tokenizer: Tokenizer) -> str:
    """The distribution of the lengths of ``rows``, and how many exceed ``max_length``."""
    columns = ("completion",) if "completion" in rows[0] else ("chosen", "rejected")
    lengths = {column: _lengths(rows, column, tokenizer) for column in ("prompt", *columns)}
    longest = [
        prompt + max(lengths[column][i] for column in columns)
        for i, prompt in enumerate(lengths["prompt"])
    ]
    ordered = sorted(longest)
    median, high = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    summary = f"{name}: tokens per row: median {median}, 95th percentile {high}, max {ordered[-1]}"
    limit = config.trl_value("max_length")
    if limit is None:
        return f"{summary}; no limit"
    truncated = sum(length > limit for length in longest)
    if not truncated:
        return f"{summary}; `max_length` {limit}: none is truncated"
    empty = sum(prompt >= limit for prompt in lengths["prompt"])
    warning = " (warning: these rows train nothing; raise `max_length`)" if empty else ""
    return (
        f"{summary}; `max_length` {limit}: {truncated:,} of {len(rows):,} are truncated, "
        f"{empty:,} lose the whole completion{warning}"
    )


def _lengths(rows: Sequence[Any], column: str, tokenizer: Tokenizer) -> list[int]:
    texts = ["\n".join(m["content"] for m in row[column]) for row in rows]
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [
        len(e) + TOKENS_PER_MESSAGE * len(row[column]) for e, row in zip(encoded, rows, strict=True)
    ]
