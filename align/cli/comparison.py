"""Names of the command line as finished stages, and the recipe of an evaluation of policies.

Names are looked up in the run that is named first, then in the lineage of the policies, and then
among all finished stages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from align.config.base import FUNCTION
from align.config.functions import BUILT_IN
from align.config.recipe import Recipe, read_recipe
from align.config.stages import STAGES
from align.config.yaml_loader import scalar
from align.data import annotation_files
from align.errors import ArtifactError, UserError, did_you_mean
from align.models import gguf_files
from align.pipeline import lookup
from align.runtime import artifacts

KEY = re.compile(r"\w+(\.\w+)*=")  # of an argument KEY=VALUE
_RECIPES = {"prepare": "recipes/sft.yaml", "reward": "recipes/ppo.yaml"}  # that have the stage
COMPLETIONS = ("prepare", "sample", "label")
"""Kinds of stages that a reward model can be measured on."""


@dataclass(slots=True)
class FinishedStages:
    """Finished stages by name: those of one run or lineage, then the newest in the runs folder.

    Names that are not found are collected in ``problems``.
    """

    runs: Path
    of_run: Mapping[str, tuple[str, Path]] = field(default_factory=dict)
    """Kind and folder of the stages of the run that is named first, then of the lineage."""
    problems: list[str] = field(default_factory=list)

    def prefer_lineage(self, sources: Sequence[str]) -> None:
        """Look up later names among the stages that these models were made from first."""
        for artifact, folder in (each for source in sources for each in _lineage(source)):
            self.of_run = {artifact.name: (artifact.stage, folder), **self.of_run}

    def policy(self, name: str) -> str:
        """A policy: a file of completions or a GGUF file as it is, a folder or a Hub id."""
        if name in self.of_run:
            return str(self.of_run[name][1])
        if name.endswith(".jsonl"):
            if not Path(name).is_file():
                self.problems.append(f"{name}: no such file of completions")
            return name
        if gguf_files.is_gguf(name):  # converted when the comparison runs
            return name
        return self._collect(lambda: str(lookup.find_policy(name, self.runs)), name)

    def stage(self, name: str, *kinds: str) -> str:
        """The folder of a stage of one of these kinds; a path or a Hub id as it is."""
        if self.of_run.get(name, ("",))[0] in kinds:
            return str(self.of_run[name][1])
        if "/" in name or Path(name).expanduser().exists():
            return name
        recipe = _RECIPES[kinds[0]]
        return self._collect(
            lambda: str(lookup.newest_run(name, self.runs, kinds, recipe=recipe)), name
        )

    def judge(self, text: str) -> Any:
        """A judge as in a recipe: a name, or a mapping for functions, annotations and servers."""
        if text == "gold":
            return text
        if text.lstrip().startswith("{"):
            return scalar(text)
        if text in BUILT_IN or FUNCTION.match(text):
            return {"function": text}
        if text.lower().endswith(annotation_files.SUFFIXES):
            return {"annotations": text}
        if "/" not in text and not Path(text).exists() and (hint := did_you_mean(text, ["gold"])):
            self.problems.append(f"--judge: no judge `{text}`{hint}")
            return text
        return self.stage(text, "reward")

    def policies_of_run(self) -> list[str]:
        """The folders of all policies of the run."""
        return [
            str(folder)
            for kind, folder in self.of_run.values()
            if kind in STAGES and STAGES[kind].writes_policy
        ]

    def _collect(self, find: Callable[[], str], name: str) -> str:
        try:
            return find()
        except UserError as error:
            self.problems += error.lines
            return name

    def raise_problems(self) -> None:
        """Report the names that were not found.

        Raises:
            UserError: There is at least one.
        """
        if self.problems:
            raise UserError(*dict.fromkeys(self.problems))


def comparison_recipe(
    arguments: Sequence[str],
    *,
    baseline: str,
    judges: Sequence[str],
    prompts: str | None,
    runs: Path,
) -> Recipe:
    """A recipe with one ``evaluate`` stage.

    ``arguments`` are a run or a policy, further policies, and keys of ``evaluate``. Of a run
    without named policies, all are compared. Without ``prompts``, the held-out prompts are those of
    the prepared data that the policies were trained on.

    Raises:
        UserError: One line for each name that is not found.
    """
    names = [argument for argument in arguments if not KEY.match(argument)]
    keys = [argument for argument in arguments if KEY.match(argument)]
    if not names:
        raise UserError("no policy; name a run or a policy first, such as `align eval dpo`")
    of_run = stages_of_run(Path(names[0]).expanduser())
    stages = FinishedStages(runs, of_run or {})
    if of_run is not None:
        del names[0]
    policies = [stages.policy(name) for name in names]
    stages.prefer_lineage(policies)
    compared = "reference" if baseline == "reference" else stages.policy(baseline)
    if not names:
        policies = [policy for policy in stages.policies_of_run() if policy != compared]
        if not policies:
            stages.problems.append(f"{arguments[0]}: no policy but the baseline; name another one")
    judged = [stages.judge(judge) for judge in judges]
    data = stages.stage(prompts, "prepare") if prompts else _prepared([*policies, compared])
    if data is None and not stages.problems:
        stages.problems.append(
            "--prompts: missing, because the policies were not trained on prepared data; name a "
            "`prepare` stage or its folder"
        )
    stages.raise_problems()
    settings: dict[str, Any] = {"policies": policies, "baseline": compared, "prompts": data}
    if judged:
        settings["judge"] = judged if len(judged) > 1 else judged[0]
    title = re.sub(r"[^A-Za-z0-9]+", "-", "-".join([*map(_short, policies), _short(compared)]))
    recipe = {"stages": {"evaluate": settings}}
    return read_recipe(recipe, [f"evaluate.{key}" for key in keys], name=f"eval-{title[:80]}")


def stages_of_run(folder: Path) -> dict[str, tuple[str, Path]] | None:
    """Kind and folder of the finished stages of a run or of a runs folder, by name.

    None if the folder is neither.

    Raises:
        ArtifactError: The summary of a run, or a stage, is damaged.
    """
    file = folder / artifacts.SUMMARY
    if file.is_file():
        try:
            stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
            listed = {str(s["name"]): (str(s["stage"]), Path(s["folder"])) for s in stages}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ArtifactError(f"{file}: damaged; run the recipe again") from None
        beside = {name: folder.parent / target.name for name, (_, target) in listed.items()}
        return {  # beside the run first: it may be a copy
            name: (kind, beside[name] if beside[name].is_dir() else target)
            for name, (kind, target) in listed.items()
        }
    if (folder / artifacts.FILE).is_file():
        return None  # a stage
    finished = [
        (artifacts.finish_order(stage, artifact), stage, artifact)
        for stage in (file.parent for file in folder.glob(f"*-????????????/{artifacts.FILE}"))
        if (artifact := artifacts.read_artifact(stage)) and artifact.stage != gguf_files.KIND
    ]
    finished.sort(key=itemgetter(0, 1))
    return {artifact.name: (artifact.stage, stage) for _, stage, artifact in finished} or None


def _prepared(sources: Sequence[str]) -> str | None:
    """The prepared data that the first of the sources with a lineage was trained on."""
    for artifact, folder in (each for source in sources for each in _lineage(source)):
        if artifact.stage in STAGES and STAGES[artifact.stage].prepares_data:
            return str(folder)
    return None


def _lineage(source: str) -> Iterator[tuple[artifacts.Artifact, Path]]:
    """A stage and the stages that it was made from, the nearest first."""
    pending = [Path(source).expanduser()]
    for folder in pending:  # it grows: breadth first
        artifact = artifacts.read_artifact(folder) if folder.is_dir() else None
        if artifact is None:
            continue
        yield artifact, folder
        for entry in artifact.inputs.values():
            target = Path(entry["folder"])
            target = target if target.is_dir() else folder.parent / target.name
            if target not in pending:  # of rounds that name each other's stages, each one once
                pending.append(target)


def _short(source: str) -> str:
    """The name of a stage without the digest of its folder."""
    return re.sub(
        r"-[0-9a-f]{12}$",
        "",
        Path(source).name.removesuffix(".jsonl").removesuffix(gguf_files.SUFFIX),
    )
