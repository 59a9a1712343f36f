"""Judges that score one completion at a time: the gold score, a reward model, a Python function.

Left out: judges that compare two completions, which :mod:`align.judges.build` builds as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.functions import ScoreFunction
from align.errors import DataError
from align.judges.base import Messages, ScoreJudge
from align.rewards import functions, gold
from align.rewards.function_source import missing_columns
from align.rewards.reward_model import RewardModel
from align.runtime import distributed
from align.runtime.progress import Logger

BATCHES_PER_CHUNK = 16
"""Batches that a judge receives in one call, so that it can group rows of similar length."""


class GoldJudge:
    """The exact score of the embedded task, in [0, 1]."""

    name = "gold"

    def check_prompts(self, prompts: Sequence[Messages], *, repair: str) -> None:
        """Check that the prompts are the embedded task's.

        Raises:
            DataError: A prompt is not one of the embedded task's.
        """
        gold.check_prompts((prompt[-1]["content"] for prompt in prompts), repair=repair)

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float]:
        """Score each completion by the text of its last message."""
        texts = [completion[-1]["content"] for completion in completions]
        return gold.rewards(prompts, texts)


class RewardModelJudge:
    """A reward model, on the device of this process."""

    def __init__(
        self,
        name: str,
        source: Path | str,
        *,
        dtype: str,
        batch_size: int,
        quantization: str | None = None,
    ) -> None:
        """Load the model from a folder or the Hub, to score ``batch_size`` completions at a time.

        Raises:
            UserError: The model cannot be loaded, or is not a reward model.
        """
        from accelerate import PartialState

        self.name = name
        self._model = RewardModel.load(
            source, dtype=dtype, device=PartialState().device, quantization=quantization
        )
        self._batch_size = batch_size

    def check_prompts(self, prompts: Sequence[Messages], *, repair: str) -> None:
        """Accept any prompts."""

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float]:
        """Score each completion as a finished turn of the assistant."""
        scores = self._model.score(prompts, completions, batch_size=self._batch_size)
        return [float(score) for score in scores.tolist()]


class FunctionJudge:
    """A Python function of prompts, completion texts and columns of the prompts' rows.

    It may return None or NaN where it has no score.
    """

    def __init__(self, config: ScoreFunction) -> None:
        """Import the function that a recipe names.

        Raises:
            UserError: The function cannot be imported, or has other parameters.
        """
        self.name = config.label
        self._config = config
        self._function = functions.load_function(config.address)

    def check_prompts(self, prompts: Sequence[Messages], *, repair: str) -> None:
        """Accept any prompts."""

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[float]:
        """Score each completion by the text of its last message."""
        texts = [completion[-1]["content"] for completion in completions]
        return functions.judge(self._config, self._function, prompts, texts, columns)

    def check_columns(self, columns: Collection[str]) -> None:
        """Check that the prompts' rows have the columns that the function requires.

        Raises:
            DataError: One is missing.
        """
        if missing := missing_columns(self._config, columns):
            raise DataError(
                f"{self.name}: requires the column `{missing[0]}`; the prompts have "
                f"{', '.join(sorted(columns)) or 'no further columns'}; add it to `keep_columns` "
                "of the `prepare` stage"
            )


ROW_KEYS = frozenset({"prompt", "completion"})
"""Keys of a scored row that are no further columns."""


def score_rows(
    judge: ScoreJudge, rows: Sequence[Mapping[str, Any]], *, batch_size: int, logger: Logger
) -> list[float]:
    """Score the ``completion`` of every row, in row order. The rows are shared over the ranks."""

    def score(chunk: list[Mapping[str, Any]]) -> list[float]:
        columns = chunk[0].keys() - ROW_KEYS
        return judge.score(
            [row["prompt"] for row in chunk],
            [row["completion"] for row in chunk],
            {key: [row[key] for row in chunk] for key in sorted(columns)},
        )

    return distributed.map_rows(
        rows,
        score,
        size=BATCHES_PER_CHUNK * batch_size,
        progress=lambda done, total: logger.step(done, total, unit="scored part"),
    )
