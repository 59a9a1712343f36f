"""config.data"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import POLICY_STAGES, Config, Input, Stage

ALIGN_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "label")
REQUIRED_COLUMNS: dict[str, tuple[str, ...]] = {  # by the readers of public data sets
    "ultrafeedback": ("instruction", "completions"),
    "shp": ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"),
    "tldr": ("info", "summaries", "choice"),
    "oasst": (),
}
COLUMNS = (
    *ALIGN_COLUMNS,
    *dict.fromkeys(n for names in REQUIRED_COLUMNS.values() for n in names),
)  # of any reader
FORMATS = (("prompt", "chosen", "rejected"), ("prompt", "completion"), ("messages",))
READERS = ("columns", "hh", *REQUIRED_COLUMNS)


def columns_read(reader: str) -> tuple[str, ...]:
    """List the names that ``columns`` may map for a reader."""
    return REQUIRED_COLUMNS[reader] or ("prompt",) if reader in REQUIRED_COLUMNS else ALIGN_COLUMNS


class Source(Config):
    """Where preference data comes from, and how it is read. A name of the catalogue stands for all of it."""

    reader: Literal["columns", "hh", "ultrafeedback", "shp", "tldr", "oasst"] = "columns"
    """``hh`` reads whole transcripts as in Anthropic's HH-RLHF; the others the shapes of the sets they are named after."""
    config: str | None = None
    """The configuration (subset) of a Hub data set."""
    data_dir: str | None = None
    """The folder of a Hub data set to read, such as ``harmless-base``."""
    data_split: str = "train"
    """The split of a Hub data set to read."""
    revision: str | None = None
    """The commit, branch or tag of a Hub data set."""
    columns: dict[str, str] = {}
    """Our column names to the source's: ``{rejected: reject}``; of ``ultrafeedback``, ``shp`` and ``tldr`` those that they
    need: ``{history: post}``."""
    pairing: Literal["best_worst", "best_random", "all"] | None = None
    """Of several scored completions: best against worst (the default), best against a random other, or all pairs."""
    margin: float | None = Field(None, ge=0.0)
    """The least difference of scores (of ranks in ``oasst``) of a pair."""
    ratio: float | None = Field(None, ge=1.0)
    """The least ratio of votes in ``shp``."""
    languages: list[str] = []
    """Of ``oasst``: the languages that are kept; without it, all."""
    max_rows: int | None = Field(None, ge=1)
    """Read no more than the first so many rows; of ``oasst``, trees."""

    @model_validator(mode="before")
    @classmethod
    def _from_the_catalogue(cls, told: Any) -> Any:
        from align.config import catalog

        return catalog.with_catalog_entry(told) if isinstance(told, dict) else told

    @model_validator(mode="after")
    def _options_mean_something(self) -> Source:
        for key, readers in {
            "pairing": ("ultrafeedback", "oasst"),
            "margin": ("ultrafeedback", "oasst"),
            "ratio": ("shp",),
            "languages": ("oasst",),
        }.items():
            if getattr(self, key) not in (None, []) and self.reader not in readers:
                raise ValueError(
                    f"`{key}` means nothing to `reader: {self.reader}`; remove it, or read with "
                    f"{' or '.join(f'`reader: {reader}`' for reader in readers)}"
                )
        return self


class MixtureSource(Source):
    """One source of a mixture."""

    source: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0.0)
    """Its share of the mixture, in proportion to the others'; no row is repeated, the others are thinned by seed."""


class Prepare(Source, Stage):
    """Preference data in, checked and split by prompt, Parquet out."""

    code_version: ClassVar[int] = 3
    main_process_only: ClassVar[bool] = True

    source: str | None = Field(None, min_length=1)
    """``embedded``, a file or folder (JSONL, JSONL.gz, CSV, Parquet), a name of the catalogue, or a Hub id."""
    mixture: list[MixtureSource] = []
    """Several sources in place of one, each with its own reader, ``max_rows`` and ``weight``."""
    demonstrations: str | None = None
    """Another source for SFT, no name of the catalogue; without it, SFT trains on the chosen completions."""
    test_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """The share of prompts held out for ``evaluate``."""
    validation_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """The share of prompts held out for evaluation while training."""
    split_seed: int = 0
    """Another split of the same data; another draw of random pairs, and of what weights leave out."""
    near_duplicates: Literal["keep", "drop"] | None = None
    """Look for nearly equal prompts: ``keep`` puts them into one split, ``drop`` keeps the first. Without it, nobody looks."""
    near_duplicate_threshold: float = Field(0.8, ge=0.5, le=1.0)
    """The Jaccard similarity of 5-character pieces from which two prompts are nearly equal. It is estimated from 128
    hashes, so it may be 0.07 off (two standard deviations at 0.8)."""
    decontaminate: list[str] = []
    """Files, folders (all of their files) or Hub ids (their ``test``) with evaluation prompts, no names of the catalogue:
    rows with one of these prompts are dropped."""
    ngram: int = Field(13, ge=3)
    """So many words in a row, shared with an evaluation prompt, are contamination; shorter prompts are matched whole."""
    keep: list[str] = []
    """Columns of the source that come along into ``prompts-*.parquet``, of a prompt's first row; lists and objects as JSON
    text."""

    @model_validator(mode="after")
    def _one_source_or_many(self) -> Prepare:
        if bool(self.source) == bool(self.mixture):
            raise ValueError("give one of `source` and `mixture`")
        if self.mixture:
            own = [key for key in Source.model_fields if key in self.model_fields_set]
            if own:
                raise ValueError(f"`{own[0]}` goes into each entry of `mixture`")
            if len({entry.weight is None for entry in self.mixture}) > 1:
                raise ValueError("give every entry of `mixture` a `weight`, or none")
        taken = {"prompt", "prompt_id"} & set(self.keep)
        if taken:
            raise ValueError(
                f"`keep`: `{min(taken)}` is a column of ours; give the source's another name"
            )
        return self

    @model_validator(mode="after")
    def _fractions(self) -> Prepare:
        if self.test_fraction + self.validation_fraction >= 1.0:
            raise ValueError(
                "`test_fraction` and `validation_fraction` together leave nothing to train on"
            )
        return self

    def sources(self) -> list[tuple[str, str, str | None]]:
        """What is read from outside: source, split and revision of each."""
        first = [(e.source, e.data_split, e.revision) for e in self.mixture]
        if self.source:
            first = [(self.source, self.data_split, self.revision)]
        if self.demonstrations:
            first.append((self.demonstrations, self.data_split, None))
        return first


class Sample(Stage):
    """Completions of a policy, several a prompt: what ``label`` makes pairs of."""

    inputs: ClassVar = {
        "model": Input(POLICY_STAGES, models=True),
        "prompts": Input(("prepare",)),
    }

    model: str
    """The policy: an earlier stage, a folder or a Hub id."""
    prompts: str = "prepare"
    split: Literal["train", "validation", "test"] = "train"
    n_prompts: int | None = Field(None, ge=1)
    """The first so many prompts only."""
    n_completions: int = Field(4, ge=1)
    """Completions a prompt."""
    temperature: float = Field(1.0, ge=0.0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str | None = None
    """The commit, branch or tag of a model from the Hub."""
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _draws(self) -> Sample:
        if self.temperature == 0 and self.n_completions > 1:
            raise ValueError(
                "`temperature: 0.0` gives the same completion every time: raise it, or set `n_completions: 1`"
            )
        return self


class Label(Stage):
    """Pairs from sampled completions, by the scores of a judge."""

    inputs: ClassVar = {
        "completions": Input(("sample",)),
        "judge": Input(("reward",), models=True, words=("gold",)),
    }

    completions: str = "sample"
    judge: str
    """``gold``, the embedded task's own score; or a reward model: a stage, a folder or a Hub id."""
    pairing: Literal["best_worst", "best_random", "all"] = "best_worst"
    """Of each prompt's completions: the best against the worst, against any other, or each against each."""
    margin: float = Field(0.0, ge=0.0)
    """Pairs whose scores lie closer are left out."""
    labels: Literal["exact", "bradley_terry"] = "exact"
    """``bradley_terry`` draws the chosen one with probability sigmoid(slope × gap), noisy like people."""
    slope: float | None = Field(None, gt=0.0)
    """Of ``bradley_terry``: that of the embedded task's labels for ``gold``, 1 for a reward model."""
    max_pairs: int | None = Field(None, ge=1)
    """No more than so many pairs, drawn at random."""
    batch_size: int = Field(64, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _slope_has_a_use(self) -> Label:
        if self.slope is not None and self.labels == "exact":
            raise ValueError(
                "`slope` is for noisy labels: set `labels: bradley_terry`, or remove it"
            )
        return self
