"""Configuration of ``evaluate``: held-out win rates, and accuracies of implicit rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.config import judges
from align.config.base import (
    GoldPrompts,
    HeldOut,
    Input,
    Keys,
    Problem,
    Stage,
    Table,
    Workload,
    between_keys,
    duplicates,
)
from align.config.decoding import SamplingStage, Temperature
from align.config.functions import ScoreFunction
from align.config.inference_bill import InferenceWork, Rows, longest_prompt, sampled_copies
from align.config.judges import Judges, ServerJudge
from align.config.training_base import TOKENS_PER_WORD

REFERENCE = "reference"
"""The baseline whose completions are those of the data set."""


class Evaluate(SamplingStage):
    """Held-out win rates against a baseline, and accuracies of implicit rewards."""

    code_version: ClassVar[int] = 4
    metrics_class: ClassVar = "align.evaluation.results:EvaluationMetrics"
    inputs: ClassVar = {
        "policies": Input(policies=True, models=True, suffix=".jsonl"),
        "baseline": Input(policies=True, models=True, words=(REFERENCE,), suffix=".jsonl"),
        "prompts": Input(("prepare",)),
        "judge": Input(("reward",), models=True, words=("gold",)),
    }

    policies: list[str] = Field(min_length=1)
    """The policies to evaluate: earlier stages, folders, GGUF files, Hub ids, or ``.jsonl`` files
    of completions, with ``prompt`` and ``completion`` in each row."""
    baseline: str
    """What the policies are compared with: an earlier stage, a folder, a Hub id, a ``.jsonl`` file
    of completions, or ``reference``, the completions of the data set: those of demonstrations, the
    chosen ones of pairs, the desirable ones of labeled completions."""
    prompts: str = "prepare"
    """The prepared data with the held-out prompts and pairs: an earlier ``prepare`` stage, or its
    folder."""
    split: Literal["test", "validation"] = "test"
    """Split of the prompts and pairs."""
    judge: Judges | None = None
    """Judge of the win rates, or a list of several: ``gold``, the exact score of the embedded task;
    a ``reward`` stage, a folder or a Hub id; or a mapping with ``function``, ``annotations`` or
    ``api``. Default: no completion is sampled."""
    implicit_rewards: bool = False
    """Measure how often the chosen completion of a held-out pair has the higher implicit reward."""
    n_prompts: int | None = Field(None, ge=1)
    """Number of held-out prompts, with their pairs, from the start of the split. Default: all."""
    n_completions: int = Field(1, ge=1)
    """Completions per prompt and policy."""
    temperature: Temperature = 0.7
    batch_size: int = Field(64, ge=1)
    """Completions sampled or scored at once on each process."""
    prefix_sharing: bool = True
    """Compute each shared prompt once and skip padding when completions are scored."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    """Confidence level of the intervals."""
    resamples: int = Field(2000, ge=100)
    """Number of bootstrap resamples for the intervals of means: of score differences and KL. Those
    of win rates and accuracies, and p-values, do not depend on it."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of sampling and of the bootstrap. Every policy has its own random stream."""

    @between_keys
    def _check_measures(self) -> Iterator[str]:
        if self.judge is None and not self.implicit_rewards:
            yield "nothing to measure; set `judge`, or `implicit_rewards: true`"
        if self.implicit_rewards and (self.baseline == REFERENCE or self.completion_files):
            yield (
                "`implicit_rewards` needs models on both sides; remove it, or the files of "
                "completions and `baseline: reference`"
            )

    @property
    def completion_files(self) -> dict[str, str]:
        """Files of completions among the policies and the baseline, by key."""
        named = {f"policies.{i}": name for i, name in enumerate(self.policies)}
        named["baseline"] = self.baseline
        return {
            key: name
            for key, name in named.items()
            if self.inputs[key.split(".")[0]].names_file(name)
        }

    @property
    def judges(self) -> dict[str, judges.JudgeConfig]:
        """The judges by name, in the order of the recipe."""
        return {judges.judge_name(each): each for each in judges.by_key(self.judge).values()}

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
        """Policies that are listed more than once, wrong judges, files that do not exist."""
        yield from super().problems(stages)
        for policy in duplicates(self.policies):
            yield Problem(("policies",), f"`{policy}` is listed more than once; list it once")
        if REFERENCE in stages and self.baseline == REFERENCE:
            yield Problem(("baseline",), f"`{REFERENCE}` is also a stage; rename the stage")
        if self.policies == [self.baseline] and "baseline" in self.completion_files:
            yield Problem(("policies",), "nothing to compare: it is the baseline; name another one")
        for key, file in self.completion_files.items():
            if not Path(file).is_file():
                name, _, place = key.partition(".")
                yield Problem((name, int(place)) if place else (name,), f"no such file: {file}")
        yield from judges.judge_problems(self.judge)

    def digest_settings(self) -> dict[str, Any]:
        """All settings but those of requests to a server."""
        return super().digest_settings() | {"judge": judges.digest_settings(self.judge)}

    def named_paths(self) -> dict[str, str]:
        """Files of completions, and those that the judges read."""
        return self.completion_files | judges.judge_files(self.judge)

    @property
    def reward_functions(self) -> dict[Keys, ScoreFunction]:
        """The judges that are Python functions."""
        return judges.judge_functions(self.judge)

    @property
    def server_judges(self) -> dict[Keys, ServerJudge]:
        """The judges behind an API."""
        return judges.server_judges(self.judge)

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """One row per compared pair of completions; the control is compared as well."""
        prompts = statistics.get("prompts", {}).get(self.split)
        if self.judge is None or prompts is None:
            return Workload()
        is_sampled = self.baseline != REFERENCE and "baseline" not in self.completion_files
        n_policies = len(set(self.policies) - {self.baseline}) + is_sampled
        n_prompts = min(prompts, self.n_prompts or prompts)
        return Workload(rows=n_prompts * self.n_completions * n_policies)

    @property
    def measures_drift(self) -> bool:
        """Whether samples are drawn from the whole distribution, as estimates of KL require."""
        return self.judge is not None and self.temperature > 0 and self.top_p == 1

    def inference_work(
        self, statistics: Mapping[str, Any], world_size: int
    ) -> InferenceWork | None:
        """Batches of completions and of pairs of the largest length; None if it is unknown."""
        prompt = longest_prompt(statistics, self.split)
        prompts = statistics.get("prompts", {}).get(self.split)
        if prompt is None or prompts is None:
            return None
        prompts = min(prompts, self.n_prompts or prompts)
        pairs = self._pair_rows(statistics, world_size) if self.implicit_rewards else None
        if self.implicit_rewards and pairs is None:
            return None
        if self.judge is None:
            return InferenceWork(pairs=pairs)
        own = math.ceil(prompts * self.n_completions / world_size)
        batch = min(max(1, self.batch_size // self.n_completions), prompts)
        sampled = Rows(batch * self.n_completions, prompt, self.max_new_tokens)
        scored = replace(sampled, number=min(self.batch_size, own), is_all=own <= self.batch_size)
        return InferenceWork(
            sampled,
            batch,
            sampled_copies(self.temperature, self.top_p),
            drift=scored if self.measures_drift else None,
            pairs=pairs,
            judged=scored,
        )

    def _pair_rows(self, statistics: Mapping[str, Any], world_size: int) -> Rows | None:
        """A batch of sides of pairs, of which each may be as long as the longest row of the data.

        Its prompt counts as part of the completion, because its length is not known alone.
        """
        longest = statistics.get("longest_rows", {}).get("pairs")
        pairs = statistics.get("pairs", {}).get(self.split)
        if longest is None or not pairs:
            return None
        sides = math.ceil(2 * pairs / world_size)
        row = round(longest["words"] * TOKENS_PER_WORD)
        return Rows(min(self.batch_size, sides), 0, row, is_all=sides <= self.batch_size)

    @property
    def gold_prompts(self) -> GoldPrompts | None:
        """The held-out prompts, if the gold score judges."""
        if "gold" not in self.judges:
            return None
        repair = "choose another `judge`, or set `implicit_rewards: true` and no `judge`"
        return GoldPrompts("prompts", self.split, repair)
