"""Configuration of ``evaluate``: held-out win rates, and accuracies of implicit rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import (
    GoldPrompts,
    HeldOut,
    Input,
    Problem,
    Stage,
    Table,
    duplicates,
)


class Evaluate(Stage):
    """Held-out win rates against a baseline, and accuracies of implicit rewards."""

    code_version: ClassVar = 2
    metrics_class: ClassVar = "align.evaluation.results:EvaluationMetrics"
    inputs: ClassVar = {
        "policies": Input(policies=True, models=True),
        "baseline": Input(policies=True, models=True),
        "prompts": Input(("prepare",)),
    }

    policies: list[str] = Field(min_length=1)
    """The policies to evaluate: earlier stages, folders or Hub ids."""
    baseline: str
    """The policy that the others are compared with: an earlier stage, a folder or a Hub id."""
    prompts: str = "prepare"
    """The prepared data with the held-out prompts and pairs: an earlier ``prepare`` stage, or its
    folder."""
    split: Literal["test", "validation"] = "test"
    """Split of the prompts and pairs."""
    judge: Literal["gold"] | None = None
    """Judge of the win rates: ``gold`` is the exact score of the embedded task. Default: no
    completion is sampled."""
    implicit_rewards: bool = False
    """Measure how often the chosen completion of a held-out pair has the higher implicit reward."""
    n_prompts: int | None = Field(None, ge=1)
    """Number of held-out prompts, with their pairs, from the start of the split. Default: all."""
    n_completions: int = Field(1, ge=1)
    """Completions per prompt and policy."""
    temperature: float = Field(0.7, ge=0.0)
    """Sampling temperature; 0 selects the most likely token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling: tokens are drawn from the smallest set with this probability."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest completion in tokens."""
    batch_size: int = Field(64, ge=1)
    """Completions sampled or scored at once on each process."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights."""
    prefix_sharing: bool = True
    """Compute each shared prompt once and skip padding when completions are scored."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    """Confidence level of the bootstrap intervals."""
    resamples: int = Field(2000, ge=100)
    """Number of bootstrap resamples."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of sampling and of the bootstrap. Every policy has its own random stream."""

    @model_validator(mode="after")
    def _check_measures(self) -> Evaluate:
        if self.judge is None and not self.implicit_rewards:
            raise ValueError("nothing to measure; set `judge: gold` or `implicit_rewards: true`")
        return self

    def required_tables(self) -> tuple[Table, ...]:
        """Prompts to sample completions for, and pairs to measure implicit rewards on."""
        tables = []
        if self.judge:
            tables.append(Table("prompts", "prompts", self.split, requested_by="judge"))
        if self.implicit_rewards:
            tables.append(Table("pairs", "prompts", self.split, requested_by="implicit_rewards"))
        return tuple(tables)

    def held_out(self) -> Iterator[HeldOut]:
        """The split that is evaluated on."""
        yield HeldOut(("split",), "prompts", self.split)

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Policies that are listed more than once."""
        for policy in duplicates(self.policies):
            yield Problem(("policies",), f"`{policy}` is listed more than once; list it once")

    @property
    def gold_prompts(self) -> GoldPrompts | None:
        """The held-out prompts, if the gold score judges."""
        if self.judge is None:
            return None
        repair = "set `implicit_rewards: true` and no `judge`"
        return GoldPrompts("prompts", self.split, repair)
