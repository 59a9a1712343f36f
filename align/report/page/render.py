"""Write the report of a run: ``runs/<recipe>/report.html``, one file that loads nothing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ArtifactError
from align.report import advice
from align.report.curves import panels
from align.report.page import chain, figures
from align.report.page.contents import (
    COMPARISONS,
    FILE,
    RunContents,
    StageContents,
    read_run,
)
from align.runtime.durations import duration

if TYPE_CHECKING:
    from markupsafe import Markup

_FOLDER = Path(__file__).parent
LEFT = "<"  # at the end of the header of a left-aligned column


def write_report(run_folder: Path) -> Path:
    """Write the report into the folder of a run; returns the file.

    Raises:
        ArtifactError: The run is not finished, a file of it is damaged, or the page cannot be
            written.
    """
    return _write(run_folder / FILE, render(read_run(run_folder)))


def write_comparison(run_folders: Sequence[Path], file: Path) -> Path:
    """Write the comparison of several runs; returns the file.

    Raises:
        ArtifactError: A run is not finished, or the file cannot be written.
    """
    return _write(file, render_comparison([read_run(folder) for folder in run_folders]))


def _write(file: Path, page: str) -> Path:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # of half a surrogate pair: `?`
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(f"{file}: cannot be written: {error.strerror}") from None
    return file


def render(run: RunContents) -> str:
    """The page of a run."""
    return _render(
        "page.html.jinja",
        run=run,
        script=(_FOLDER / "page.js").read_text(encoding="utf-8"),
        chain=chain.chain(run.stages),
        advice=list(all_advice(run)),
        results=list(_results(run)),
        pictures={stage.name: list(_pictures(stage)) for stage in run.stages},
        curves={
            stage.name: [
                figures.learning_curve(panel, stage.name) for panel in panels(stage.curves)
            ]
            for stage in run.stages
        },
        left=LEFT,
    )


def render_comparison(runs: Sequence[RunContents]) -> str:
    """The page of several runs."""
    from align.report.page import comparison

    results = list(comparison.results(runs))
    return _render(
        "comparison.html.jinja",
        runs=runs,
        settings=comparison.differing_settings(runs),
        results=results,
        picture=figures.win_rates(
            [
                {
                    "policy": f"{each.run}: {each.policy}",
                    "baseline": each.baseline,
                    "judge": each.judge,
                    "win_rate": each.win_rate,
                    "ci": (each.low, each.high),
                    "length_controlled_win_rate": each.at_equal_length,
                }
                for each in results
            ]
        )
        if results
        else "",
        differences=list(comparison.paired_differences(runs)),
        curves=[
            (name, [figures.learning_curve(panel, name) for panel in joined])
            for name, joined in comparison.joined_curves(runs)
        ],
    )


def _render(template: str, **contents: object) -> str:
    """A page from its template, with the style that all pages share."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "duration": duration,
        "setting": setting,
        "code": code,
        "percent": lambda share: f"{100 * share:.1f}",
    }
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    text = (_FOLDER / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(style=style, **contents)


def all_advice(run: RunContents) -> Iterator[advice.Advice]:
    """The warnings about all stages of a run."""
    comparisons = [
        each
        for stage in run.of_kind("evaluate")
        for each in stage.artifact.metrics.get("comparisons", ())
    ]
    for stage in run.stages:
        yield from advice.about_training(stage.name, stage.kind, stage.curves)
        if stage.kind == "reward":
            yield from advice.about_reward_model(stage.name, stage.artifact.metrics)
        if stage.kind == "dpo":
            yield from advice.about_margins(stage.name, stage.curves, comparisons)


def _results(run: RunContents) -> Iterator[tuple[StageContents, str, list[dict[str, Any]]]]:
    """Stages with results, the last one first: a picture of win rates, and the tables.

    Tables of completions are left out; the page shows more of them below.
    """
    for stage in reversed(run.stages):
        comparisons = stage.artifact.metrics.get("comparisons")
        picture = figures.win_rates(comparisons) if comparisons else ""
        tables = [
            table
            for table in stage.artifact.tables
            if not all(column.endswith(LEFT) for column in table["columns"])
        ]
        if picture or tables:
            yield stage, picture, tables


def _pictures(stage: StageContents) -> Iterator[tuple[str, str]]:
    """Titles and SVGs of a stage."""
    metrics = stage.artifact.metrics
    file = stage.folder / COMPARISONS
    picture = figures.length_and_outcome(file) if file.is_file() else ""
    if picture:
        yield "Length and win rate", picture
    calibration = (metrics.get("held_out") or {}).get("calibration")
    if stage.kind == "reward" and calibration:
        yield "Calibration", figures.calibration(calibration)
    picture = figures.kl_and_score(stage)
    if picture:
        yield "Score and KL", picture


def code(text: str) -> Markup:
    """Text for the page, with what is between backquotes as code.

    >>> code("set `beta` < 1")
    Markup('set <code>beta</code> &lt; 1')
    """
    from markupsafe import Markup, escape

    parts = [str(escape(part)) for part in text.split("`")]
    return Markup("".join(f"<code>{p}</code>" if k % 2 else p for k, p in enumerate(parts)))


def setting(value: Any) -> str:
    """A setting as it is written in a recipe, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
