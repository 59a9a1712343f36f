"""Compare the times of ``align plan --probe`` with those of the run that follows.

    OMP_NUM_THREADS=1 python benchmarks/plan_time.py RECIPE [STAGE.KEY=VALUE]... [--runs DIR]

Both are processor seconds of this process, which other programs on the machine hardly change; with
``--wall`` they are seconds. On a GPU use ``--wall``. Finished stages are reused and left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.config.recipe import ErrorCollector, read_recipe
from align.pipeline import estimates
from align.pipeline.plan import plan_stages
from align.pipeline.runner import run_recipe
from align.runtime.environment import quiet_libraries
from align.runtime.progress import NullDisplay


class Clock(NullDisplay):
    """A display that shows nothing and records the time of each stage."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self._begin = clock, 0.0
        self.seconds: dict[str, float] = {}

    def start(self, name: str, folder: Path, status: str) -> None:
        """Record when a stage begins."""
        super().start(name, folder, status)
        self._begin = self._clock()

    def end(self, name: str, status: str, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Record the time of a stage that has run."""
        if status == "ran":
            self.seconds[name] = self._clock() - self._begin


def main() -> None:
    """Measure, run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--until")
    parser.add_argument("--wall", action="store_true", help="seconds instead of processor seconds")
    parser.add_argument("--probe-only", action="store_true", help="print the parts, run nothing")
    options = parser.parse_args()
    quiet_libraries()
    from align.pipeline.probe.probe import measure
    from align.pipeline.probe.timing import Stopwatch

    clock = time.perf_counter if options.wall else time.process_time
    recipe = read_recipe(options.recipe, options.overrides)
    errors = ErrorCollector(recipe)
    stages = plan_stages(errors, options.runs, until=options.until)
    errors.raise_any()
    prepared = estimates.prepare_small(stages)
    begin = clock()
    times = measure(
        stages,
        prepared,
        options.runs,
        announce=lambda line: print(f"{clock() - begin:.1f} s: {line}", flush=True),
        watch=Stopwatch(clock),
    )
    print(f"probe: {clock() - begin:.1f} s")
    for name, stage in times.items():
        parts = ", ".join(f"{k} {v.least:.1f}-{v.most:.1f}" for k, v in stage.parts.items())
        print(f"{name}: {parts}; {stage.measured}; {stage.remark}", flush=True)
    if options.probe_only:
        return
    display = Clock(clock)
    run_recipe(recipe, options.runs, display, until=options.until)
    print("| stage | planned | measured | planned / measured |")
    print("|---|---|---|---|")
    for name, seconds in display.seconds.items():
        least, most = times[name].total.least, times[name].total.most
        ratios = f"{least / seconds:.2f} to {most / seconds:.2f}"
        print(f"| {name} | {least:.1f} to {most:.1f} s | {seconds:.1f} s | {ratios} |")


if __name__ == "__main__":
    main()
