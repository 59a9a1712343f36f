"""Configuration of the stages that make preference data of a policy: ``sample`` and ``label``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
)
from align.config.decoding import SamplingStage, Temperature
from align.config.functions import ScoreFunction
from align.config.inference_bill import InferenceWork, Rows, longest_prompt, sampled_copies
from align.config.quantization import QuantizableStage


class Sample(SamplingStage):
    """Sample completions from a policy, for ``label``."""

    code_version: ClassVar[int] = 2
    inputs: ClassVar = {
        "model": Input(policies=True, models=True),
        "prompts": Input(("prepare",)),
    }
    reads: ClassVar = (Table("prompts", "prompts"),)

    model: str
    """The policy: an earlier stage, a folder, a GGUF file or a Hub id."""
    prompts: str = "prepare"
    """The prepared data that the prompts come from: an earlier ``prepare`` stage, or its folder."""
    split: Literal["train", "validation", "test"] = "train"
    """Split of the prompts."""
    n_prompts: int | None = Field(None, ge=1)
    """Number of prompts, from the start of the split. Default: all."""
    n_completions: int = Field(4, ge=1)
    """Completions sampled per prompt."""
    temperature: Temperature = 1.0
    batch_size: int = Field(64, ge=1)
    """Completions sampled at once on each process."""
    revision: str | None = None
    """Commit, branch or tag of a model on the Hub."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sampling."""

    @between_keys
    def _check_temperature(self) -> Iterator[str]:
        if self.temperature == 0 and self.n_completions > 1:
            yield (
                "`temperature: 0.0` samples the same completion every time; raise it, "
                "or set `n_completions: 1`"
            )

    def required_tables(self) -> tuple[Table, ...]:
        """The prompts of the configured split."""
        return (Table("prompts", "prompts", self.split, requested_by="split"),)

    def held_out(self) -> Iterator[HeldOut]:
        """The configured split, unless it is the training split."""
        if self.split != "train":
            yield HeldOut(("split",), "prompts", self.split)

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """One row per completion."""
        prompts = statistics.get("prompts", {}).get(self.split)
        if prompts is None:
            return Workload()
        return Workload(rows=min(prompts, self.n_prompts or prompts) * self.n_completions)

    def inference_work(
        self, statistics: Mapping[str, Any], world_size: int
    ) -> InferenceWork | None:
        """A batch of completions of the largest length; None if that of prompts is unknown."""
        prompt, rows = longest_prompt(statistics, self.split), self.workload(statistics, 1).rows
        if prompt is None or rows is None:
            return None
        prompts = min(max(1, self.batch_size // self.n_completions), rows // self.n_completions)
        sampled = Rows(prompts * self.n_completions, prompt, self.max_new_tokens)
        return InferenceWork(sampled, prompts, sampled_copies(self.temperature, self.top_p))

    def written(self, rows: int, statistics: Mapping[str, Any]) -> dict[str, Any]:
        """The statistics of ``rows`` sampled completions, as far as they are known before.

        ``statistics`` are those of the data that the prompts come from.
        """
        n_prompts = rows // self.n_completions
        known = {key: statistics[key] for key in ("longest_prompts",) if key in statistics}
        return known | {
            "prompts": {self.split: n_prompts},
            "completions": {self.split: rows},
            "max_new_tokens": self.max_new_tokens,
        }


class Label(QuantizableStage):
    """Make preference pairs from sampled completions, by the scores of a judge."""

    code_version: ClassVar[int] = 3
    inputs: ClassVar = {
        "completions": Input(("sample",)),
        "judge": Input(("reward",), models=True, words=("gold",)),
    }
    reads: ClassVar = (Table("completions", "completions"),)

    completions: str = "sample"
    """The sampled completions: an earlier ``sample`` stage, or its folder."""
    judge: judges.Judges
    """The judge, or a list of several, whose mean decides where each of them has a verdict:
    ``gold``, the exact score of the embedded task; a ``reward`` stage, a folder or a Hub id; or a
    mapping with ``function``, ``annotations`` or ``api``. ``annotations`` stand alone."""
    pairing: Literal["best_worst", "best_random", "all"] = "best_worst"
    """Which pairs are made from the completions of a prompt: best against worst, best against a
    random other, or all pairs. Judges that compare, and several judges, decide about all
    n(n - 1) / 2 pairs of n completions in any case: with 8 completions about 28."""
    margin: float = Field(0.0, ge=0.0)
    """Smallest difference of scores; pairs with a smaller one are dropped."""
    label_noise: Literal["bradley_terry"] | None = None
    """Noise of the labels: ``bradley_terry`` chooses at random, with probability
    sigmoid(slope x difference of scores), which models human labels. Default: the completion with
    the higher score is chosen."""
    label_noise_slope: float | None = Field(None, gt=0.0)
    """Slope of ``bradley_terry``. Default: that of the labels of the embedded task for ``gold``, 1
    for a reward model."""
    max_pairs: int | None = Field(None, ge=1)
    """Largest number of pairs; more are subsampled at random."""
    batch_size: int = Field(64, ge=1)
    """Completions scored at once on each process."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights of the reward model."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of random pairs, noisy labels and subsampling."""

    def required_tables(self) -> tuple[Table, ...]:
        """The sampled completions, of any split."""
        splits = ("train", "validation", "test")
        return tuple(Table("completions", "completions", split) for split in splits)

    @between_keys
    def _check_label_noise(self) -> Iterator[str]:
        if self.label_noise_slope is not None and self.label_noise is None:
            yield (
                "`label_noise_slope` has no effect without `label_noise: bradley_terry`; remove it"
            )
        if self.compares:
            for key in ("margin", "label_noise"):
                if getattr(self, key):
                    yield (
                        f"`{key}` needs the scores of one judge, and this judge compares "
                        "completions; remove it"
                    )

    @property
    def compares(self) -> bool:
        """Whether pairs of completions are compared, and not the scores of one judge."""
        return not isinstance(self.judge, str | ScoreFunction)

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Wrong judges, and files that do not exist."""
        yield from judges.judge_problems(self.judge)
        kinds = [type(judge) for judge in judges.by_key(self.judge).values()]
        if len(kinds) > 1 and judges.AnnotationJudge in kinds:
            yield Problem(
                ("judge",),
                "`annotations` cannot be one of several judges, because people decide about some "
                "pairs only; name their file alone, or a folder with several",
            )

    def workload(self, statistics: Mapping[str, Any], world_size: int) -> Workload:
        """One row per pair of completions that a judge compares."""
        rows = 0
        for split, n_prompts in statistics.get("prompts", {}).items():
            n = math.ceil(statistics.get("completions", {}).get(split, 0) / max(n_prompts, 1))
            rows += n_prompts * n * (n - 1) // 2
        return Workload(rows=rows) if self.compares and rows else Workload()

    def inference_work(
        self, statistics: Mapping[str, Any], world_size: int
    ) -> InferenceWork | None:
        """A batch of completions of the largest length that ``sample`` may have written.

        None if that is unknown.
        """
        prompts = [longest_prompt(statistics, split) for split in statistics.get("prompts", ())]
        if "max_new_tokens" not in statistics or not prompts or None in prompts:
            return None
        rows = min(self.batch_size, sum(statistics["completions"].values()))
        longest = max(prompt for prompt in prompts if prompt is not None)
        return InferenceWork(judged=Rows(rows, longest, statistics["max_new_tokens"]))

    def digest_settings(self) -> dict[str, Any]:
        """All settings but those of requests to a server."""
        return super().digest_settings() | {"judge": judges.digest_settings(self.judge)}

    def named_paths(self) -> dict[str, str]:
        """Files that the judges read."""
        return judges.judge_files(self.judge)

    @property
    def reward_functions(self) -> dict[Keys, ScoreFunction]:
        """The judges that are Python functions."""
        return judges.judge_functions(self.judge)

    @property
    def server_judges(self) -> dict[Keys, judges.ServerJudge]:
        """The judges behind an API."""
        return judges.server_judges(self.judge)

    def missing_split(self, split: str, name: str, stages: Mapping[str, Stage]) -> str | None:
        """Labeled completions have the one split that was sampled."""
        sample = stages.get(self.completions)
        sampled = getattr(sample, "split", split)
        if sampled != split:
            return (
                f"`{name}` has no {split} split, because its completions were sampled for "
                f"{sampled}; remove this key"
            )
        return None

    @property
    def gold_prompts(self) -> GoldPrompts | None:
        """The prompts of the sampled completions."""
        if "gold" not in judges.by_key(self.judge).values():
            return None
        return GoldPrompts("completions", "train", repair="set `judge` to a reward model")
