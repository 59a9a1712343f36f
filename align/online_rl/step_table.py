"""The table that grows while PPO trains: one line for about 20 steps of a run."""

from __future__ import annotations

from collections.abc import Mapping

COLUMNS = (
    ("score", "score", "8.3f"),
    ("gold", "gold", "7.3f"),
    ("kl", "KL", "7.2f"),
    ("kl_per_token", "KL/token", "9.4f"),
    ("kl_coef", "coef", "7.4f"),
    ("entropy", "entropy", "8.3f"),
    ("tokens", "tokens", "7.1f"),
    ("missing_eos", "no eos", "7.3f"),
    ("clip_fraction", "clipped", "8.3f"),
    ("explained_variance", "expl.var", "9.3f"),
)
"""Metric, header and format of each column."""


class StepTable:
    """Formats the metrics of steps in the columns that the first formatted step has."""

    def __init__(self) -> None:
        self._keys: tuple[str, ...] = ()

    def lines(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The line of a step, and before the first one the header."""
        header = []
        if not self._keys:
            self._keys = tuple(key for key, _, _ in COLUMNS if key in metrics)
            header = [
                _line("step", {key: title for key, title, _ in COLUMNS}, self._keys, "s/step")
            ]
        cells = {key: f"{metrics[key]:{form}}" for key, _, form in COLUMNS if key in metrics}
        return [*header, _line(str(step), cells, self._keys, f"{metrics['seconds']:.2f}")]


def _line(step: str, cells: Mapping[str, str], keys: tuple[str, ...], seconds: str) -> str:
    """One line; a metric that the step lacks is a dash."""
    widths = {key: int(form.partition(".")[0]) for key, _, form in COLUMNS}
    middle = "".join(f"{cells.get(key, '–'):>{widths[key]}}" for key in keys)
    return f"{step:>6}{middle}{seconds:>8}"
