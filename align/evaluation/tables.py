"""Tables of ``evaluate`` for the summary of a run; each fits into 80 columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from align.errors import counted, printable
from align.evaluation.held_out import STAGE_FOLDER
from align.evaluation.results import (
    Comparison,
    DriftMetrics,
    EvaluationMetrics,
    ImplicitRewards,
    Interval,
    PerSide,
)
from align.runtime.results import ResultTable

if TYPE_CHECKING:
    from align.data.rows import Row
    from align.evaluation.completions import Samples
    from align.evaluation.judging import Outcomes

N_SAMPLES = 3
"""Prompts whose completions are shown."""
INVALID_SHARE = 0.05
"""Share of invalid verdicts above which there is a warning."""
POLICY_WIDTH = 14
"""Longest name of a policy that is shown in full."""
AGAIN = " again"
"""End of the name of the control."""
SIDE_WIDTH = 38
"""Terminal cells of each of two completions that are shown side by side."""


def percent(value: float | None) -> str:
    """A share as a percentage; a dash if it is unknown."""
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """A share in percent, for a table whose note names the unit; a dash if it is unknown."""
    return percent(value).removesuffix(" %")


def percent_interval(interval: Interval) -> str:
    """An interval of shares, in percent."""
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def short_name(name: str, width: int) -> str:
    """A name in at most ``width`` characters; of a stage's folder its name with a short digest.

    The digest tells apart stages of one name. The ending of the control stays.

    >>> short_name("runs/dpo-0123456789ab again", 20), short_name("a_long_name_of_a_policy", 14)
    ('dpo-0123 again', 'a_long_name_o…')
    """
    name, again = printable(name).removesuffix(AGAIN), AGAIN * name.endswith(AGAIN)
    width -= len(again)
    if len(name) > width or STAGE_FOLDER.search(name):
        name = name.rstrip("/").rpartition("/")[2] or name
        name = STAGE_FOLDER.sub(lambda digest: digest[0][:5], name)
    return (name if len(name) <= width else f"{name[: width - 1]}…") + again


def win_rate_table(comparisons: Sequence[Comparison]) -> ResultTable:
    """One row per policy by one judge, the control last."""
    first = comparisons[0]
    has_scores = first.mean_score is not None
    has_orders = first.consistency is not None
    columns = ["policy", "win\nrate", "interval", "ties", "at equal\nlength"]
    columns += ["score"] * has_scores + ["consist-\nency", "invalid"] * has_orders
    rows = []
    for row in comparisons:
        cells = [
            short_name(row.policy, POLICY_WIDTH),
            number(row.win_rate),
            f"{number(row.ci.low)}–{number(row.ci.high)}",
            number(row.ties),
            number(row.length_controlled_win_rate),
        ]
        if has_scores:
            cells.append(per_side(row.mean_score, ".3f"))
        if has_orders:
            cells += [number(row.consistency), str(row.invalid)]
        rows.append((*cells, lengths(row)))
    n_pairs = f" × {first.n_completions}"
    if first.n_pairs is not None:
        n_pairs = f", {counted(first.n_pairs, 'pair')}"
    unit = "tokens" if has_token_counts(first) else "characters"
    return ResultTable(
        title=f"win rates against {short_name(first.baseline, 14)} by "
        f"{short_name(first.judge, 14)}; {first.n_prompts} prompts{n_pairs}",
        columns=(*columns, unit),
        rows=rows,
        note="in %; ties count one half; intervals over prompts; a/b: policy/baseline",
    )


def has_token_counts(row: Comparison) -> bool:
    """Whether the lengths in tokens of both sides are known."""
    return None not in (row.mean_tokens.policy, row.mean_tokens.baseline)


def lengths(row: Comparison) -> str:
    """Mean lengths of both sides: in tokens if they are known, else in characters."""
    return per_side(row.mean_tokens if has_token_counts(row) else row.mean_characters, ".1f")


def per_side(sides: PerSide | None, form: str) -> str:
    """Both numbers, without decimals from 100 on; a dash where one is unknown."""
    numbers = [] if sides is None else [sides.policy, sides.baseline]
    return "/".join(
        "–" if each is None else format(each, ".0f" if abs(each) >= 100 else form)
        for each in numbers
    )


def by_judge(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """The comparisons of each judge, in their order."""
    grouped: dict[str, list[Comparison]] = {}
    for row in comparisons:
        grouped.setdefault(row.judge, []).append(row)
    return list(grouped.values())


def remarks(
    metrics: EvaluationMetrics, samples: Mapping[str, Samples], judges: Collection[str]
) -> tuple[str, ...]:
    """What was left out, and judges of which many verdicts are missing."""
    lines = [each.remark for each in samples.values() if each.remark]
    judged = {row.judge for row in metrics.comparisons}
    lines += [
        f"warning: {name}: no annotation is about a compared pair of completions"
        for name in judges
        if name not in judged
    ]
    for row in metrics.comparisons:
        if row.bounds is not None:
            low, high = row.bounds
            line = (
                f"{row.judge}: {counted(row.invalid, 'verdict')} about {row.policy} invalid; were they "
                f"lost or won, its win rate would be {100 * low:.1f} or {100 * high:.1f} %"
            )
            many = high - low > INVALID_SHARE + 1e-9  # the width is the share of invalid ones
            lines.append(f"warning: {line}" if many else line)
    return tuple(lines)


def implicit_reward_table(results: Sequence[ImplicitRewards]) -> ResultTable:
    """One row per policy."""
    return ResultTable(
        title=f"implicit rewards against {results[0].reference}, on held-out pairs",
        columns=("policy", "accuracy", "interval", "pairs", "invalid"),
        rows=[
            (
                short_name(row.policy, 24),
                percent(row.accuracy),
                percent_interval(row.ci),
                str(row.n_pairs),
                str(row.invalid),
            )
            for row in results
        ],
        note="interval: over prompts; invalid: prompts that fill all positions",
    )


def drift_table(metrics: Sequence[DriftMetrics]) -> ResultTable:
    """Drift from the baseline, one row per policy, the baseline last."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = [
        (
            short_name(row.policy, POLICY_WIDTH),
            number(row.kl, ".2f"),
            "–" if row.kl_ci is None else f"{row.kl_ci.low:.2f} to {row.kl_ci.high:.2f}",
            number(row.kl_per_token, ".3f"),
            number(row.entropy, ".2f"),
            "–" if row.missing_eos is None else f"{100 * row.missing_eos:.1f} %",
            number(row.distinct_1, ".2f"),
            number(row.distinct_2, ".2f"),
        )
        for row in metrics
    ]
    reference = next((row.reference for row in metrics if row.reference is not None), None)
    return ResultTable(
        title="drift" if reference is None else f"drift from {short_name(reference, 30)}",
        columns=(
            "policy",
            "KL",
            "interval",
            "KL per\ntoken",
            "entropy",
            "no eos",
            "distinct-1",
            "2",
        ),
        rows=rows,
        note="KL in nats per completion, by the log-ratios of the policy's samples (k1)",
    )


def headline(metrics: EvaluationMetrics) -> dict[str, float]:
    """The metric on the stage's line: of the first policy, the win rate or else the accuracy."""
    if metrics.comparisons:
        return {"win_rate": metrics.comparisons[0].win_rate}
    if metrics.implicit_rewards:
        return {"accuracy": metrics.implicit_rewards[0].accuracy}
    return {}


def all_tables(
    metrics: EvaluationMetrics,
    prompts: Sequence[Row],
    samples: Mapping[str, Samples],
    outcomes: Sequence[Outcomes],
) -> tuple[ResultTable, ...]:
    """Completions of the first policy, then win rates, drift and implicit rewards."""
    tables: list[ResultTable] = []
    if outcomes:
        tables += sample_tables(prompts, outcomes[0], samples)
    tables += map(win_rate_table, by_judge(metrics.comparisons))
    if metrics.drift:
        tables.append(drift_table(metrics.drift))
    if metrics.implicit_rewards:
        tables.append(implicit_reward_table(metrics.implicit_rewards))
    return tuple(tables)


def sample_tables(
    prompts: Sequence[Row], outcomes: Outcomes, samples: Mapping[str, Samples]
) -> list[ResultTable]:
    """The first completions of a policy and the baseline, side by side, for a few prompts."""
    names = outcomes.policy, outcomes.baseline
    scores = outcomes.scores, outcomes.baseline_scores
    tables: list[ResultTable] = []
    for i, prompt in enumerate(prompts):
        sides = [samples[name].completions[i][:1] for name in names]
        if len(tables) == N_SAMPLES or not all(sides):
            continue
        texts = [side[0].text for side in sides]
        headers = [
            f"{short_name(name, 28)}<"
            if each is None
            else f"{short_name(name, 28)} ({each[i, 0].item():.2f})<"
            for name, each in zip(names, scores, strict=True)
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
