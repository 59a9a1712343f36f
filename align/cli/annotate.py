"""The command ``align annotate``: a page where people compare completions."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli.run import Runs
from align.errors import ArtifactError, DataError, RecipeError, counted, not_installed, printable
from align.runtime import artifacts, signals
from align.runtime.environment import quiet_libraries


def annotate(
    pairs: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS_OR_RUN",
            help="A file of pairs, a prepare or evaluate stage, or a run with an evaluation.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file of decisions, NAME-annotations.jsonl."),
    ] = None,
    guideline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text that is always in view.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Of prepared data: train, validation or test.")
    ] = "train",
    n_pairs: Annotated[
        int | None, typer.Option(min=1, help="Compare this many pairs, drawn by --seed.")
    ] = None,
    overlap: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of pairs that every annotator decides.")
    ] = 0.1,
    check_every: Annotated[
        int, typer.Option(min=0, help="One attention check in so many decisions; 0 for none.")
    ] = 10,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    runs: Runs = Path("runs"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Serve a page where people compare completions by keyboard; Ctrl-C ends it.

    Decisions are written at once, and the same command continues.
    """
    from align.evaluation.annotation import pairs as annotation_pairs
    from align.evaluation.annotation import server
    from align.evaluation.annotation.decision_file import DecisionFile
    from align.evaluation.annotation.session import Session

    if importlib.util.find_spec("gradio") is None:
        raise ArtifactError(not_installed("gradio", "-e '.[annotate]'"))
    quiet_libraries()
    server.check_address(host, port, password := os.environ.get(server.PASSWORD))
    text = _read_guideline(guideline)
    name, files = find_files(pairs, runs, split)
    compared = annotation_pairs.read_pairs(files)
    target = _checked_target(out or Path(f"{name}-annotations.jsonl"), files)
    file = DecisionFile(target)
    try:
        chosen = annotation_pairs.draw(list(compared.pairs.values()), n_pairs, seed)
        session = Session(chosen, file, overlap=overlap, check_every=check_every, seed=seed)
        _announce(compared, len(chosen), file)
        server.serve(session, _wait, guideline=text, host=host, port=port, password=password)
        _show_results(session, target)
    finally:
        file.close()


def find_files(pairs: str, runs: Path, split: str) -> tuple[str, list[Path]]:
    """The files of pairs that an argument names, and a name for the file of decisions.

    Raises:
        UserError: There is no such file, folder or stage, or it has no pairs.
    """
    from align.data.tables import has_table, table_file
    from align.pipeline import lookup
    from align.report.page.contents import COMPARISONS

    path = Path(pairs).expanduser()
    if path.is_file():
        return path.name.partition(".")[0], [path]
    if (path / artifacts.SUMMARY).is_file():
        return path.name, _of_run(path)
    if not path.is_dir():
        if "/" in pairs or "." in pairs:
            raise DataError(f"{pairs}: no such file or folder")
        if (runs / pairs / artifacts.SUMMARY).is_file():
            return pairs, _of_run(runs / pairs)
        path = lookup.newest_run(
            pairs, runs, ("prepare", "label", "evaluate"), recipe="recipes/dpo.yaml"
        )
    name = path.name.rpartition("-")[0] or path.name
    if (path / COMPARISONS).is_file():
        return name, [path / COMPARISONS]
    if has_table(path, "pairs", split):
        return name, [table_file(path, "pairs", split)]
    raise DataError(
        f"{path}: neither {COMPARISONS} nor {table_file(path, 'pairs', split).name}; name a file "
        "of pairs, or a `prepare`, `label` or `evaluate` stage"
    )


def _of_run(folder: Path) -> list[Path]:
    """The compared pairs of all evaluations of a run."""
    from align.cli.comparison import stages_of_run
    from align.report.page.contents import COMPARISONS

    stages = (stages_of_run(folder) or {}).values()
    files = [place / COMPARISONS for kind, place in stages if kind == "evaluate"]
    if not files:
        raise ArtifactError(f"{folder}: this run has no `evaluate` stage; name a file of pairs")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ArtifactError(*(f"{file}: missing; run the recipe again" for file in missing))
    return files


def _checked_target(target: Path, files: list[Path]) -> Path:
    if target.exists() and any(target.samefile(file) for file in files):
        raise DataError(f"--out {target}: this is the file of pairs; name another one")
    return target


def _read_guideline(file: Path | None) -> str:
    from align.evaluation.annotation.session import GUIDELINE

    if file is None:
        return GUIDELINE
    try:
        text = file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"--guideline {file}: {reason}; name a text file") from None
    if not text:
        raise RecipeError(f"--guideline {file}: empty; write what annotators should prefer")
    return text


def _announce(compared: Any, n_chosen: int, file: Any) -> None:
    line = counted(n_chosen, "pair")
    left_out = {"equal completions": compared.n_equal, "repeated": compared.n_repeated}
    parts = [f"{count:,} {reason}" for reason, count in left_out.items() if count]
    line += f" (left out: {', '.join(parts)})" if parts else ""
    print(printable(f"{line}; decisions: {file.path}, {counted(len(file.rows), 'row')} so far"))
    if file.n_removed_bytes:
        print(
            printable(
                f"{file.path}: its last line was cut off; removed {file.n_removed_bytes} bytes"
            ),
            file=sys.stderr,
        )


def _wait(address: str) -> None:
    """Wait for Ctrl-C or SIGTERM, which end the page as usual."""
    print(printable(f"{address} (Ctrl-C ends)"), flush=True)
    try:
        threading.Event().wait()
    except (signals.Interrupted, KeyboardInterrupt):
        print(file=sys.stderr)


def _show_results(session: Any, target: Path) -> None:
    from align.evaluation.annotation.agreement import agreement_line, annotator_lines

    for line in annotator_lines(session.annotators):
        print(printable(line))
    if session.annotators:
        print(agreement_line(session.preferences()))
        print(printable(f"decisions: {target}"))
