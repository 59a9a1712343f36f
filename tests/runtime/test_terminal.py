"""Text from data and file names reaches no terminal with control characters."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from align.errors import DataError, printable
from align.runtime.progress import Display
from align.runtime.terminal import SafeConsole

ATTACK = "\x1b]0;title\x07\x1b[31mred\x9b2J\r\u202etxt\ud83d"
SHOWN = r"\x1b]0;title\x07\x1b[31mred\x9b2J\r\u202etxt\ud83d"
ALIGN = Path(__file__).parents[2] / "align"


def test_control_characters_are_replaced_by_their_escape_sequences():
    assert printable(ATTACK) == SHOWN
    assert printable("é\n\t☃ 日本") == "é\n\t☃ 日本"


def test_errors_and_log_records_are_printable():
    assert DataError(ATTACK, "b").lines == (SHOWN, "b")
    assert str(DataError(ATTACK)) == SHOWN
    console = SafeConsole(file=io.StringIO(), width=200)
    with Display(console):
        logging.getLogger("align").warning("%s: damaged", ATTACK)
    assert console.file.getvalue() == f"warning: {SHOWN}: damaged\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_prints_no_control_characters_of_its_content(is_terminal: bool):
    console = SafeConsole(file=io.StringIO(), width=200, force_terminal=is_terminal)
    table = Table(title=ATTACK)
    table.add_column(ATTACK)
    table.add_row(Text(ATTACK, style="bold"))
    console.print(ATTACK)
    console.print(table)
    output = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())  # the styles of the table
    assert output.isprintable() or not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output)
    assert output.count(r"\x1b]0;title") == 4


def test_a_live_display_still_moves_the_cursor():
    console = SafeConsole(file=io.StringIO(), force_terminal=True)
    with Progress(console=console) as progress:
        progress.add_task(ATTACK, total=1)
    assert "\x1b[?25l" in console.file.getvalue()
    assert "\x1b]0" not in console.file.getvalue()


def test_brackets_are_no_markup():
    console = SafeConsole(file=io.StringIO(), width=80)
    table = Table(title="runs [v1]")
    table.add_column("[red]a[/red]")
    table.add_row("b[/]")
    console.print(table)
    assert all(text in console.file.getvalue() for text in ("runs [v1]", "[red]a[/red]", "b[/]"))


def test_every_console_is_safe():
    for path in ALIGN.rglob("*.py"):
        if path.name != "terminal.py":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<!Safe)\bConsole\(", text), path
