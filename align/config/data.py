"""Configuration of ``prepare``, the stage that reads preference data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from align.config import catalog
from align.config.base import (
    Config,
    ExternalSource,
    Problem,
    Stage,
    between_keys,
)
from align.config.readers import COLUMNS, READER_OPTIONS, Reader
from align.errors import nearest


class Source(Config):
    """How a source of preference data is read. A catalog entry sets all of these keys."""

    reader: Reader = "columns"
    """Format of the source: named columns, transcripts as in Anthropic's HH-RLHF (``hh``), or the
    format of the public data set of that name; ``gsm8k_solutions`` are labeled solutions, and
    ``annotations`` decisions of people about two completions."""
    config: str | None = None
    """Configuration (subset) of a Hub data set."""
    data_dir: str | None = None
    """Folder of a Hub data set that is read, such as ``harmless-base``."""
    data_split: str = "train"
    """Split of a Hub data set or of a folder that is read."""
    revision: str | None = None
    """Commit, branch or tag of a Hub data set."""
    columns: dict[str, str] = Field({})
    """Column names of Align mapped to those of the source, such as ``{rejected: reject}``. For
    ``ultrafeedback``, ``shp`` and ``tldr``, the columns that they require: ``{history: post}``.
    ``system`` is the system turn; ``input`` is appended to the prompt; ``history`` has earlier
    questions with their answers; ``tools`` are those of the conversation. The columns of ShareGPT,
    of Alpaca and of OpenAI's preferences are recognized without a map."""
    labels: dict[str, bool] = Field({})
    """Labels of the source mapped to true and false, such as ``{up: true, down: false}``. Default:
    true, false, 1 and 0; a row with another label is an error."""
    pairing: Literal["best_worst", "best_random", "all"] | None = None
    """Which pairs are made from several scored completions: best against worst (the default), best
    against a random other, or all pairs."""
    margin: float | None = Field(None, ge=0.0)
    """Smallest difference of the scores of a pair; for ``oasst``, of the ranks."""
    ratio: float | None = Field(None, ge=1.0)
    """Smallest ratio of the votes of a pair, for ``shp``."""
    languages: list[str] = Field([])
    """Languages that are kept, for ``oasst``. Default: all."""
    max_rows: int | None = Field(None, ge=1)
    """Number of rows that are read from the start of the source; for ``oasst``, conversation trees.
    """

    @model_validator(mode="before")
    @classmethod
    def _apply_catalog(cls, values: Any) -> Any:
        return catalog.with_catalog_entry(values) if isinstance(values, dict) else values

    @field_validator("labels", mode="before")
    @classmethod
    def _convert_labels(cls, values: Any) -> Any:
        """Keys as text: YAML reads ``1`` as a number and ``yes`` as true."""
        if not isinstance(values, dict):
            return values
        return {str(label).strip().lower(): value for label, value in values.items()}

    @between_keys
    def _check_reader_options(self) -> Iterator[str]:
        for key, readers in READER_OPTIONS.items():
            if getattr(self, key) not in (None, []) and self.reader not in readers:
                yield (
                    f"`{key}` has no effect with `reader: {self.reader}`; remove it, or set "
                    f"{' or '.join(f'`reader: {reader}`' for reader in readers)}"
                )


class MixtureSource(Source):
    """One source of a mixture."""

    source: str = Field(min_length=1)
    """A file or folder, a name in the catalog, or a Hub id."""
    weight: float | None = Field(None, gt=0.0)
    """Share of the mixture, relative to the other weights. Sources with too many rows are
    subsampled; no row is repeated."""


class Prepare(Source, Stage):
    """Read preference data, check it, split it by prompt, and write it as Parquet."""

    code_version: ClassVar[int] = 9
    main_process_only: ClassVar[bool] = True
    prepares_data: ClassVar[bool] = True
    prompt_keys: ClassVar[tuple[str, ...]] = ("keep_columns",)

    source: str | None = Field(None, min_length=1)
    """``embedded``, a file or folder (JSONL, JSONL.gz, CSV, Parquet), a name in the catalog, or a
    Hub id."""
    mixture: list[MixtureSource] = Field([])
    """Several sources instead of one, each with its own reader, ``max_rows`` and ``weight``."""
    demonstrations: str | None = None
    """Separate source of demonstrations for SFT; names in the catalog are not allowed. Default: the
    chosen completions."""
    test_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Fraction of the prompts held out for ``evaluate``."""
    validation_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of the prompts held out for evaluation during training."""
    split_seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the split, of random pairs, and of subsampling by weight."""
    near_duplicates: Literal["keep", "drop"] | None = None
    """Handling of near-duplicate prompts: ``keep`` puts them into the same split, ``drop``
    keeps the first. Default: near-duplicates are not searched for."""
    near_duplicate_threshold: float = Field(0.8, ge=0.5, le=1.0)
    """Jaccard similarity of the 5-character shingles above which two prompts are near-duplicates.
    It is estimated from 128 hashes, with a standard error of 0.035 at 0.8."""
    decontaminate: list[str] = Field([])
    """Sources of evaluation prompts: files, folders (all of their files) or Hub ids (their split
    ``test``). Rows that contain one of these prompts are dropped."""
    decontamination_ngram: int = Field(13, ge=3)
    """Number of consecutive words, shared with an evaluation prompt, that count as contamination.
    Shorter prompts are matched as a whole."""
    keep_columns: list[str] = Field([])
    """Columns of the source, and ``answer`` of ``gsm8k_solutions``, that are copied into
    ``prompts-*.parquet``, from the first row of each prompt. Lists and objects are stored as JSON
    text."""

    @between_keys
    def _check_sources(self) -> Iterator[str]:
        if bool(self.source) == bool(self.mixture):
            yield "set either `source` or `mixture`"
            return
        if self.mixture:
            misplaced = [key for key in Source.model_fields if key in self.model_fields_set]
            for key in misplaced:
                yield f"`{key}` belongs into the entries of `mixture`"
            if len({entry.weight is None for entry in self.mixture}) > 1:
                yield "set `weight` in every entry of `mixture`, or in none"

    @between_keys
    def _check_columns(self) -> Iterator[str]:
        reserved = {"prompt", "prompt_id", "tools"} & set(self.keep_columns)
        if reserved:
            yield (
                f"`keep_columns` must not contain `{min(reserved)}`, which Align writes itself; "
                "rename the column of the source"
            )

    @between_keys
    def _check_fractions(self) -> Iterator[str]:
        if self.test_fraction + self.validation_fraction >= 1.0:
            yield (
                "`test_fraction` and `validation_fraction` must sum to less than 1, "
                "or no prompt is left to train on"
            )

    def sources(self) -> tuple[ExternalSource, ...]:
        """The sources whose rows are read."""
        sources = [
            ExternalSource(f"mixture.{i}", entry.source, entry.data_split, entry.revision)
            for i, entry in enumerate(self.mixture)
        ]
        if self.source:
            sources = [ExternalSource("source", self.source, self.data_split, self.revision)]
        if self.demonstrations:
            sources.append(
                ExternalSource(
                    "demonstrations", self.demonstrations, self.data_split, self.revision
                )
            )
        return tuple(sources)

    def external_sources(self) -> tuple[ExternalSource, ...]:
        """The sources, and the evaluation prompts to decontaminate against."""
        prompts = (
            ExternalSource(f"decontaminate.{i}", name, split="")
            for i, name in enumerate(self.decontaminate)
        )
        return (*self.sources(), *prompts)

    def digest_settings(self) -> dict[str, Any]:
        """All settings except the names of sources, whose content counts instead."""
        settings = super().digest_settings()
        settings |= dict.fromkeys(("source", "demonstrations", "decontaminate"))
        for entry in settings["mixture"]:
            entry["source"] = None
        return settings

    def missing_split(self, split: str, name: str, stages: Mapping[str, Stage]) -> str | None:
        """A split is missing if its fraction is 0."""
        fraction = f"{split}_fraction"
        if getattr(self, fraction, 1.0) == 0:
            return f"`{name}` has no {split} split; set `{name}.{fraction}` above 0"
        return None

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Keys of ``columns`` that are not columns of Align."""
        for key in self.columns:
            if key not in COLUMNS:
                yield Problem(("columns", key), f"not a column of Align{nearest(key, COLUMNS)}")
