"""Commands ``align eval RUN_OR_FOLDER [POLICY ...]``, ``eval annotations`` and ``eval reward``.

Policies are compared by an ``evaluate`` stage, see :mod:`align.cli.comparison`. Annotations and
reward models are evaluated by :mod:`align.evaluation.annotated_win_rates` and
:mod:`align.evaluation.reward_evaluation`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from align.cli.quantization import Quantization, announce_mismatches, check_quantization
from align.cli.run import Runs
from align.errors import UserError
from align.runtime.environment import quiet_libraries
from align.runtime.results import ResultTable

if TYPE_CHECKING:
    from align.evaluation.annotated_win_rates import AnnotatedWinRate
    from align.judges.base import ScoreJudge

COMPARE = "compare"


class _ComparesByDefault(TyperGroup):
    """``align eval dpo`` is ``align eval compare dpo``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command where none is named."""
        if args and args[0] not in (*self.commands, "--help"):
            args = [COMPARE, *args]
        return super().parse_args(ctx, args)


evaluation = typer.Typer(
    cls=_ComparesByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    subcommand_metavar="RUN_OR_FOLDER [POLICY]... | COMMAND [ARGS]...",
    help="Compare finished policies, re-score annotations, or measure a reward model.",
)
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]


@evaluation.command(COMPARE)
def eval_compare(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_FOLDER",
            help="A run such as runs/dpo, or a policy: a stage, a folder, a Hub id, a .jsonl file "
            "of completions. Then further policies, and keys such as n_prompts=100.",
        ),
    ],
    baseline: Annotated[
        str, typer.Option(metavar="POLICY", help="What they are compared with, or `reference`.")
    ],
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JUDGE",
            help="gold, a reward stage or model, module:function, a file of annotations, or "
            "{api: {...}}; several times: a panel.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE_OR_FOLDER",
            help="Prepared data with held-out prompts; by default those of the policies.",
        ),
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Compare finished policies without a recipe: `align eval dpo kto --baseline sft`."""
    quiet_libraries()
    from align.cli.comparison import comparison_recipe
    from align.pipeline import runner
    from align.pipeline.summary import show_summary
    from align.runtime import artifacts, progress

    recipe = comparison_recipe(
        policies, baseline=baseline, judges=judge or [], prompts=prompts, runs=runs
    )
    with progress.display() as display:
        summary = runner.run_recipe(recipe, runs, display)
    show_summary(summary, display.console, runs / recipe.name / artifacts.SUMMARY)


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
        _print_tables("annotations", _annotation_tables(results))


@evaluation.command("reward")
def eval_reward(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A reward stage, a folder or a Hub id.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A prepare, sample or label stage, its folder, or a file of pairs, choices or "
            "scored completions.",
        ),
    ],
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Scores completions for best-of-n: gold, a reward model, module:function.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quantization: Quantization = None,
    as_json: Json = False,
    runs: Runs = Path("runs"),
) -> None:
    """Measure a reward model: accuracy, calibration, choices and best-of-n."""
    from align.cli.comparison import COMPLETIONS, FinishedStages

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected float32 or bfloat16")
    check_quantization(quantization)
    stages = FinishedStages(runs)
    source = stages.stage(model, "reward")
    stages.prefer_lineage([source])
    place = stages.stage(data, *COMPLETIONS)
    scorer = None if judge is None else stages.judge(judge)
    stages.raise_problems()
    announce_mismatches(quantization, [source] if judge is None else [source, judge])
    quiet_libraries()
    from align.evaluation.reward_evaluation import evaluate_reward_model, result_tables
    from align.runtime import distributed
    from align.runtime.progress import Display, Logger, display
    from align.runtime.terminal import SafeConsole

    distributed.init_process_group()
    with Display(SafeConsole(stderr=True)) if as_json else display() as shown:
        shown.start("reward", Path(place), "measuring")
        measured = evaluate_reward_model(
            source,
            Path(place).expanduser(),
            judge=None
            if scorer is None
            else _score_judge(scorer, judge, runs, dtype, quantization),
            logger=Logger("reward", Path(place), shown, main=True),
            dtype=dtype,
            quantization=quantization,
        )
    if as_json:
        print(json.dumps(measured.to_metrics(), indent=2, allow_nan=False))
    else:
        _print_tables("reward", result_tables(measured))


def _score_judge(
    judge: Any, text: str | None, runs: Path, dtype: str, quantization: str | None
) -> ScoreJudge:
    """A judge that scores single completions.

    Raises:
        UserError: The judge compares two completions, or cannot be loaded.
    """
    from pydantic import ValidationError

    from align.config.functions import ScoreFunction
    from align.judges.build import build_judges

    is_function = isinstance(judge, dict) and "function" in judge
    try:
        config = ScoreFunction(**judge) if is_function else judge
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"--judge {text}: {place}: {first['msg']}".replace(": : ", ": ")) from None
    if not isinstance(config, str | ScoreFunction):
        raise UserError(
            f"--judge {text}: compares two completions; expected one that scores single ones: gold, "
            "a reward model, module:function"
        )
    inputs = {"judge": config} if isinstance(config, str) and config != "gold" else {}
    (built,) = build_judges(
        config, inputs, runs=runs, dtype=dtype, quantization=quantization, batch_size=64
    ).values()
    return cast("ScoreJudge", built)


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


def _print_tables(name: str, tables: Sequence[ResultTable]) -> None:
    from align.pipeline.summary import render_table
    from align.runtime.terminal import SafeConsole

    console = SafeConsole()
    for table in tables:
        console.print(render_table(table, name))
