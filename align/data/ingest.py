"""Ingestion: read sources into row tables, checking every row before it is stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.data import MixtureSource, Prepare, Source
from align.config.readers import WRITTEN_COLUMNS
from align.data import annotated_pairs
from align.data.columns import (
    check_column_map,
    check_columns,
    columns_of,
    columns_of_kind,
    complete_columns,
    kind_of_part,
    rename_columns,
)
from align.data.decontamination import EvaluationPrompts, user_texts
from align.data.deduplication import MinHashIndex
from align.data.formats import UNKNOWN_LABEL, read_row, unread_fields
from align.data.pairing import PairingOptions
from align.data.public_datasets import PUBLIC_FORMATS, trees
from align.data.row_layouts import RowLayouts
from align.data.row_store import RowTable
from align.data.rows import UNUSUAL, DroppedError, Raw, Row, normalize_text
from align.data.sources import Part, check_hub_keys, read_source, source_files
from align.data.tool_calls import is_empty
from align.data.transcripts import reads_prompt
from align.errors import DataError, nearest

GROUPED: Mapping[str, Callable[[Iterator[Raw], str], Iterator[Raw]]] = {
    "oasst": lambda rows, source: trees(rows),
    "annotations": annotated_pairs.grouped,
}
"""Readers of which several rows make a pair: a function of the rows and the name of their file."""
UNITS = {"oasst": "tree", "annotations": "annotated pair"}
"""What these readers count, in the place of a dropped row."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """Tables of all sources, by kind."""

    sources: list[MixtureSource]
    preferences: dict[str, RowTable]
    """Rows of the source or of the mixture."""
    demonstrations: dict[str, RowTable] | None
    """Rows of the source ``demonstrations``, if it is set."""
    minhash: MinHashIndex | None
    """Signatures of all prompts, if near-duplicates are searched for."""
    files: list[Path]
    """Local files that were read."""
    unread: dict[str, int]
    """Columns and fields of turns that are not read, with the number of rows that have them."""
    recognized: dict[str, str]
    """The layout and the columns that were recognized, by the name of the source."""
    unusual: dict[str, dict[str, Any]]
    """What is unusual in rows, but no reason to drop them: their number, the place of the first."""

    @property
    def tables(self) -> list[RowTable]:
        """All tables."""
        return [*self.preferences.values(), *(self.demonstrations or {}).values()]

    @property
    def name(self) -> str:
        """Names of the sources, for messages."""
        return ", ".join(source.source for source in self.sources)


def ingest(config: Prepare) -> Ingested:
    """Read and check all sources of a stage.

    Raises:
        DataError: One line for each problem with the sources.
    """
    sources = preference_sources(config)
    for source in sources:
        check_hub_keys(source)
        check_column_map(source.reader, source.columns)
    ingester = _Ingester(config)
    preferences, demonstrations = ingester.read(sources), None
    names = ", ".join(source.source for source in sources)
    if config.demonstrations is not None:
        demonstrations = ingester.read([_demonstration_source(config, sources[0])])
        preferences.pop("demonstrations", None)
        if not preferences:
            raise DataError(
                f"{names}: contains only demonstrations, and `demonstrations` names another source;"
                " set `source` to one of the two, and remove `demonstrations`"
            )
    files = list(dict.fromkeys(ingester.files))
    return Ingested(
        sources,
        preferences,
        demonstrations,
        ingester.minhash,
        files,
        dict(ingester.unread),
        ingester.recognized,
        ingester.unusual,
    )


def preference_sources(config: Prepare) -> list[MixtureSource]:
    """The sources of the mixture, or the one source."""
    if config.mixture:
        return config.mixture
    settings = {name: getattr(config, name) for name in Source.model_fields}
    return [MixtureSource.model_construct(**settings, source=config.source)]


def _demonstration_source(config: Prepare, first: MixtureSource) -> MixtureSource:
    """The source ``demonstrations``.

    It is read like the first source, but without its Hub configuration and revision.
    """
    return MixtureSource.model_construct(
        source=config.demonstrations,
        reader=first.reader,
        columns=first.columns,
        data_split=config.data_split,
        max_rows=config.max_rows,
        labels=first.labels,
    )


def evaluation_prompts(name: str, n: int) -> EvaluationPrompts:
    """Read a set of evaluation prompts.

    It is a file, all files of a folder, or the split ``test`` of a Hub data set.

    Raises:
        DataError: A row has no prompt.
    """
    files = source_files(name, split="")
    parts: list[Part] = []
    for source, split in [(str(file), "") for file in files] or [(name, "test")]:
        parts += read_source(MixtureSource.model_construct(source=source, data_split=split))
    texts, n_unread, first = list[str](), 0, ""
    for part in parts:
        for number, raw in enumerate(part.rows, 1):
            prompt = user_texts(raw)
            texts += prompt or []
            if prompt is None:
                names = ", ".join(f"`{column}`" for column in list(raw)[:8])
                first = first or f" (row {number} of {part.name} has {names or 'no columns'})"
                n_unread += 1
    if n_unread or not texts:
        raise DataError(
            f"decontaminate: {name}: {n_unread} rows have no text in `prompt`, `messages`,"
            f" `question` or `instruction`{first}; rename the column that contains the prompt"
        )
    return EvaluationPrompts(name, texts, n)


class _Ingester:
    """Reads sources one after the other; they are numbered in this order."""

    def __init__(self, config: Prepare) -> None:
        self._config = config
        self._evaluation = [
            evaluation_prompts(name, config.decontamination_ngram) for name in config.decontaminate
        ]
        self.minhash = MinHashIndex() if config.near_duplicates else None
        self.files: list[Path] = []
        self.unread: Counter[str] = Counter()
        self.recognized: dict[str, str] = {}
        self.unusual: dict[str, dict[str, Any]] = {}
        self._n_sources = 0
        n_sources = len(preference_sources(config)) + (config.demonstrations is not None)
        self._has_several_sources = n_sources > 1

    def read(self, sources: Sequence[MixtureSource]) -> dict[str, RowTable]:
        """Tables of sources, sorted by kind."""
        tables: dict[str, RowTable] = {}
        for source in sources:
            # Of a reader that groups rows, `max_rows` counts the groups below.
            max_rows = None if source.reader in GROUPED else source.max_rows
            parts = read_source(source, max_rows=max_rows)
            check_columns(parts, source.reader, source.columns)
            self._check_parts(parts, source)
            n_rows: Counter[str] = Counter()
            for part in parts:
                if part.head:
                    self._read_part(part, source, tables, n_rows)
            if "unpaired" in tables and not source.labels:
                self._check_labels(tables["unpaired"], source)
            if source.labels and "unpaired" not in tables:
                raise DataError(
                    f"{source.source}: `labels` has no effect, because there is no column `label`;"
                    " remove it, or map the column with `columns: {label: ...}`"
                )
            self.files += source_files(source.source, split=source.data_split)
            self._n_sources += 1
        return dict(sorted(tables.items()))

    def _check_parts(self, parts: Sequence[Part], source: MixtureSource) -> None:
        """Raise an error if the source is empty or lacks a column that is copied."""
        rows = [row for part in parts for row in part.head]
        if not rows:
            files = "1 empty file" if len(parts) == 1 else f"{len(parts)} empty files"
            raise DataError(f"{source.source}: no rows; found {files}")
        written = WRITTEN_COLUMNS.get(source.reader, ())
        missing = [
            name
            for name in self._config.keep_columns
            if name not in written and not any(name in row for row in rows)
        ]
        if missing:
            names = list(dict.fromkeys(name for part in parts for name in columns_of(part)))
            raise DataError(
                *(
                    f"keep_columns: {source.source} has no column `{m}`{nearest(m, names)}"
                    for m in missing
                )
            )

    def _check_labels(self, table: RowTable, source: MixtureSource) -> None:
        """Raise an error for unknown labels: they may be all that are undesirable."""
        count = table.n_invalid[self._n_sources, UNKNOWN_LABEL]
        if count:
            raise DataError(
                f"{source.source}: {count} of {table.n_read[self._n_sources]} labels are not true,"
                f" false, 1 or 0 ({table.examples[UNKNOWN_LABEL]}); map every label, as in"
                " `labels: {up: true, down: false}`; other rows are then dropped"
            )

    def _read_part(
        self, part: Part, source: MixtureSource, tables: dict[str, RowTable], n_rows: Counter[str]
    ) -> None:
        layout, columns = complete_columns(part, source.reader, source.columns)
        if layout:
            present = set(columns_of(part))
            names = ", ".join(f"{own}: {name}" for own, name in columns.items() if name in present)
            self.recognized[source.source] = f"{layout}, columns {{{names}}}"
        kind = kind_of_part(part, source.reader, columns)
        table = tables.setdefault(kind, RowTable(kind))
        options = _pairing_options(source, self._config.split_seed)
        is_whole = part.name == source.source and not self._has_several_sources
        file, unit = "" if is_whole else f"{part.name}, ", UNITS.get(source.reader, "row")
        used = {
            *self._config.keep_columns,
            *columns.values(),
            *columns_of_kind(kind, source.reader, columns),
        }
        prompt = columns.get("prompt", "prompt")
        if source.reader == "hh" and prompt not in self._config.keep_columns:
            used.discard(prompt)
        group = GROUPED.get(source.reader)
        rows = group(part.rows, part.name) if group else part.rows
        row_layouts = RowLayouts(part, kind, source)
        for number, raw in enumerate(rows, start=1):
            if source.max_rows is not None and n_rows[kind] >= source.max_rows:
                break
            n_rows[kind] += 1
            renamed = rename_columns(raw, columns)
            other = None if group else row_layouts.count(raw, renamed, number)
            if source.reader not in PUBLIC_FORMATS and other is None:
                is_read = source.reader == "hh" and reads_prompt(renamed)
                self._count_unread(raw, renamed, used | {prompt} if is_read else used)
            for converted in _convert(other or renamed, source.reader, columns, options):
                table.n_read[self._n_sources] += 1
                try:
                    if isinstance(converted, DroppedError):
                        raise converted
                    row = read_row(converted, kind, source.reader, source.labels)
                    self._check_contamination(row)
                except DroppedError as error:
                    example = error if group else row_layouts.with_columns(error, raw, renamed)
                    place = f"{file}{error.place or f'{unit} {number}'}"
                    table.add_invalid(example, self._n_sources, place)
                else:
                    if UNUSUAL in row:
                        self._count_unusual(row.pop(UNUSUAL), f"{file}{unit} {number}")
                    copied = {
                        name: _flatten(raw.get(name, converted.get(name)))
                        for name in self._config.keep_columns
                    }
                    margin, place = converted.get("margin"), f"{file}{unit}"
                    table.add(row, self._n_sources, copied, margin, place=place, number=number)
                    self._add_to_index(table, row)
        row_layouts.raise_if_mixed()

    def _count_unread(self, raw: Raw, renamed: Raw, used: set[str]) -> None:
        """Count the columns and the fields of turns that are not read."""
        for name in raw:
            if name not in used and not is_empty(raw[name]):
                self.unread[f"column `{name}`"] += 1
        for name in unread_fields(renamed):
            self.unread[f"field `{name}` of turns"] += 1

    def _count_unusual(self, names: Sequence[str], place: str) -> None:
        """Count what is unusual in a row that is kept."""
        for name in names:
            self.unusual.setdefault(name, {"rows": 0, "first": place})["rows"] += 1

    def _check_contamination(self, row: Row) -> None:
        if self._evaluation:
            texts = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
            for prompts in self._evaluation:
                reason = prompts.contamination(texts)
                if reason:
                    raise DroppedError(reason)

    def _add_to_index(self, table: RowTable, row: Row) -> None:
        if self.minhash is not None:
            text = "\n".join(normalize_text(turn["content"]) for turn in row["prompt"])
            self.minhash.add(table.prompt_ids[-1], table.conversation_ids[-1], text)


def _pairing_options(source: MixtureSource, seed: int) -> PairingOptions:
    return PairingOptions(
        pairing=source.pairing or "best_worst",
        margin=source.margin or 0.0,
        ratio=source.ratio or 1.0,
        languages=tuple(source.languages),
        seed=seed,
    )


def _convert(
    raw: Raw | DroppedError, reader: str, columns: Mapping[str, str], options: PairingOptions
) -> Iterator[Raw | DroppedError]:
    """Raw pairs of a row of a public data set; any other row, without columns not to be read."""
    if isinstance(raw, DroppedError):
        return iter([raw])
    if reader in PUBLIC_FORMATS:
        return PUBLIC_FORMATS[reader](raw, options)
    unread = {"margin", "history"} - columns.keys()
    return iter([{name: value for name, value in raw.items() if name not in unread}])


def _flatten(value: Any) -> Any:
    """Convert a list or an object to JSON text.

    Parquet would give all objects the fields of the first row, and lose other fields.
    """
    if not isinstance(value, (list, dict)):
        return value
    return json.dumps(value, default=str)
