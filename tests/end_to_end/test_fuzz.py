"""Mutated recipes, overrides, options and data: exit 0, or exit 2 with lines that name the place.

``ALIGN_FUZZ=400`` tries that many inputs with ``align check``, and a tenth of it with a run;
``ALIGN_FUZZ_SEED`` is the first seed. Each input takes at most 20 seconds of processor time, and
the import of a training library may be among them; at most two minutes pass on a busy machine.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import fuzzing

from align.cli import main as cli

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
COUNT = int(os.environ.get("ALIGN_FUZZ", "60"))
SEED = int(os.environ.get("ALIGN_FUZZ_SEED", "0"))
SECONDS = 20
PLACE = re.compile(
    r"[^:]*\.yaml(:\d+)?: |command line: |--\w+ |runs/|d\.\w+(:\d+)?: |rows\.jsonl(:\d+)?: "
    r"|No such option|Got unexpected|Invalid value|Missing argument|Usage: |Try |Option "
)


def judge(code: object, err: str, seconds: float) -> str | None:
    """What is wrong with the outcome of a command; None if nothing is."""
    if code not in (0, 2):
        return f"exit {code}"
    if "Traceback" in err:
        return "traceback"
    if seconds > SECONDS:
        return f"{seconds:.0f} s"
    lines = [line for line in err.splitlines() if line.strip()]
    if code == 2 and not lines:
        return "no message"
    if code == 2 and not any(PLACE.match(line) for line in lines):
        return "no place"
    if code == 2 and any(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", line) for line in lines):
        return "control characters"
    return None


def outcomes(
    run: Callable[[fuzzing.Case], tuple[object, str]],
    count: int,
    folder: Path,
) -> None:
    """Run ``count`` cases and print what became of them.

    Raises:
        AssertionError: One of the cases ended in a traceback, without a place or too late.
    """
    results: Counter[str] = Counter()
    faults = []
    for seed in range(SEED, SEED + count):
        case = fuzzing.case(seed)
        place = folder / str(seed)
        place.mkdir()
        fuzzing.write(place, case.files)
        os.chdir(place)
        started, processor = time.monotonic(), time.process_time()
        code, err = run(case)
        seconds = max(time.process_time() - processor, (time.monotonic() - started) / 6)
        problem = judge(code, err, seconds)
        results["fault" if problem else "accepted" if code == 0 else "refused with a place"] += 1
        if problem:
            faults.append(f"seed {seed}: {problem}: {case.mutations}\n{err[-600:]}")
        shutil.rmtree(place)
    print(f"{count} inputs: {dict(results)}")
    assert not faults, "\n".join(faults)


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str]]:
    """``in_process(main, "check", …)`` runs a command in this process; exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(main: Callable[[], None], *arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["align", *arguments])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as exit_error:
            code = exit_error.code or 0
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
        return code, capfd.readouterr().err

    return call


def test_check_accepts_an_input_or_names_the_place_of_its_fault(in_process, tmp_path):
    def check(case: fuzzing.Case) -> tuple[object, str]:
        return in_process(cli.main, "check", "recipe.yaml", *case.overrides)

    outcomes(check, COUNT, tmp_path)


def test_a_run_finishes_or_names_the_place_of_the_fault(launch, tmp_path):
    def run(case: fuzzing.Case) -> tuple[object, str]:
        try:
            finished = launch("recipe.yaml", *case.overrides, *case.options)
        except Exception as error:
            return f"{type(error).__name__}: {error}", ""
        return finished.code, finished.err

    outcomes(run, max(4, COUNT // 10), tmp_path)
