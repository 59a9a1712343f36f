"""What the report of a run shows, read from ``summary.json`` and the folders of its stages.

Left out: the drawing (:mod:`align.report.page.figures`) and the page itself
(:mod:`align.report.page.render`).
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from align.config.stages import STAGES, stage_class
from align.errors import ArtifactError
from align.report.curves import Curves, read_curves
from align.runtime import artifacts
from align.runtime.artifacts import Artifact

FILE = "report.html"
COMPARISONS = "comparisons.parquet"
MOST_SAMPLES = 200
"""Prompts of a stage that the page shows; more of them make it slow to open."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with one completion, or with those of a policy and its baseline."""

    prompt: str
    """The whole conversation up to the completion, with the names of the roles."""
    completions: tuple[tuple[str, str], ...]
    """Names and texts."""
    label: str
    """What separates it from others: ``dpo wins``, ``tie``, ``step 10``."""
    notes: tuple[str, ...] = ()
    """Scores and the reason of a judge."""


@dataclass(frozen=True, slots=True)
class StageContents:
    """One stage of the run."""

    name: str
    folder: Path
    status: str
    """``ran`` or ``reused`` in this run."""
    artifact: Artifact
    made_from: dict[str, str]
    """Names of the stages or other models that it was made from, by the key of the input."""
    settings: dict[str, Any]
    """Settings that differ from the defaults, by dotted keys."""
    curves: Curves
    samples: tuple[Sample, ...] = ()
    card: str = ""
    """The data card of a ``prepare`` stage, as Markdown."""

    @property
    def kind(self) -> str:
        """The kind of stage."""
        return self.artifact.stage


@dataclass(frozen=True, slots=True)
class RunContents:
    """A finished run of a recipe."""

    name: str
    folder: Path
    recipe: str
    """Path of the recipe, as it was given."""
    overrides: tuple[str, ...]
    seconds: float
    stages: tuple[StageContents, ...]
    missing: tuple[str, ...] = ()
    """Stages whose folders were removed or changed."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that repeats the run, as a shell reads it; empty without a recipe file.

        The recipe of ``align eval``, or of a program, is a mapping with a name that has no suffix.
        """
        if not Path(self.recipe).suffix:
            return ""
        runs = self.folder.parent
        option = [] if runs == Path("runs") else ["--runs", str(runs)]
        return shlex.join(["align", "run", self.recipe, *self.overrides, *option])

    def of_kind(self, kind: str) -> list[StageContents]:
        """The stages of a kind."""
        return [stage for stage in self.stages if stage.kind == kind]


def read_run(folder: Path) -> RunContents:
    """Read a run from its folder, ``runs/<recipe>``.

    Raises:
        ArtifactError: The folder has no readable ``summary.json``.
    """
    file = folder / artifacts.SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        entries = [(s["name"], Path(s["folder"]).name, s["status"]) for s in summary["stages"]]
        recipe, seconds = str(summary["recipe"]), float(summary["seconds"])
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder}: no {artifacts.SUMMARY}; the report is about a finished run"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}); run its recipe again") from None
    names = {folder_name: name for name, folder_name, _ in entries}
    stages, missing = [], []
    for name, folder_name, status in entries:
        stage_folder = folder.parent / folder_name
        try:
            artifact = artifacts.read_artifact(stage_folder)
        except ArtifactError:
            artifact = None
        if artifact is None:
            missing.append(folder_name)
        else:
            stages.append(_stage(name, stage_folder, status, artifact, names))
    return RunContents(
        name=folder.name,
        folder=folder,
        recipe=recipe,
        overrides=tuple(map(str, summary.get("overrides") or ())),
        seconds=seconds,
        stages=tuple(stages),
        missing=tuple(missing),
        versions=stages[-1].artifact.versions if stages else {},
    )


def _stage(
    name: str, folder: Path, status: str, artifact: Artifact, names: Mapping[str, str]
) -> StageContents:
    sources = {key: Path(entry["folder"]).name for key, entry in artifact.inputs.items()}
    card = folder / "README.md"
    return StageContents(
        name=name,
        folder=folder,
        status=status,
        artifact=artifact,
        made_from={key: names.get(source, source) for key, source in sources.items()},
        settings=changed_settings(artifact),
        curves=read_curves(folder / "metrics.jsonl"),
        samples=tuple(_samples(folder, artifact)),
        card=card.read_text(encoding="utf-8", errors="replace")
        if artifact.stage == "prepare" and card.is_file()
        else "",
    )


def changed_settings(artifact: Artifact) -> dict[str, Any]:
    """The settings of a stage that differ from the defaults of its kind, by dotted keys."""
    defaults = {}
    if artifact.stage in STAGES:
        fields = stage_class(artifact.stage, artifact.recipe).model_fields
        for key, model_field in fields.items():
            value = model_field.get_default(call_default_factory=False)
            defaults[key] = value.model_dump() if hasattr(value, "model_dump") else value
    changed: dict[str, Any] = {}
    for key, value in artifact.recipe.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and value:
            base = default if isinstance(default, Mapping) else {}
            changed |= {f"{key}.{k}": v for k, v in value.items() if base.get(k) != v}
        elif value not in (default, None, {}, []):
            changed[key] = value
    return changed


def _samples(folder: Path, artifact: Artifact) -> Iterator[Sample]:
    """Completions that a stage wrote: compared ones, those of a training, or sampled ones."""
    if (folder / COMPARISONS).is_file():
        yield from _compared(folder / COMPARISONS)
    elif (folder / "samples.jsonl").is_file():
        yield from _trained(folder / "samples.jsonl")
    elif artifact.stage == "sample":
        for file in sorted(folder.glob("completions-*.parquet")):
            yield from _sampled(file)


def _sampled(file: Path) -> Iterator[Sample]:
    """The completions of each prompt of a ``sample`` stage, which follow each other."""
    for _, rows in itertools.islice(
        itertools.groupby(read_rows(file), key=itemgetter("prompt_id")), MOST_SAMPLES
    ):
        group = list(rows)
        unfinished = sum(not row["finished"] for row in group)
        yield Sample(
            prompt=transcript(group[0]["prompt"]),
            completions=tuple(
                (f"completion {number}", transcript(row["completion"]).removeprefix("assistant: "))
                for number, row in enumerate(group, 1)
            ),
            label="cut off" if unfinished else "finished",
            notes=(f"{unfinished} of {len(group)} without an end token",) if unfinished else (),
        )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file of a stage.

    Raises:
        ArtifactError: The file is damaged.
    """
    import pyarrow.parquet as parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors of a damaged file are ValueErrors
        reason = " ".join(str(error).split())[:80]
        raise ArtifactError(
            f"{file}: cannot be read ({reason}); run its stage with --force"
        ) from None
    return rows


def _compared(file: Path) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    for row in read_rows(file):
        policy, baseline = row["policy"], row["baseline"]
        seen[policy] = seen.get(policy, 0) + 1
        if seen[policy] > MOST_SAMPLES or policy.endswith(" again"):
            continue
        notes = [f"judge {row['judge']}"]
        for side in ("policy", "baseline"):
            score = row.get(f"{side}_score")
            if score is not None:
                notes.append(f"{row[side]}: score {score:.3g}")
        if row.get("reason"):
            notes.append(str(row["reason"]))
        yield Sample(
            prompt=transcript(row.get("messages") or row["prompt"]),
            completions=(
                (policy, row["policy_completion"] or ""),
                (baseline, row["baseline_completion"] or ""),
            ),
            label=_outcome(row["outcome"], policy, baseline),
            notes=tuple(notes),
        )


def _outcome(outcome: float | None, policy: str, baseline: str) -> str:
    if outcome is None or outcome != outcome:
        return "no verdict"
    if outcome == 0.5:
        return "tie"
    return f"{policy} wins" if outcome > 0.5 else f"{baseline} wins"


def _trained(file: Path) -> Iterator[Sample]:
    for row in read_jsonl(file)[-MOST_SAMPLES:]:
        scores = [
            f"{key} {value:.3g}"
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float)
        ]
        yield Sample(
            prompt=transcript(row.get("prompt", "")),
            completions=(("completion", str(row.get("completion", ""))),),
            label=f"step {row.get('step')}",
            notes=tuple(scores),
        )


def transcript(prompt: object) -> str:
    """A prompt as text: the turns of a conversation with the names of their roles.

    >>> transcript([{"role": "user", "content": "Hi"}])
    'user: Hi'
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return str(prompt)
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in prompt)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; a line that was cut off is left out."""
    rows = []
    # Only at newlines: `splitlines` splits at separators inside of texts as well.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
