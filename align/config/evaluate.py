"""config.evaluate"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from align.config.base import POLICY_STAGES, Input, Stage


class Evaluate(Stage):
    """Held-out win rates against a baseline, and accuracies of implicit rewards on held-out pairs."""

    inputs: ClassVar = {
        "policies": Input(POLICY_STAGES, models=True),
        "baseline": Input(POLICY_STAGES, models=True),
        "prompts": Input(("prepare",)),
    }

    policies: list[str] = Field(min_length=1)
    baseline: str
    prompts: str = "prepare"
    """Where the held-out prompts and pairs are."""
    split: Literal["test", "validation"] = "test"
    judge: Literal["gold"] | None = None
    """``gold``: the embedded task's own score. Without a judge no completion is sampled."""
    implicit_rewards: bool = False
    """Measure on held-out pairs how often the chosen completion has the higher implicit reward."""
    n_prompts: int | None = Field(None, ge=1)
    """The first so many held-out prompts (and pairs) only."""
    n_completions: int = Field(1, ge=1)
    """Completions a prompt and policy."""
    temperature: float = Field(0.7, ge=0.0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    prefix_sharing: bool = True
    """Compute shared prompts once and no padding where completions are scored."""
    level: float = Field(0.95, gt=0.0, lt=1.0)
    """Of the intervals."""
    resamples: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _measures_something(self) -> Evaluate:
        if self.judge is None and not self.implicit_rewards:
            raise ValueError("nothing to measure: set `judge: gold`, or `implicit_rewards: true`")
        return self
