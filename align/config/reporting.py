"""The key ``report_to`` of the stages with training loops that this project wrote."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.config.base import Stage


class ReportingStage(Stage):
    """A stage whose metrics may be sent to experiment trackers, beside ``metrics.jsonl``."""

    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field([])
    """Experiment trackers that get the metrics: TensorBoard's files are in the folder ``runs`` of
    the stage, and the others are configured by their own environment variables."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The values of ``report_to``."""
        return tuple(self.report_to)

    def digest_settings(self) -> dict[str, Any]:
        """All settings but the trackers: to report elsewhere is no reason to train again."""
        settings = super().digest_settings()
        del settings["report_to"]
        return settings
