"""Tables of ``evaluate`` for the summary of a run; each fits into 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from align.errors import printable
from align.evaluation.results import Comparison, EvaluationMetrics, ImplicitRewards, Interval
from align.runtime.results import ResultTable

if TYPE_CHECKING:
    from align.data.rows import Row
    from align.evaluation.win_rates import Samples

N_SAMPLES = 3
"""Prompts whose completions are shown."""
SIDE_WIDTH = 38
"""Terminal cells of each of two completions that are shown side by side."""


def percent(value: float | None) -> str:
    """A share as a percentage; a dash if it is unknown."""
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_interval(interval: Interval) -> str:
    """An interval of shares, in percent."""
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def win_rate_table(comparisons: Sequence[Comparison]) -> ResultTable:
    """One row per policy, the control last."""
    first = comparisons[0]
    return ResultTable(
        title=f"held-out win rates against {first.baseline}, judged by {first.judge}; "
        f"{first.n_prompts} prompts × {first.n_completions}",
        columns=(
            "policy",
            "win rate",
            "interval",
            "ties",
            "length-\ncontrolled",
            "score",
            "tokens",
        ),
        rows=[
            (
                row.policy,
                percent(row.win_rate),
                percent_interval(row.ci),
                percent(row.ties),
                percent(row.length_controlled_win_rate),
                f"{row.mean_score.policy:.3f}/{row.mean_score.baseline:.3f}",
                f"{row.mean_tokens.policy:.1f}/{row.mean_tokens.baseline:.1f}",
            )
            for row in comparisons
        ],
        note="ties count one half; intervals: bootstrap over prompts; a/b: policy/baseline",
    )


def implicit_reward_table(results: Sequence[ImplicitRewards]) -> ResultTable:
    """One row per policy."""
    return ResultTable(
        title=f"implicit rewards against {results[0].reference}, on held-out pairs",
        columns=("policy", "accuracy", "interval", "pairs", "invalid"),
        rows=[
            (
                row.policy,
                percent(row.accuracy),
                percent_interval(row.ci),
                str(row.n_pairs),
                str(row.invalid),
            )
            for row in results
        ],
        note="interval: bootstrap over prompts; invalid: prompts that fill all positions",
    )


def headline(metrics: EvaluationMetrics) -> dict[str, float]:
    """The metric on the stage's line: of the first policy, the win rate or else the accuracy."""
    if metrics.comparisons:
        return {"win_rate": metrics.comparisons[0].win_rate}
    if metrics.implicit_rewards:
        return {"accuracy": metrics.implicit_rewards[0].accuracy}
    return {}


def all_tables(
    metrics: EvaluationMetrics, prompts: Sequence[Row], samples: Mapping[str, Samples]
) -> tuple[ResultTable, ...]:
    """Completions of the first policy, win rates, implicit rewards: what was measured of them."""
    tables: list[ResultTable] = []
    if metrics.comparisons:
        first = metrics.comparisons[0]
        tables += sample_tables(prompts, first.policy, first.baseline, samples)
        tables.append(win_rate_table(metrics.comparisons))
    if metrics.implicit_rewards:
        tables.append(implicit_reward_table(metrics.implicit_rewards))
    return tuple(tables)


def sample_tables(
    prompts: Sequence[Row], policy: str, baseline: str, samples: Mapping[str, Samples]
) -> list[ResultTable]:
    """The first completions of a policy and the baseline, side by side, for a few prompts."""
    tables = []
    for i, prompt in enumerate(prompts[:N_SAMPLES]):
        texts = [samples[name].completions[i][0].text for name in (policy, baseline)]
        scores = [samples[name].scores[i, 0].item() for name in (policy, baseline)]
        headers = [
            f"{name} ({score:.2f})<" for name, score in zip((policy, baseline), scores, strict=True)
        ]
        lines = zip_longest(*map(wrapped, texts), fillvalue="")
        title = " ".join(wrapped(prompt["prompt"][-1]["content"], 2 * SIDE_WIDTH)[:1])
        tables.append(ResultTable(title=title, columns=tuple(headers), rows=list(lines)))
    return tables


def wrapped(text: str, width: int = SIDE_WIDTH) -> list[str]:
    """The lines of a text, wrapped to ``width`` terminal cells."""
    from rich.text import Text

    from align.runtime.terminal import SafeConsole

    lines = Text(printable(text) or "(empty)").wrap(SafeConsole(width=width), width)
    return [line.plain.rstrip() for line in lines]
