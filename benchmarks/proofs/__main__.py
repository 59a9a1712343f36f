"""Train every method where theory names the result, and print the page of the proofs.

    OMP_NUM_THREADS=1 python -m benchmarks.proofs --results proofs.jsonl

``--results`` keeps every finished run, so that the same command resumes; ``--only NAME`` selects
the methods whose name contains NAME. ``--page`` replaces a page; methods without a run keep their
rows of it if their training and theory are unchanged. The exit code is 1 if a run ends more than
0.02 nats from the policy that theory names; where that policy excludes completions, if these keep
more than 0.02 of the probability or KL(named, trained) is above 0.02.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.proofs.methods import BOUND, METHODS
from benchmarks.proofs.page import page
from benchmarks.proofs.runs import Run, run_by_name


def read(path: Path) -> list[Run]:
    """Runs of a file that have the present settings and theory of their methods, one per seed."""
    if not path.exists():
        return []
    settings = {method.name: method.fingerprint for method in METHODS}
    runs = [Run(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    present = (run for run in runs if settings.get(run.method) == run.fingerprint)
    return list({(run.method, run.seed): run for run in present}.values())


def main() -> None:
    """Read the command line, train, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="part of the name of the methods")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, help="file of finished runs, read and extended")
    parser.add_argument("--page", type=Path, help="write the page to this file")
    args = parser.parse_args()
    names = [method.name for method in METHODS if args.only.lower() in method.name.lower()]
    runs = read(args.results) if args.results else []
    finished = {(run.method, run.seed) for run in runs}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=spawn) as pool:
        tasks = [
            pool.submit(run_by_name, name, seed)
            for name in names
            for seed in args.seeds
            if (name, seed) not in finished
        ]
        for task in as_completed(tasks):
            runs.append(task.result())
            print(runs[-1], file=sys.stderr, flush=True)
            if args.results:
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(runs[-1])) + "\n")
    before = args.page.read_text(encoding="utf-8") if args.page and args.page.exists() else ""
    text = page(runs, before)
    if args.page is not None:
        args.page.write_text(text, encoding="utf-8")
    else:
        print(text)
    beyond = [each for each in runs if max(each.reached, each.from_named or 0.0) > BOUND]
    for each in beyond:
        named = "" if each.from_named is None else f", KL(named, trained) {each.from_named:.3f}"
        place = f"{each.method}, seed {each.seed}"
        print(f"{place}: {each.reached:.3f}{named}: above {BOUND}", file=sys.stderr)
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
