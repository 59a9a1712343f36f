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


def read(path: str) -> dict[str, list[Any]]:
    """Read the columns of a JSONL file."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return {key: [row[key] for row in rows] for key in ("prompt", "completion", "score")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        sys.exit(f"{path}: cannot be read as lines with prompt, completion and score: {error!r}")


def main(policy_file: str, baseline_file: str) -> None:
    """Compare the scores prompt by prompt."""
    policy, baseline = read(policy_file), read(baseline_file)
    if policy["prompt"] != baseline["prompt"]:
        sys.exit(f"{policy_file} and {baseline_file} must list the same prompts in the same order")
    result = align.win_rate(
        policy["score"],
        baseline["score"],
        lengths=list(map(len, policy["completion"])),
        baseline_lengths=list(map(len, baseline["completion"])),
    )
    low, high = result.interval
    print(f"win rate {result.rate:.1%} (95 % interval {low:.1%} to {high:.1%})")
    if result.length_controlled is not None:
        print(f"length-controlled win rate {result.length_controlled:.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/win_rate_of_two_files.py POLICY.jsonl BASELINE.jsonl")
    main(*sys.argv[1:])
