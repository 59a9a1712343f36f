"""Win rate of one file of scored completions against another, with its interval.

Each line of a file is a JSON object with ``prompt``, ``completion`` and ``score``; both files list
the same prompts in the same order.

    python examples/win_rate_of_two_files.py POLICY.jsonl BASELINE.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

import align


def read(path: str) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main(policy_file: str, baseline_file: str) -> None:
    """Compare the scores prompt by prompt."""
    policy, baseline = read(policy_file), read(baseline_file)
    if [row["prompt"] for row in policy] != [row["prompt"] for row in baseline]:
        sys.exit(f"{policy_file} and {baseline_file} must list the same prompts in the same order")
    result = align.win_rate(
        [row["score"] for row in policy],
        [row["score"] for row in baseline],
        lengths=[len(row["completion"]) for row in policy],
        baseline_lengths=[len(row["completion"]) for row in baseline],
    )
    low, high = result.interval
    print(f"win rate {result.rate:.1%} (95 % interval {low:.1%} to {high:.1%})")
    if result.length_controlled is not None:
        print(f"length-controlled win rate {result.length_controlled:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
