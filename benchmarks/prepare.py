"""Throughput and memory of `prepare` on a large file of generated pairs, on one core.

    OMP_NUM_THREADS=1 python benchmarks/prepare.py --rows 1000000

Memory is the peak of a separate process, minus that of a run on 1,000 rows. With `--words`,
completions are longer: memory grows with the number of rows, not with their text.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "lo", "mi")]
RUN = """
import resource, sys, time
from pathlib import Path
from align.config.data import Prepare
from align.runtime.progress import Logger, NullDisplay
from align.stages import prepare
source, output_dir = sys.argv[1], Path(sys.argv[2])
logger = Logger("prepare", output_dir, NullDisplay(), main=True)
started = time.perf_counter()
metrics = prepare.run(Prepare(source=source), {}, output_dir, logger).metrics
seconds = time.perf_counter() - started
mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
print(metrics["rows"]["pairs"], sum(metrics["dropped"].values()), seconds, mib)
"""


def write_pairs(path: Path, rows: int, words: int) -> None:
    """Write pairs, two rows per prompt; one row in a hundred repeats the one before it."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        line = ""
        for number in range(rows):
            if number % 100 != 99:
                prompt = f"Question {number // 2}: " + " ".join(draw.choices(WORDS, k=15))
                sides = (" ".join(draw.choices(WORDS, k=draw.randint(2, 2 * words))) for _ in "ab")
                row = dict(zip(("prompt", "chosen", "rejected"), (prompt, *sides), strict=True))
                line = json.dumps(row) + "\n"
            file.write(line)


def measure(rows: int, words: int) -> tuple[float, float]:
    """Rows per second, and the peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.jsonl"
        write_pairs(source, rows, words)
        command = [sys.executable, "-c", RUN, str(source), str(Path(folder) / "out")]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        n_read, n_dropped, seconds, peak = map(float, process.stdout.split())
        size = source.stat().st_size / 2**20
        print(
            f"{rows:>9,} rows of {words:>4} words, {size:,.0f} MiB: {n_read / seconds:,.0f} rows/s,"
            f" peak {peak:,.0f} MiB, {n_dropped:,.0f} dropped",
            flush=True,
        )
        return n_read / seconds, peak


def main() -> None:
    """Measure a small file, one with `--rows` rows, and one with four times the text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=40, help="mean length of a completion")
    arguments = parser.parse_args()
    base = measure(1000, arguments.words)[1]
    peak = measure(arguments.rows, arguments.words)[1]
    print(f"{(peak - base) * 2**20 / arguments.rows:,.0f} bytes per row")
    measure(arguments.rows // 4, arguments.words)
    measure(arguments.rows // 4, 4 * arguments.words)


if __name__ == "__main__":
    main()
