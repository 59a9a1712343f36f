"""Take the pictures of the documentation from a report and an annotation page, in Chromium.

    python docs/theme/screenshots.py runs/grpo/report.html runs/prepare-…/pairs-test.parquet

It needs Chromium and `pip install -e '.[dev]'`. The pictures are written beside this script.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.chromium import Tab, browser  # noqa: E402  (of the tests)

DESKTOP, PHONE = (1100, 760), (390, 760)
PORT = 7891


def picture(tab: Tab, name: str) -> None:
    """Write what is visible, with few colors."""
    file = FOLDER / f"{name}.png"
    tab.screenshot(file)
    Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(
        file, optimize=True
    )


def report_pictures(tab: Tab, report: Path) -> None:
    """The beginning of a report, its curves in the dark, and its beginning on a phone."""
    for name, size, scheme, anchor in (
        ("report", DESKTOP, "light", "body"),
        ("report-dark", DESKTOP, "dark", "#stage-grpo"),
        ("report-phone", PHONE, "light", "#results"),
    ):
        tab.set_view(*size, scheme=scheme)
        tab.open(report.resolve().as_uri())
        tab.wait("document.readyState == 'complete'")
        tab.evaluate(f"document.querySelector('{anchor}').scrollIntoView()")
        time.sleep(0.5)
        picture(tab, name)


def annotation_picture(tab: Tab, pairs: Path) -> None:
    """A pair on the annotation page, after five decisions."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "align.cli.main", "annotate", str(pairs.resolve())]
        page = subprocess.Popen(
            [*command, "--port", str(PORT), "--overlap", "1"],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert page.stdout is not None
            address = next(line for line in page.stdout if line.startswith("http")).split()[0]
            tab.set_view(1100, 520)
            tab.open(address)
            field = "document.querySelector('#name input, #name textarea')"
            tab.wait(f"{field} !== null")
            time.sleep(2)
            tab.evaluate(f"{field}.focus()")
            tab.write("Ana")
            tab.press("Enter")
            tab.wait("document.querySelectorAll('.side').length == 2")
            for key in "12012":
                time.sleep(0.5)
                tab.press(key)
            time.sleep(1)
            picture(tab, "annotation")
        finally:
            page.kill()
            page.communicate()


def main() -> None:
    """Read the command line and take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("pairs", type=Path, help="a file of pairs to annotate")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as started:
        report_pictures(started.new_tab(), arguments.report)
        annotation_picture(started.new_tab(), arguments.pairs)


if __name__ == "__main__":
    main()
