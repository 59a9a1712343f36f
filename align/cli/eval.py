"""Commands ``align eval annotations``.

Win rates of annotations are computed by :mod:`align.evaluation.annotated_win_rates`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.runtime.results import ResultTable

if TYPE_CHECKING:
    from align.evaluation.annotated_win_rates import AnnotatedWinRate

evaluation = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Re-score published annotations.",
)
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


@evaluation.command("annotations")
def eval_annotations(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Files or folders in the layout of AlpacaEval, Align, Label Studio or Argilla.",
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The baseline; by default the first of each two."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute win rates from files of annotations: raw with intervals, and length-controlled."""
    from align.evaluation.annotated_win_rates import annotated_win_rates

    results = annotated_win_rates(files, baseline=reference)
    if as_json:
        comparisons = [asdict(result) for result in results]
        print(json.dumps({"comparisons": comparisons}, indent=2, allow_nan=False))
    else:
        _print_tables(_annotation_tables(results))


def _annotation_tables(results: Sequence[AnnotatedWinRate]) -> list[ResultTable]:
    """One table per baseline."""
    from align.evaluation.tables import percent, percent_interval

    names = Counter((result.policy, result.baseline) for result in results)
    tables = []
    for baseline in dict.fromkeys(result.baseline for result in results):
        rows = [result for result in results if result.baseline == baseline]
        tables.append(
            ResultTable(
                title=f"win rates against {baseline}, by annotations",
                columns=(
                    "policy",
                    "win rate",
                    "interval",
                    "length-\ncontrolled",
                    "prompts",
                    "invalid",
                    "characters",
                ),
                rows=[
                    (
                        row.policy
                        if names[row.policy, baseline] == 1
                        else f"{row.policy} ({row.file})",
                        percent(row.win_rate),
                        percent_interval(row.ci),
                        percent(row.length_controlled_win_rate),
                        f"{row.n_prompts:,}",
                        f"{row.invalid:,}",
                        f"{row.mean_characters.policy:.0f}/{row.mean_characters.baseline:.0f}",
                    )
                    for row in rows
                ],
                note=_note(rows),
            )
        )
    return tables


def _note(rows: Sequence[AnnotatedWinRate]) -> str:
    jointly = max(row.n_jointly for row in rows)
    difficulty = (
        "prompts are taken as equally difficult, because there is one file"
        if jointly == 1
        else f"difficulty of the prompts estimated jointly from {jointly} comparisons"
    )
    return (
        "ties count one half; intervals of 95 % over prompts; characters: policy/baseline\n"
        f"length-controlled as in AlpacaEval 2;\n{difficulty}"
    )


def _print_tables(tables: Sequence[ResultTable]) -> None:
    from align.pipeline.summary import WIDTH, render_table
    from align.runtime.terminal import SafeConsole

    console = SafeConsole() if sys.stdout.isatty() else SafeConsole(width=WIDTH)
    for table in tables:
        console.print(render_table(table, "annotations"))
