"""Progress of a run: ``metrics.jsonl`` in a stage's folder, and the display on the terminal.

On a terminal the display is one live progress bar; elsewhere (CI, a log file) it is plain lines.
Experiment trackers such as TensorBoard are in :mod:`align.runtime.tracking`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import printable
from align.runtime.durations import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


SECONDS_BETWEEN_LINES = 5.0
LOGGER = logging.getLogger("align")


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


LOGGER.addFilter(_make_printable)


def truncate_jsonl(path: Path, after_step: int) -> None:
    """Drop the lines of a JSONL file with a ``step`` after ``after_step``, and incomplete lines.

    A resumed run writes the dropped lines again. The file is replaced atomically; a missing file
    stays missing. Other lines without a step are dropped with a warning.
    """
    if not path.exists():
        return
    *lines, last = path.read_bytes().split(b"\n")  # the last one is empty, or was cut off by a kill
    steps = [_step(line) for line in lines]
    if steps.count(None):
        LOGGER.warning("%s: %d damaged lines removed", path, steps.count(None))
    kept = [
        line + b"\n"
        for line, step in zip([*lines, last], [*steps, _step(last)], strict=True)
        if step is not None and step <= after_step
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def _step(line: bytes) -> float | None:
    """The step of a line of JSON; None if it has none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int | float) else None


def numbers(metrics: Mapping[str, Any]) -> str:
    """Format numeric metrics on one line, by the last part of their keys.

    >>> numbers({"loss": 0.53124, "rewards/accuracies": 0.84, "done": True})
    'loss 0.5312  accuracies 0.84'
    """
    return "  ".join(
        f"{key.rpartition('/')[2]} {value:.4g}"
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )


class _DisplayHandler(logging.Handler):
    """Prints the records of the ``align`` logger through a display."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname.lower()}: {line}"
        self._display.info(line)


@dataclass(frozen=True, slots=True)
class _Pace:
    """The first report about some units of a stage, from which the time that is left follows.

    Whatever comes before it is not counted: start-up, and the steps before a resumed run.
    """

    of: tuple[str, str, int]
    """Stage, unit and number of units."""
    done: int
    at: float

    def left(self, done: int, now: float) -> str:
        """The time that is left at this pace, as the end of a text; empty if there is none."""
        total = self.of[2]
        if not self.done < done < total:
            return ""
        seconds = (now - self.at) * (total - done) / (done - self.done)
        return f", about {duration(seconds)} left"


class Display:
    """Plain lines: progress at most every few seconds. Base class of :class:`LiveDisplay`.

    Between ``__enter__`` and ``__exit__`` it also shows the records of
    ``logging.getLogger("align")``.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._handler = _DisplayHandler(self)
        self._last = 0.0
        self._started: dict[str, float] = {}
        self._pace: _Pace | None = None

    def __enter__(self) -> Display:
        LOGGER.addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self._handler)

    def info(self, line: str) -> None:
        """Print one permanent line."""
        self.console.print(line, soft_wrap=True)

    def start(self, name: str, folder: Path, status: str) -> None:
        """Show that a stage begins; ``status`` is "running" or "resuming"."""
        self._started[name] = time.monotonic()
        self.info(f"{name}: {status} → {folder}")

    def step(
        self, name: str, done: int, total: int, metrics: Mapping[str, Any], unit: str = "step"
    ) -> None:
        """Show that a stage has done ``done`` of ``total`` units, such as steps."""
        now = time.monotonic()
        if self._pace is None or self._pace.of != (name, unit, total) or done < self._pace.done:
            self._pace = _Pace((name, unit, total), done, now)
        if now - self._last >= SECONDS_BETWEEN_LINES or done == total:
            self._last = now
            spent = f"{now - self._started[name]:.0f} s{self._pace.left(done, now)}"
            self.info(f"{name}: {unit} {done}/{total}  {spent}  {numbers(metrics)}".rstrip())

    def end(self, name: str, status: str, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Show that a stage is finished; ``status`` is "ran" or "reused"."""
        self.info(f"{name}: {status}  {seconds:.1f} s  {numbers(metrics)}".rstrip())


class LiveDisplay(Display):
    """A progress bar for the running stage, on a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__(console)
        self._progress: Progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", style="dim"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._progress.stop()

    def start(self, name: str, folder: Path, status: str) -> None:
        """Show that a stage begins; ``status`` is "running" or "resuming"."""
        self._task = self._progress.add_task(name, total=None, numbers=status)

    def step(
        self, name: str, done: int, total: int, metrics: Mapping[str, Any], unit: str = "step"
    ) -> None:
        """Show that a stage has done ``done`` of ``total`` units, such as steps."""
        if self._task is not None:
            text = numbers(metrics) if unit == "step" else unit
            self._progress.update(self._task, completed=done, total=total, numbers=text)

    def end(self, name: str, status: str, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Show that a stage is finished; ``status`` is "ran" or "reused"."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        mark = "[dim]=[/]" if status == "reused" else "[green]✓[/]"
        spent = "" if status == "reused" else f"{seconds:7.1f} s"
        self.console.print(
            f"{mark} [bold]{name:<12}[/] {status:<7}{spent:>10}  [dim]{numbers(metrics)}[/]",
            markup=True,
        )


class NullDisplay(Display):
    """The display of every rank but rank 0: shows nothing."""

    def __init__(self) -> None:
        from align.runtime.terminal import SafeConsole

        super().__init__(SafeConsole(quiet=True))


def display() -> Display:
    """The display that suits standard output."""
    from align.runtime import distributed
    from align.runtime.terminal import SafeConsole

    if not distributed.is_main():
        return NullDisplay()
    console = SafeConsole()
    return LiveDisplay(console) if console.is_terminal else Display(console)


class Logger:
    """Reports the progress of a stage to ``metrics.jsonl`` (rank 0 only) and to the display.

    ``watch(step, metrics)`` returns warnings about what has been logged so far.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        display: Display,
        *,
        main: bool,
        watch: Callable[[int, Mapping[str, Any]], Iterable[str]] | None = None,
    ) -> None:
        self.name, self._display, self._watch = name, display, watch
        self._file = folder / "metrics.jsonl" if main else None
        self._forward: Callable[[int, Mapping[str, Any]], None] | None = None

    def step(
        self,
        done: int,
        total: int,
        metrics: Mapping[str, Any] | None = None,
        *,
        unit: str = "step",
    ) -> None:
        """Show that ``done`` of ``total`` units, such as steps, are done."""
        if self._file is not None:
            self._display.step(self.name, done, total, metrics or {}, unit)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of a step to ``metrics.jsonl``."""
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            if self._forward is not None:
                self._forward(step, metrics)
            for line in self._watch(step, metrics) if self._watch is not None else ():
                self._display.info(f"{self.name}: warning: {line}")

    @contextlib.contextmanager
    def forwarded(self, send: Callable[[int, Mapping[str, Any]], None]) -> Iterator[None]:
        """Inside this block, ``send(step, metrics)`` is called with what is logged, on rank 0."""
        self._forward = send
        try:
            yield
        finally:
            self._forward = None

    def rewind(self, step: int) -> None:
        """Remove the metrics after ``step``; a resumed run writes them again."""
        if self._file is not None:
            truncate_jsonl(self._file, step)

    def info(self, line: str) -> None:
        """Print one permanent line."""
        self._display.info(line)
