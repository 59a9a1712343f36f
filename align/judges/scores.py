"""Judges that score one completion at a time: the gold score, or a reward model.

Left out: judges that compare two completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from align.models.tokenization import Message
from align.rewards import gold
from align.rewards.reward_model import RewardModel
from align.runtime import distributed
from align.runtime.progress import Logger

Messages = Sequence[Message]
BATCHES_PER_CHUNK = 16
"""Batches that a judge receives in one call, so that it can group rows of similar length."""


class Judge(Protocol):
    """Scores completions; a higher score is better."""

    def check_prompts(self, prompts: Sequence[Messages], *, repair: str) -> None:
        """Raise a ``UserError``, ending in ``repair``, if the judge cannot score these prompts."""

    def score(self, prompts: Sequence[Messages], completions: Sequence[Messages]) -> list[float]:
        """One score per completion. Prompts and completions are lists of messages."""


class GoldJudge:
    """The exact score of the embedded task, in [0, 1]."""

    def check_prompts(self, prompts: Sequence[Messages], *, repair: str) -> None:
        """Check that the prompts are the embedded task's.

        Raises:
            DataError: A prompt is not one of the embedded task's.
        """
        gold.check_prompts((prompt[-1]["content"] for prompt in prompts), repair=repair)

    def score(self, prompts: Sequence[Messages], completions: Sequence[Messages]) -> list[float]:
        """Score each completion by the text of its last message."""
        texts = [completion[-1]["content"] for completion in completions]
        return gold.rewards(prompts, texts)


class RewardModelJudge:
    """A reward model, on the device of this process."""

    def __init__(self, source: Path | str, *, dtype: str, batch_size: int) -> None:
        """Load the model from a folder or the Hub, to score ``batch_size`` completions at a time.

        Raises:
            UserError: The model cannot be loaded, or is not a reward model.
        """
        from accelerate import PartialState

        self._model = RewardModel.load(source, dtype=dtype, device=PartialState().device)
        self._batch_size = batch_size

    def check_prompts(self, prompts: Sequence[Messages], *, repair: str) -> None:
        """Accept any prompts."""

    def score(self, prompts: Sequence[Messages], completions: Sequence[Messages]) -> list[float]:
        """Score each completion as a finished turn of the assistant."""
        scores = self._model.score(prompts, completions, batch_size=self._batch_size)
        return [float(score) for score in scores.tolist()]


def build_judge(name: str, source: Path | str | None, *, dtype: str, batch_size: int) -> Judge:
    """Build the judge that a recipe names: ``gold``, or the reward model at ``source``.

    Raises:
        UserError: The reward model cannot be loaded.
    """
    if name == "gold":
        return GoldJudge()
    assert source is not None, f"judge {name}: no reward model"
    return RewardModelJudge(source, dtype=dtype, batch_size=batch_size)


def score_rows(
    judge: Judge, rows: Sequence[Mapping[str, Any]], *, batch_size: int, logger: Logger
) -> list[float]:
    """Score the ``completion`` of every row, in row order. The rows are shared over the ranks."""
    return distributed.map_rows(
        rows,
        lambda chunk: judge.score(
            [row["prompt"] for row in chunk], [row["completion"] for row in chunk]
        ),
        size=BATCHES_PER_CHUNK * batch_size,
        progress=lambda done, total: logger.step(done, total, unit="scored part"),
    )
