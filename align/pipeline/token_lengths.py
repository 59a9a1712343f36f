"""Prepared data of a recipe, the token lengths of its rows, and how many rows its stages lose.

:mod:`align.pipeline.row_tokens` counts the tokens; ``align data show`` prints them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

from align.config.data import Prepare
from align.config.recipe import ErrorCollector
from align.config.training_base import PolicyStage, TRLStage
from align.data import sources, statistics
from align.data.prepare import PreparedData, prepare
from align.data.tables import has_table, table_file
from align.data.tables import read as read_table
from align.errors import UserError
from align.models.conversations import MISSING_END_REPAIR, trained_turns
from align.models.gguf_checks import naming_files
from align.pipeline import row_tokens, template_checks
from align.pipeline.estimates import LARGEST_SOURCE
from align.pipeline.plan import PlannedStage
from align.pipeline.row_tokens import Counts, Sequences, Tables, TokenizedModel
from align.pipeline.table_checks import PreparedTables, TableCheck, check_contents, no_further_check
from align.training import row_limits

MAX_LENGTH = "trainer.max_length: "
"""Beginning of the errors about the length of rows."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The rows that a stage loses."""

    count: int
    reason: str
    """The count and the reason in words."""


def examine(
    errors: ErrorCollector,
    stages: Sequence[PlannedStage],
    check_tables: TableCheck = no_further_check,
) -> Iterator[str]:
    """Prepare the data in memory and count the tokens of training stages; yield lines.

    ``check_tables`` makes further checks of the tables, and yields lines as well.
    """
    tables: dict[Path, Tables] = {}
    models = row_tokens.unconverted(stages)
    gguf_files = {folder: file for s in stages for folder, file in s.gguf_files.items()}
    yield from _read_gguf_tokenizers(errors, stages, models)
    for stage in stages:
        if stage.config.prepares_data:
            with errors.at(stage.name):
                yield from _prepared_lines(stage, stages, tables, errors, check_tables)
        elif isinstance(stage.config, TRLStage):
            yield from _stage_lines(errors, stage, stage.config, tables, models, gguf_files)
        else:
            template_checks.check_prompts(errors, stage, tables, models, gguf_files)


def _read_gguf_tokenizers(
    errors: ErrorCollector, stages: Sequence[PlannedStage], models: dict[Path, TokenizedModel]
) -> Iterator[str]:
    """Add the tokenizers of the GGUF files that are not converted yet to their models."""
    unread = set(models)
    for stage in stages:
        for key, folder in stage.inputs.items():
            if folder not in unread or not isinstance(folder, Path):
                continue
            unread.remove(folder)
            file = stage.gguf_files[folder]
            yield f"{file}: a run first converts it into {folder}"
            with errors.at(stage.name, *key.split(".")):
                models[folder] = row_tokens.read_gguf_tokenizer(file)


def _stage_lines(
    errors: ErrorCollector,
    stage: PlannedStage,
    config: TRLStage,
    tables: Mapping[Path, Tables],
    models: dict[Path, TokenizedModel],
    gguf_files: Mapping[Path, Path],
) -> Iterator[str]:
    """The lengths of the rows of a stage; its errors are collected."""
    if "model" in config.input_names() and "model" not in stage.inputs:
        return  # its error has been reported
    data = stage.inputs.get(config.data_input)
    rows = row_tokens.rows_of(config, {} if data is None else tables.get(Path(data), {}))
    fields = config.trl_arguments()
    has_template = fields.get("chat_template_path") is not None
    place = (stage.name, *(("trainer", "chat_template_path") if has_template else ("model",)))
    with errors.at(stage.name, "model"), naming_files(gguf_files):
        model = models[stage.folder] = row_tokens.read_model(stage, rows, models)
        n_errors = len(errors.lines)
        with at_field(errors, stage.name):  # needs no rows
            row_limits.max_length(config, model.positions)
        if model.conversations is not None:
            with errors.at(*place), naming_files(gguf_files):
                model.conversations.end_of_turn()  # finds the faults that depend on no row
                with errors.at(*place), naming_files(gguf_files):
                    template_checks.check_rows(model.conversations, rows, config.trained_turns)
                if isinstance(config, PolicyStage) and not config.allow_missing_end_token:
                    model.conversations.check_end(repair=MISSING_END_REPAIR)
            if rows and len(errors.lines) == n_errors:
                with at_field(errors, stage.name):
                    counts = row_tokens.count(config, rows, model)
                    yield _length_line(stage.name, counts, config, len(rows))
                    yield from _trained_lines(stage.name, counts, config, rows, model)
                    yield from template_checks.special_token_lines(
                        stage.name, model.conversations, rows
                    )
                    yield from template_checks.end_token_lines(
                        stage.name, model.conversations, fields.get("eos_token")
                    )
                    yield from template_checks.open_reasoning_lines(
                        stage.name, model.conversations, rows, config.trained_turns
                    )
                    problem = row_limits.lost_rows_problem(
                        config, counts.lost, len(rows), counts.limit
                    )
                    if problem is not None:
                        raise UserError(f"{MAX_LENGTH}{problem}")


@contextlib.contextmanager
def at_field(errors: ErrorCollector, name: str) -> Iterator[None]:
    """Collect an error about ``max_length`` at its key; others pass."""
    try:
        yield
    except UserError as error:
        if not all(line.startswith(MAX_LENGTH) for line in error.lines):
            raise
        lines = [line.removeprefix(MAX_LENGTH) for line in error.lines]
        errors.add((name, "trainer", "max_length"), *lines)


def lost_rows(
    stages: Sequence[PlannedStage], prepared: Mapping[Path, PreparedData]
) -> dict[str, Lost]:
    """How many of its rows each training stage loses, by name; stages without loss are left out.

    ``prepared`` are the data in memory, by folder. A stage with an error or with a large table is
    left out.
    """
    lost: dict[str, Lost] = {}
    models = row_tokens.unconverted(stages)
    for stage in stages:
        config = stage.config
        if not isinstance(config, TRLStage):
            continue
        with contextlib.suppress(UserError):
            rows = row_tokens.rows_of(config, _training_tables(stage, config, prepared))
            model = models[stage.folder] = row_tokens.read_model(stage, rows, models)
            if rows and model.conversations is not None:
                counts = row_tokens.count(config, rows, model)
                if counts.lost:
                    lost[stage.name] = Lost(
                        counts.lost,
                        row_limits.lost_rows(config, counts.lost, len(rows), counts.limit),
                    )
    return lost


def _training_tables(
    stage: PlannedStage, config: TRLStage, prepared: Mapping[Path, PreparedData]
) -> Tables:
    """The rows that a stage trains on: those in memory, or those of small files."""
    folder = Path(stage.inputs[config.data_input])
    if folder in prepared:
        return prepared[folder].tables()
    kinds = [table.kind for table in config.reads if has_table(folder, table.kind, "train")]
    files = [table_file(folder, kind, "train") for kind in kinds]
    if sum(file.stat().st_size for file in files) > LARGEST_SOURCE:
        return {}
    return {kind: {"train": read_table(folder, kind, "train")} for kind in kinds}


def _prepared_lines(
    stage: PlannedStage,
    stages: Sequence[PlannedStage],
    tables: dict[Path, Tables],
    errors: ErrorCollector,
    check_tables: TableCheck = no_further_check,
) -> Iterator[str]:
    """Prepare the data of one stage in memory; its counts, dropped rows and warnings."""
    read = [s for s in stage.config.external_sources() if s.split]
    remote = [s.name for s in read if not sources.source_files(s.name, split=s.split)]
    if remote:
        hub = ", ".join(remote)
        yield f"{stage.name}: {hub} is on the Hub; its rows are checked when the stage runs"
        return
    prepared = prepare(cast(Prepare, stage.config))
    in_memory = prepared.empty_tables()
    counted = statistics.collect(
        prepared, sink=lambda row: in_memory[row.kind][row.split].append(row.row)
    )
    tables[stage.folder] = in_memory
    counts = []
    for kind, splits in in_memory.items():
        n_train, total = len(splits["train"]), sum(map(len, splits.values()))
        counts.append(f"{kind} {n_train:,} + {total - n_train:,} held out")
    yield f"{stage.name}: {', '.join(counts)}"
    summary = counted.summary()
    for line in statistics.dropped_lines(summary):
        yield f"{stage.name}: dropped {line}"
    for line in statistics.how_read(summary | prepared.findings):
        yield f"{stage.name}: {line}"
    for warning in summary["warnings"]:
        yield f"{stage.name}: warning: {warning}"
    names = {f"{kind}-{split}" for kind, splits in in_memory.items() for split in splits}
    contents = PreparedTables(
        names,
        lambda kind, split, name: [row.get(name) for row in in_memory[kind][split]],
        lambda kind, split: next(iter(in_memory[kind][split]), {}),
    )
    check_contents(errors, stage.folder, contents, stages)
    yield from check_tables(errors, stage.folder, contents, stages)


def _length_line(name: str, counts: Counts, config: TRLStage, rows: int) -> str:
    """The distribution of the lengths of ``rows`` rows, and how many exceed the limit."""
    ordered = sorted(counts.lengths)
    median, high = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    summary = f"{name}: tokens per row: median {median}, 95th percentile {high}"
    if counts.limit is None:
        return f"{summary}; no limit"
    limited = "`max_length`" if counts.limit == config.trl_value("max_length") else "positions"
    if not counts.truncated:
        return f"{summary}; {limited} {counts.limit}: none is truncated"
    lost = row_limits.lost_rows(config, counts.lost, rows, counts.limit)
    warning = f" (warning: {lost})" if counts.lost else ""
    return (
        f"{summary}; {limited} {counts.limit}: {counts.truncated:,} of {rows:,} are longer{warning}"
    )


def _trained_lines(
    name: str,
    counts: Counts,
    config: TRLStage,
    rows: Sequence[Sequences],
    model: TokenizedModel,
) -> Iterator[str]:
    """How many tokens of a row a policy trains, and of how many rows several turns.

    The row of a pair trains both of its completions.
    """
    if not isinstance(config, PolicyStage) or model.conversations is None:
        return
    mean = sum(counts.trained) / len(counts.trained)
    template = model.conversations.template.name
    unit = "pair" if "rejected" in config.row_columns else "row"
    line = (
        f"{name}: trained tokens per {unit}: mean {mean:.1f}, median {median(counts.trained):g}, "
        f"by the template of {template}"
    )
    several = sum(bool(trained_turns(row.prompt)) for row in rows)
    if several and config.trainer.get("completion_only_loss") is not False:
        trained = "all are" if config.trained_turns == "all" else "the last is"
        line += f"; {several:,} of {len(rows):,} rows have several turns: {trained} trained"
    yield line
