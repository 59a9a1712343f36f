"""Time the way of a first user: clone, environment, README's installation and quickstart, report.

    python benchmarks/first_run.py

Everything is done in a temporary folder, with pip's cache as it is. The seconds are wall-clock time
and depend on the network and on other programs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORT = "runs/dpo/report.html"


def readme_commands(readme: Path, heading: str) -> list[str]:
    """The commands in the first bash block below a heading, without comments."""
    section = readme.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None, heading
    return [line.partition("#")[0].strip() for line in block[1].splitlines()]


def main() -> None:
    """Run the steps and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "align"
        torch, package, *_ = readme_commands(ROOT / "README.md", "Install")
        (quickstart,) = readme_commands(ROOT / "README.md", "Quickstart")
        steps = {
            "clone": f"git clone --quiet {ROOT} {folder}",
            "environment": f"{sys.executable} -m venv {folder}/.venv",
            "install": f"{torch} && {package}",
            "quickstart": quickstart,
            "report": f"test -s {REPORT}",
        }
        print("| step | seconds |\n|---|---|")
        total = 0.0
        for step, command in steps.items():
            inside = step not in ("clone", "environment")
            activate = f"cd {folder} && . .venv/bin/activate && " if inside else ""
            started = time.monotonic()
            log = Path(name) / "log"
            with log.open("w") as output:
                done = subprocess.run(
                    ["bash", "-c", activate + command], stdout=output, stderr=output
                )
            if done.returncode:
                sys.exit(f"{step}: {log.read_text()[-2000:]}")
            total += (seconds := time.monotonic() - started)
            print(f"| {step} | {seconds:.0f} |", flush=True)
        print(f"| all | {total:.0f} |")


if __name__ == "__main__":
    main()
