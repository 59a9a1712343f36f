"""Configuration of the stop rule of the online-RL stages: a judge, and a false-alarm rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from align.config import judges
from align.config.base import Config, Keys, Problem, between_keys
from align.config.functions import ScoreFunction
from align.config.judges import AnnotationJudge, JudgeConfig, ServerJudge


class Stop(Config):
    """When a run is stopped because its policy declines on held-out prompts.

    In every evaluation, the judge compares completions of the policy with those of the best policy
    so far. The stage saves the best policy.
    """

    judge: JudgeConfig
    """The judge, which should not be what the policy is trained on: ``gold``, the exact score of
    the embedded task; a ``reward`` stage, a folder or a Hub id; or a mapping with ``function`` or
    ``api``."""
    alpha: float = Field(0.05, gt=0.0, lt=1.0)
    """Largest probability that a run is stopped although its policy never declined."""

    @between_keys
    def _check_judge(self) -> Iterator[str]:
        if isinstance(self.judge, AnnotationJudge):
            yield (
                "`judge.annotations` are about given completions, and a run samples new ones; name "
                "another judge"
            )

    @property
    def functions(self) -> dict[Keys, ScoreFunction]:
        """The judge, if it is a Python function, by its key."""
        functions = judges.judge_functions(self.judge)
        return {("stop", *keys): function for keys, function in functions.items()}

    @property
    def server(self) -> dict[Keys, ServerJudge]:
        """The judge, if it is behind an API, by its key."""
        return {("stop", *keys): judge for keys, judge in judges.server_judges(self.judge).items()}

    @property
    def files(self) -> dict[str, str]:
        """Files that the judge reads, by key."""
        return {f"stop.{key}": file for key, file in judges.judge_files(self.judge).items()}

    def problems(self) -> Iterator[Problem]:
        """Files that do not exist."""
        for problem in judges.judge_problems(self.judge):
            yield Problem(("stop", *problem.keys), problem.message)

    def digest_settings(self, *, judge_is_input: bool) -> dict[str, Any]:
        """The settings that can change the saved policy; an input counts by its content."""
        judge = None if judge_is_input else judges.digest_settings(self.judge)
        return {"judge": judge, "alpha": self.alpha}
