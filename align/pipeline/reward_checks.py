"""Functions that score completions, called on a few rows of the data before anything is trained.

Every function is imported and called with answers of the data and with an empty completion, so that
its errors are those of a check and not of a run. Environments play one turn. Then the scores of the
answers are compared with those of answers to other prompts. Left out: reward models, whose scores
need torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Keys
from align.config.functions import ScoreFunction
from align.config.online_rl_keys import RewardKeys
from align.config.recipe import ErrorCollector
from align.errors import UserError
from align.pipeline.plan import PlannedStage
from align.pipeline.table_checks import PreparedTables
from align.rewards import functions
from align.rewards.environments import load_environment
from align.rewards.function_source import missing_columns, signature
from align.rewards.functions import Score

N_CALLED = 8
"""Rows of the first call, whose result is only checked."""
N_COMPARED = 32
"""Rows whose answers are compared with answers to other prompts."""
LEVEL = 0.05
"""A sign test with a larger p-value finds no difference."""
SHUFFLED = "answers from those of other prompts"
REJECTED = "chosen from rejected answers"
ADVICE = {
    (SHUFFLED, False): "unless it rewards form alone, check the function and its answer column",
    (SHUFFLED, True): "it prefers answers to other prompts: check the function and its answer "
    "column",
    (REJECTED, False): "unless it measures something else, check the function and the pairs",
    (REJECTED, True): "it prefers the rejected answers: check the columns `chosen` and `rejected`, "
    "or reverse the sign of the score",
}
"""What to do about a comparison that fails, and whether it is beyond chance that it does."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Prompts with their answers in the data."""

    prompts: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    chosen: Sequence[str]
    """Texts of chosen completions or of demonstrations; of prompts without either, no text."""
    rejected: Sequence[str]
    """Texts of rejected completions; empty if the data have none."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of the answers of prompts, and of other completions of the same prompts."""

    mean: float
    other_mean: float
    higher: int
    """Prompts whose answer scores higher than the other completion."""
    lower: int
    n: int
    weight: float = 1.0
    """Factor of the score in the reward: with a negative one, lower scores are better."""

    @property
    def p_value(self) -> float:
        """The p-value of the two-sided sign test, without ties."""
        n, extreme = self.higher + self.lower, min(self.higher, self.lower)
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(extreme + 1)) / 2**n)

    @property
    def separates(self) -> bool:
        """Whether the answers have the better score, beyond chance."""
        return self._n_better > 0 and self.p_value <= LEVEL

    @property
    def is_reversed(self) -> bool:
        """Whether the other completions have the better score, beyond chance."""
        return self._n_better < 0 and self.p_value <= LEVEL

    @property
    def _n_better(self) -> int:
        """Prompts whose answer has the better score, minus those where it has the worse one."""
        return (self.higher - self.lower) * (-1 if self.weight < 0 else 1)

    def __str__(self) -> str:
        equal = self.n - self.higher - self.lower
        return (
            f"mean {self.mean:.3g} against {self.other_mean:.3g}, higher in {self.higher}, equal "
            f"in {equal}, lower in {self.lower} of {self.n} (sign test p = {self.p_value:.2g})"
        )


@dataclass(frozen=True, slots=True)
class CheckedFunction:
    """A function of a stage, and the rows that it is checked with."""

    place: str
    """The key that names the function, with its stage."""
    config: ScoreFunction
    function: Score
    answers: Answers
    is_reward: bool
    """Whether the function needs a score for every completion; a judge may have none."""
    weight: float = 1.0
    """Factor of the score in the reward."""

    def scores(self, texts: Sequence[str], n: int) -> list[float]:
        """Scores of ``texts`` as completions of the first ``n`` prompts."""
        score = functions.call if self.is_reward else functions.judge
        columns = {name: values[:n] for name, values in self.answers.columns.items()}
        return score(self.config, self.function, self.answers.prompts[:n], texts[:n], columns)


def import_functions(errors: ErrorCollector, stages: Sequence[PlannedStage]) -> None:
    """Import every function that scores completions, and every environment."""
    for stage in stages:
        for keys, address in stage.config.environments.items():
            with errors.at(stage.name, *keys):
                load_environment(address)
        for keys, config in stage.config.reward_functions.items():
            try:
                signature(config.address)
            except UserError:
                continue  # reported before anything is imported
            with errors.at(stage.name, *keys):
                functions.load_function(config.address)


def examine(
    errors: ErrorCollector, data: Path, tables: PreparedTables, stages: Sequence[PlannedStage]
) -> Iterator[str]:
    """Call the functions of the stages that read ``data``; yield a line for each comparison."""
    n_errors = len(errors.lines)
    call_functions(errors, data, tables, stages)
    if len(errors.lines) == n_errors:
        yield from compare_answers(errors, data, tables, stages)


def call_functions(
    errors: ErrorCollector, data: Path, tables: PreparedTables, stages: Sequence[PlannedStage]
) -> None:
    """Call the functions of the stages that read ``data`` with a few of its rows.

    Environments play a turn.
    """
    play_environments(errors, data, tables, stages)
    for stage, keys, checked in _functions(data, tables, stages):
        with errors.at(stage.name, *keys):
            checked.scores(checked.answers.chosen, min(len(checked.answers), N_CALLED))
            checked.scores([""], 1)  # a policy may write nothing


def play_environments(
    errors: ErrorCollector, data: Path, tables: PreparedTables, stages: Sequence[PlannedStage]
) -> None:
    """Play one turn of an episode of the first prompt of ``data``, for each stage that reads it.

    The turn is empty: a policy may write nothing.
    """
    playing = [s for s in stages if data in s.inputs.values() and s.config.environments]
    if not playing or "prompts-train" not in tables.names:  # reported as a missing table
        return
    columns = tables.columns("prompts", "train")
    row = {name: tables.column("prompts", "train", name)[0] for name in columns}
    for stage in playing:
        for keys, address in stage.config.environments.items():
            try:
                environment = load_environment(address)
            except UserError:
                continue  # reported where environments are imported
            with errors.at(stage.name, *keys):
                episode, _ = environment.reset(row, seed=0)
                environment.step(episode, row, "")


def compare_answers(
    errors: ErrorCollector, data: Path, tables: PreparedTables, stages: Sequence[PlannedStage]
) -> Iterator[str]:
    """Compare the scores of the answers of ``data`` with others; yield lines for each function."""
    for stage, keys, checked in _functions(data, tables, stages):
        with errors.at(stage.name, *keys):
            yield from _reports(checked)


def _functions(
    data: Path, tables: PreparedTables, stages: Sequence[PlannedStage]
) -> Iterator[tuple[PlannedStage, Keys, CheckedFunction]]:
    """The functions of stages that can be called with the prompts of ``data``."""
    for stage in stages:
        split = _prompt_split(stage, data, tables, stages)
        if split is None or not stage.config.reward_functions:
            continue
        answers = read_answers(tables, split)
        for keys, config in stage.config.reward_functions.items():
            try:
                functions.check_package(config)
                function = functions.load_function(config.address)
            except UserError:
                continue  # reported where functions are imported
            if missing_columns(config, answers.columns) or not len(answers):
                continue  # reported as a missing column or table
            place = ".".join(map(str, (stage.name, *keys)))
            checked = CheckedFunction(
                place, config, function, answers, keys[0] == "rewards", _weight(stage, keys)
            )
            yield stage, keys, checked


def _weight(stage: PlannedStage, keys: Keys) -> float:
    """The factor of a function's score in the reward of a stage; 1 for a judge."""
    if not isinstance(stage.config, RewardKeys) or keys[0] != "rewards":
        return 1.0
    return stage.config.weights[int(keys[1])] if stage.config.weights is not None else 1.0


def _prompt_split(
    stage: PlannedStage, data: Path, tables: PreparedTables, stages: Sequence[PlannedStage]
) -> str | None:
    """The split of ``data`` whose completions a stage scores, itself or from a ``sample`` stage."""
    inputs = set(stage.inputs.values())
    for each in (stage, *(other for other in stages if other.folder in inputs)):
        if data in each.inputs.values():
            for table in each.config.required_tables():
                if table.kind == "prompts" and table.name in tables.names:
                    return table.split
    return None


def read_answers(tables: PreparedTables, split: str) -> Answers:
    """Rows of the prompts of a split; those with an answer in the data first."""
    ids = tables.column("prompts", split, "prompt_id")
    texts = _texts(tables, split)
    order = sorted(range(len(ids)), key=lambda i: ids[i] not in texts)[:N_COMPARED]
    columns = {
        name: [values[i] for i in order]
        for name in tables.columns("prompts", split)
        for values in [tables.column("prompts", split, name)]
    }
    pairs = [texts.get(ids[i], ("", None)) for i in order]
    rejected = [text for _, text in pairs if text is not None]
    return Answers(
        columns.pop("prompt"),
        columns,
        [chosen for chosen, _ in pairs],
        rejected if len(rejected) == len(pairs) else [],
    )


def _texts(tables: PreparedTables, split: str) -> dict[str, tuple[str, str | None]]:
    """A chosen and a rejected completion, or a demonstration, by the prompt's identity."""
    texts: dict[str, tuple[str, str | None]] = {}
    sides = {"pairs": ("chosen", "rejected"), "demonstrations": ("completion",)}
    for kind, (first, *second) in sides.items():
        if f"{kind}-{split}" in tables.names:
            ids = tables.column(kind, split, "prompt_id")
            chosen = tables.column(kind, split, first)
            rejected = tables.column(kind, split, second[0]) if second else [None] * len(ids)
            for prompt_id, one, other in zip(ids, chosen, rejected, strict=True):
                text = None if other is None else other[-1]["content"] or ""
                texts.setdefault(prompt_id, (one[-1]["content"] or "", text))
    return texts


def compare(scores: Sequence[float], others: Sequence[float], weight: float = 1.0) -> Comparison:
    """Compare scores of the same prompts; a pair with a missing one is left out."""
    pairs = [
        (one, other)
        for one, other in zip(scores, others, strict=True)
        if not math.isnan(one) and not math.isnan(other)
    ]
    n = len(pairs)
    return Comparison(
        mean=math.fsum(one for one, _ in pairs) / max(n, 1),
        other_mean=math.fsum(other for _, other in pairs) / max(n, 1),
        higher=sum(one > other for one, other in pairs),
        lower=sum(one < other for one, other in pairs),
        n=n,
        weight=weight,
    )


def _reports(checked: CheckedFunction) -> Iterator[str]:
    """The lines about a function: what it separates, and a warning for each comparison it fails."""
    answers, label = checked.answers, checked.config.label
    n, chosen, half = len(answers), answers.chosen, len(answers) // 2
    if not any(chosen):
        yield f"{checked.place}: {label}: called; the data have no answers to compare"
        return
    scores = checked.scores(chosen, n)
    if all(map(math.isnan, scores)):
        yield f"{checked.place}: warning: {label} has no score for {n} answers of the data"
        return
    others = {SHUFFLED: [*chosen[half:], *chosen[:half]]}
    if answers.rejected:
        others[REJECTED] = list(answers.rejected)
    comparisons = {
        what: compare(scores, checked.scores(texts, n), checked.weight)
        for what, texts in others.items()
    }
    if checked.weight < 0:
        label = f"{label} (weight {checked.weight:g})"
    separated = [f"{what}: {each}" for what, each in comparisons.items() if each.separates]
    if separated:
        yield f"{checked.place}: {label} separates {'; '.join(separated)}"
    for what, each in comparisons.items():
        if not each.separates:
            advice = ADVICE[what, each.is_reversed]
            yield f"{checked.place}: warning: {label} does not separate {what}: {each}; {advice}"
