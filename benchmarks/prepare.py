"""How fast, and in how much memory, `prepare` takes a large file: made pairs, one core.

    OMP_NUM_THREADS=1 python benchmarks/prepare.py --rows 1000000

Memory is the peak of a process of its own, above what a run on 1,000 rows takes. `--words` makes longer completions: rows
cost memory, their text does not.
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
from align.config.stages import Prepare
from align.stages import prepare
from align.runtime.progress import Silent, Track
source, out = sys.argv[1], Path(sys.argv[2])
started = time.perf_counter()
figures = prepare.run(Prepare(source=source), {}, out, Track("prepare", out, Silent(), main=True))
print(figures["rows"]["pairs"], sum(figures["dropped"].values()), time.perf_counter() - started,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
"""


def make(path: Path, rows: int, words: int) -> None:
    """Write pairs; two rows a prompt, and one row in a hundred that repeats the one before."""
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
    """Rows a second, and the peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.jsonl"
        make(source, rows, words)
        command = [sys.executable, "-c", RUN, str(source), str(Path(folder) / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        read, dropped, seconds, peak = map(float, done.stdout.split())
        print(
            f"{rows:>9,} rows of {words:>4} words, {source.stat().st_size / 2**20:,.0f} MiB: {read / seconds:,.0f} rows/s,"
            f" peak {peak:,.0f} MiB, {dropped:,.0f} dropped",
            flush=True,
        )
        return read / seconds, peak


def main() -> None:
    """Measure a small file, the file asked for, and one with four times the text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=40, help="mean length of a completion")
    given = parser.parse_args()
    base = measure(1000, given.words)[1]
    peak = measure(given.rows, given.words)[1]
    print(f"{(peak - base) * 2**20 / given.rows:,.0f} bytes a row")
    measure(given.rows // 4, given.words)
    measure(given.rows // 4, 4 * given.words)


if __name__ == "__main__":
    main()
