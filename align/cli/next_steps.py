"""What is printed after a run: where its report is, and the commands that use its results."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from align.runtime import artifacts

if TYPE_CHECKING:
    from rich.console import Console

    from align.pipeline.runner import RunSummary


def show_next_steps(summary: RunSummary, runs: Path, name: str, console: Console) -> None:
    """Write the report, and print where it is and which commands use the results."""
    from align.report.page.render import write_report

    try:
        console.print(f"report: {write_report(runs / name)}", soft_wrap=True)
    except Exception as error:  # the results are complete: a run must not fail because of its page
        console.print(f"warning: no report: {type(error).__name__}: {error}", soft_wrap=True)
    for line in next_commands(summary, runs):
        console.print(f"next: {line}", soft_wrap=True)


def next_commands(summary: RunSummary, runs: Path) -> Iterator[str]:
    """Commands that use the policy which the run trained last."""
    from align.config.stages import STAGES

    option = "" if runs == Path("runs") else f" --runs {shlex.quote(str(runs))}"
    trained = [stage for stage in summary.stages if STAGES[stage.stage].writes_policy]
    policies = [stage.name for stage in trained]
    if any(stage.stage == "control" for stage in summary.stages):
        played = [stage.name for stage in summary.stages if stage.stage == "control"]
        yield f"align play {played[-1]}{option}"
    if not policies:
        return
    bits = _quantization(trained[-1].folder)
    yield f"align chat {policies[-1]}{bits}{option}"
    if len(policies) > 1 and not any(stage.stage == "evaluate" for stage in summary.stages):
        yield f"align eval {policies[-1]} --baseline {policies[0]} --judge JUDGE{bits}{option}"
    yield f"align export {policies[-1]} {policies[-1]}-merged{option}"


def _quantization(folder: Path) -> str:
    """The option with which an adapter on a base in 4 bits is loaded as it was trained."""
    artifact = artifacts.read_artifact(folder)
    quantization = artifact.recipe.get("quantization") if artifact is not None else None
    return f" --quantization {quantization}" if quantization else ""
