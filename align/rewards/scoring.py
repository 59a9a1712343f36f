"""rewards.scoring"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.data import Label
from align.errors import UserError
from align.rewards import gold
from align.rewards.reward_model import RewardModel
from align.runtime import distributed
from align.runtime.progress import Logger

Messages = Sequence[dict[str, str]]
Judge = Callable[[Sequence[Messages], Sequence[Messages]], list[float]]


def build_judge(config: Label, inputs: Mapping[str, Path | str]) -> Judge:
    if config.judge == "gold":
        return gold_scores
    return reward_model_judge(inputs["judge"], dtype=config.dtype, batch_size=config.batch_size)


def reward_model_judge(source: Path | str, *, dtype: str, batch_size: int) -> Judge:
    """A reward model as a judge."""
    from accelerate import PartialState

    model = RewardModel(source, dtype=dtype, device=PartialState().device, share=True)
    return lambda prompts, completions: model.score(
        prompts, completions, batch_size=batch_size
    ).tolist()


def gold_scores(prompts: Sequence[Messages], completions: Sequence[Messages]) -> list[float]:
    try:
        return [
            gold.gold_score(prompt[-1]["content"], completion[-1]["content"])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    except ValueError as error:
        raise UserError(
            f"`judge: gold` scores the embedded task's prompts only: {error}; name a reward model"
        ) from None


def score_rows(
    judge: Judge, rows: Sequence[dict[str, Any]], batch_size: int, logger: Logger
) -> list[float]:
    """The judge's score of every row; processes share the work, some batches at a time."""
    return distributed.map_rows(
        rows,
        lambda part: judge([row["prompt"] for row in part], [row["completion"] for row in part]),
        size=16 * batch_size,  # the judge sorts them by length
        progress=lambda done, total: logger.step(done, total, what="scored part"),
    )
