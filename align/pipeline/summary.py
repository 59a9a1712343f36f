"""What a person sees at the end: win rates with intervals, scores, lengths, completions side by
side, and returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

N_SAMPLES = 3
LEGEND = "a tie counts half; intervals by bootstrap over prompts; score and tokens: policy/baseline"
WIDTH = 100  # where the output is no terminal


def show_summary(summary: Mapping[str, Any], console: Console, file: Path) -> None:
    """Print the tables of a summary."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, quiet=console.quiet)
    for stage in summary["stages"]:
        metrics = stage["metrics"]
        if metrics.get("comparisons"):
            _show_samples(Path(stage["folder"]) / "comparisons.parquet", console)
            console.print(_win_rates(metrics["comparisons"], stage["name"]))
        if metrics.get("implicit_rewards"):
            console.print(_accuracies(metrics["implicit_rewards"], stage["name"]))
        if metrics.get("held_out"):
            console.print(_reward(metrics, stage["name"]))
        if metrics.get("ppo"):
            console.print(_ppo(metrics, stage["name"]))
            console.print(Text(f"curves: {Path(stage['folder']) / 'ppo.png'}", style="dim"))
        if metrics.get("control"):
            console.print(_returns(metrics, stage["name"]))
            console.print(Text(f"curves: {Path(stage['folder']) / 'curves.png'}", style="dim"))
    if any(stage["metrics"].get("comparisons") for stage in summary["stages"]):
        console.print(Text(LEGEND, style="dim"))
    reused = sum(stage["status"] == "reused" for stage in summary["stages"])
    console.print(
        Text(
            f"{len(summary['stages'])} stage{'s' * (len(summary['stages']) > 1)}, {reused} reused, {summary['seconds']:.1f} s → {file}",
            style="dim",
        )
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(ci: list[float]) -> str:
    return f"{100 * ci[0]:.1f}–{100 * ci[1]:.1f} %"


def _table(*columns: str) -> Table:
    """A table that fits into 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _win_rates(comparisons: list[dict[str, Any]], name: str) -> Group:
    first = comparisons[0]
    title = (
        f"{name}: held-out win rates against {first['baseline']}, by {first['judge']}; "
        f"{first['n_prompts']} prompts × {first['n_completions']}"
    )
    table = _table(
        "policy",
        "win rate",
        "interval",
        "ties",
        "length-\ncontrolled",
        "mean score",
        "tokens",
    )
    for row in comparisons:
        scores, tokens = row["mean_score"], row["mean_tokens"]
        table.add_row(
            row["policy"],
            _percent(row["win_rate"]),
            _interval(row["ci"]),
            _percent(row["ties"]),
            _percent(row["length_controlled_win_rate"]),
            f"{scores['policy']:.3f}/{scores['baseline']:.3f}",
            f"{tokens['policy']:.1f}/{tokens['baseline']:.1f}",
            style="dim" if row["policy"].endswith(" again") else None,
        )
    return Group(Text(title, style="bold"), table)


def _accuracies(rows: list[dict[str, Any]], name: str) -> Group:
    title = f"{name}: implicit rewards against {rows[0]['reference']}, on held-out pairs"
    table = _table("policy", "accuracy", "interval", "pairs", "left out")
    for row in rows:
        accuracy, interval = _percent(row["accuracy"]), _interval(row["ci"])
        table.add_row(row["policy"], accuracy, interval, str(row["n_pairs"]), str(row["invalid"]))
    return Group(Text(title, style="bold"), table)


def _reward(metrics: Mapping[str, Any], name: str) -> Group:
    held_out = metrics["held_out"]
    title = f"{name}: reward model on {held_out['pairs']} held-out pairs"
    table = _table("accuracy", "interval", "ceiling", "agrees with gold", "calibration error")
    table.add_row(
        _percent(held_out["accuracy"]),
        _interval(held_out["ci"]),
        _percent(held_out.get("ceiling")),
        _percent(held_out.get("agreement_with_gold")),
        f"{held_out['expected_calibration_error']:.3f}",
    )
    return Group(Text(title, style="bold"), table)


def _ppo(metrics: Mapping[str, Any], name: str) -> Group:
    figures = metrics["ppo"]
    title = f"{name}: after {metrics['steps']} updates; KL in nats a completion"
    table = _table("prompts", "score", "gold", "KL", "entropy", "tokens", "no eos")
    for label, prefix in (("trained on", ""), ("held out", "eval_")):
        if f"{prefix}score" in figures:
            cells = [
                figures.get(f"{prefix}{key}")
                for key in ("score", "gold", "kl", "entropy", "tokens", "missing_eos")
            ]
            forms = (".3f", ".3f", ".2f", ".3f", ".1f", ".3f")
            table.add_row(
                label,
                *("–" if c is None else f"{c:{f}}" for c, f in zip(cells, forms, strict=True)),
            )
    return Group(Text(title, style="bold"), table)


def _returns(metrics: Mapping[str, Any], name: str) -> Group:
    title = (
        f"{name}: {metrics['algorithm']} on {metrics['environment']}, greedy policy; "
        f"mean return of {metrics['episodes']} episodes"
    )
    table = _table("seed", "return", "interval", "lowest", "steps", "seconds", "steps/s")
    for row in metrics["control"]:
        low, high = row["ci"]
        table.add_row(
            str(row["seed"]),
            f"{row['mean_return']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['lowest']:.1f}",
            f"{row['steps']:,}",
            f"{row['seconds']:.2f}",
            f"{row['steps_per_second']:,.0f}",
        )
    return Group(Text(title, style="bold"), table)


def _show_samples(file: Path, console: Console) -> None:
    import pyarrow.parquet as pq

    if console.quiet or not file.is_file():
        return
    table = pq.read_table(file)
    rows = table.to_pylist()
    shown: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["policy"] == rows[0]["policy"]:
            shown.setdefault(row["prompt"], row)
        if len(shown) == N_SAMPLES:
            break
    for prompt, row in shown.items():
        sides = Table.grid(padding=(0, 2), expand=True)
        sides.add_column(ratio=1)
        sides.add_column(ratio=1)
        sides.add_row(*(_side(row, side) for side in ("policy", "baseline")))
        console.print(Panel(sides, title=Text(prompt), title_align="left"))


def _side(row: Mapping[str, Any], side: str) -> Text:
    text = Text(f"{row[side]} ({row[f'{side}_score']:.2f})\n", style="bold")
    return text.append(row[f"{side}_completion"] or "(empty)", style="not bold")
