"""Tables of judges and of several policies for the summary; each fits into 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from align.evaluation.results import (
    Agreement,
    Comparison,
    Estimate,
    EvaluationMetrics,
    JudgeCard,
    Ranking,
)
from align.evaluation.tables import number, percent, percent_interval, short_name
from align.runtime.results import ResultTable

MOST_OPPONENTS = 6
"""Columns of a win matrix that fit."""


def judge_tables(metrics: EvaluationMetrics) -> list[ResultTable]:
    """Rankings, corrections by people, the judge card and agreement: what was measured of them."""
    tables: list[ResultTable] = []
    for ranking in metrics.rankings:
        tables.append(ranking_table(ranking, metrics.comparisons))
        # A judge that compares only reads pairs with the baseline: the win rates are above.
        if len(ranking.policies) <= MOST_OPPONENTS and ranking.win_rates[0][1] is not None:
            tables.append(matrix_table(ranking))
    corrected = [row for row in metrics.comparisons if row.corrected is not None]
    if corrected:
        tables.append(correction_table(corrected))
    by_rubric = [row for row in metrics.comparisons if row.criteria]
    if by_rubric:
        tables.append(criteria_table(by_rubric))
    if metrics.judges:
        tables.append(card_table(metrics.judges))
    if metrics.agreement:
        tables.append(agreement_table(metrics.agreement))
    return tables


def ranking_table(ranking: Ranking, comparisons: Sequence[Comparison]) -> ResultTable:
    """One row per policy, the strongest first."""
    p_values = {
        row.policy: row.adjusted_p_value for row in comparisons if row.judge == ranking.judge
    }
    rows = []
    for i in _strongest_first(ranking):
        strength = ranking.strengths[i]
        p_value = p_values.get(ranking.policies[i])
        rows.append(
            (
                short_name(ranking.policies[i], 30),
                f"{strength.value:.2f}",
                f"{strength.ci.low:.2f} to {strength.ci.high:.2f}",
                "–" if p_value is None else f"{p_value:.2g}",
            )
        )
    return ResultTable(
        title=f"strengths by {short_name(ranking.judge, 40)}",
        columns=("policy", "strength", "interval", "p (Holm)"),
        rows=rows,
        note="Bradley-Terry: log-odds of winning against the baseline",
    )


def matrix_table(ranking: Ranking) -> ResultTable:
    """Win rates of the policy of each row against that of each column, the strongest first."""
    order = _strongest_first(ranking)
    return ResultTable(
        title=f"win rates against each other by {short_name(ranking.judge, 30)}",
        columns=("policy", *(short_name(ranking.policies[j], 8) for j in order)),
        rows=[
            (
                short_name(ranking.policies[i], 14),
                *(number(ranking.win_rates[i][j]) for j in order),
            )
            for i in order
        ],
        note="in %, of the policy of each row",
    )


def _strongest_first(ranking: Ranking) -> list[int]:
    strengths = [each.value for each in ranking.strengths]
    return sorted(range(len(strengths)), key=strengths.__getitem__, reverse=True)


def correction_table(comparisons: Sequence[Comparison]) -> ResultTable:
    """Win rates of each judge, corrected by the labels of people."""
    rows = []
    for row in comparisons:
        assert row.corrected is not None
        rows.append(
            (
                short_name(row.policy, 18),
                short_name(row.judge, 18),
                percent(row.win_rate),
                percent(row.corrected.value),
                percent_interval(row.corrected.ci),
            )
        )
    return ResultTable(
        title="win rates by people, from their labels and the judge's verdicts",
        columns=("policy", "judge<", "judge's", "corrected", "interval"),
        rows=rows,
        note="prediction-powered inference; the labeled prompts must be a random sample",
    )


def criteria_table(comparisons: Sequence[Comparison]) -> ResultTable:
    """One row per policy and criterion of a rubric."""
    return ResultTable(
        title="win rates by the criteria of a rubric",
        columns=("policy", "judge<", "criterion<", "win rate", "interval"),
        rows=[
            (
                short_name(row.policy, 14),
                short_name(row.judge, 18),
                short_name(name, 18),
                percent(each.value),
                percent_interval(each.ci),
            )
            for row in comparisons
            for name, each in (row.criteria or {}).items()
        ],
    )


def card_table(cards: Sequence[JudgeCard]) -> ResultTable:
    """One row per judge."""

    def share(estimate: Estimate | None) -> str:
        return "–" if estimate is None else percent(estimate.value)

    return ResultTable(
        title="judge card",
        columns=(
            "judge",
            "longer\nwins",
            "first\nwins",
            "consist-\nency",
            "votes\nagree",
            "detects\n50 % ±",
            "pairs",
            "invalid",
        ),
        rows=[
            (
                short_name(card.judge, 14),
                share(card.length_bias),
                share(card.position_bias),
                share(card.consistency),
                share(card.self_agreement or card.annotator_agreement),
                percent(card.detectable_difference if card.detectable_difference < 0.5 else None),
                str(card.n_pairs),
                str(card.invalid),
            )
            for card in cards
        ],
        note="without bias, the completion that is read first wins 50 %",
    )


def agreement_table(results: Sequence[Agreement]) -> ResultTable:
    """One row for each two judges."""
    rows = []
    for row in results:
        kappa = row.kappa
        rows.append(
            (
                short_name(row.first, 18),
                short_name(row.second, 18),
                str(row.n_pairs),
                percent(row.same),
                "–" if kappa is None else f"{kappa.value:.2f}",
                "–" if kappa is None else f"{kappa.ci.low:.2f} to {kappa.ci.high:.2f}",
            )
        )
    return ResultTable(
        title="agreement of judges",
        columns=("judge", "and<", "pairs", "same", "kappa", "interval"),
        rows=rows,
        note="kappa: agreement beyond chance (Cohen)",
    )
