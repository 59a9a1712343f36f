"""Build the judges that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config import judges as config
from align.config.functions import ScoreFunction
from align.config.judges import Judges
from align.judges.annotations import People
from align.judges.base import PairJudge, ScoreJudge
from align.judges.scores import ROW_KEYS, FunctionJudge, GoldJudge, RewardModelJudge

Judge = ScoreJudge | PairJudge
VERDICTS = "verdicts.jsonl"
"""File in the runs folder that stores the verdicts of servers."""


def build_judges(
    judges: Judges | None,
    inputs: Mapping[str, Path | str],
    *,
    runs: Path,
    dtype: str,
    quantization: str | None,
    batch_size: int,
) -> dict[str, Judge]:
    """The judges of a recipe by name.

    ``inputs`` has the folders of reward models by key; verdicts of servers are stored in ``runs``,
    where other stages find them.

    Raises:
        UserError: A reward model cannot be loaded, a function cannot be imported, or a file is not
            valid.
    """

    def build(judge: config.JudgeConfig, source: Path | str | None) -> Judge:
        name = config.judge_name(judge)
        if isinstance(judge, ScoreFunction):
            return FunctionJudge(judge)
        if isinstance(judge, config.AnnotationJudge):
            return People(name, Path(judge.annotations))
        if isinstance(judge, config.ServerJudge):
            from align.judges.server import LanguageModelJudge  # loads httpx

            return LanguageModelJudge(judge, cache=runs / VERDICTS)
        if judge == "gold":
            return GoldJudge()
        assert source is not None, f"judge {name}: no reward model"
        return RewardModelJudge(
            name, source, dtype=dtype, quantization=quantization, batch_size=batch_size
        )

    by_key = config.by_key(judges)
    return {config.judge_name(each): build(each, inputs.get(key)) for key, each in by_key.items()}


def check_rows(
    judges: Mapping[str, Judge], rows: Sequence[Mapping[str, Any]], *, repair: str
) -> None:
    """Check that the judges that score can read the prompts, and have the columns they require.

    Raises:
        UserError: One of them cannot; the message about a prompt ends in ``repair``.
    """
    for judge in judges.values():
        if isinstance(judge, ScoreJudge):
            judge.check_prompts([row["prompt"] for row in rows], repair=repair)
        if isinstance(judge, FunctionJudge) and rows:
            judge.check_columns(rows[0].keys() - ROW_KEYS)
