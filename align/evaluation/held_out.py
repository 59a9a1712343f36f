"""Held-out rows of prepared data, and the check that no evaluated model was trained on them.

The check follows the lineage of a model through the artifacts of its stages. Left out: models from
elsewhere, whose training data is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from align.config.evaluate import Evaluate
from align.config.stages import STAGES
from align.data import tables
from align.data.rows import Row
from align.errors import ArtifactError, DataError
from align.models import gguf_files
from align.runtime import artifacts

Sources = Mapping[str, Path | str]
"""Folder or Hub id of each evaluated model, by name."""

PREFERENCES = ("pairs", "unpaired")
"""Kinds of tables with preferences."""
STAGE_FOLDER = re.compile(r"-[0-9a-f]{12}$")  # ends in the digest of a stage


def read_held_out(data: Path, kind: str, config: Evaluate, sources: Sources) -> list[Row]:
    """Rows of the first ``config.n_prompts`` prompts of a held-out table, in file order.

    Raises:
        DataError: The table is missing, or a model was trained on one of the prompts.
        ArtifactError: The training data of a model is missing.
    """
    rows = tables.read(data, kind, config.split)
    prompt_ids = dict.fromkeys(row["prompt_id"] for row in rows)
    selected = set(list(prompt_ids)[: config.n_prompts])
    rows = [row for row in rows if row["prompt_id"] in selected]
    check_not_trained_on(rows, data, sources)
    return rows


def check_not_trained_on(rows: Sequence[Row], data: Path, sources: Sources) -> None:
    """Check that no model in the lineage of ``sources`` was trained on a prompt of ``rows``.

    Raises:
        DataError: A model was trained on at least one of the prompts.
        ArtifactError: The training data of a model is missing.
    """
    for name, source in sources.items():
        for file, n_shared, n_prompts in trained_prompts(rows, Path(source)):
            raise DataError(
                f"{n_shared} of {n_prompts} held-out prompts of {data} are in the training data of "
                f"`{name}` ({file}); use a held-out split of the `prepare` stage that the model was "
                "trained on"
            )


def trained_prompts(rows: Sequence[Row], model: Path) -> Iterator[tuple[Path, int, int]]:
    """Training tables in the lineage of a model that have prompts of ``rows``.

    Each with the number of such prompts, and that of all prompts of ``rows``.
    """
    held_out = {row["prompt_id"] for row in rows}
    for folder, kind in sorted(training_tables(model)):
        shared = held_out & _prompt_ids(folder, kind)
        if shared:
            yield tables.table_file(folder, kind, "train"), len(shared), len(held_out)


def _prompt_ids(folder: Path, kind: str) -> set[str]:
    return {row["prompt_id"] for row in tables.read(folder, kind, "train", columns=["prompt_id"])}


def policies_with_data_of(judge: Path, sources: Sources) -> list[str]:
    """Policies in whose lineage a model learned preferences about prompts of the judge's.

    Such a judge is no independent evidence. The prompts are compared, not the folders: data may be
    prepared twice. Demonstrations do not count.
    """

    def learned(source: Path | str) -> set[str]:
        found = [table for table in training_tables(Path(source)) if table[1] in PREFERENCES]
        return set().union(*(_prompt_ids(*table) for table in found))

    of_judge = learned(judge)
    return [name for name, source in sources.items() if of_judge & learned(source)]


def training_tables(folder: Path) -> set[tuple[Path, str]]:
    """Folder and kind of every training table in the lineage of a stage.

    The lineage includes initial models, reward models, and the policy and judge behind labels. A
    folder without an artifact is a model from elsewhere and has none.

    Raises:
        ArtifactError: The folder of a stage in the lineage is missing, or its data are damaged.
    """
    artifact = artifacts.read_artifact(folder) if folder.is_dir() else None
    if artifact is None or artifact.stage == gguf_files.KIND:
        return set()
    if artifact.stage not in STAGES:
        raise ArtifactError(f"{folder / artifacts.FILE}: unknown kind of stage `{artifact.stage}`")
    stage = STAGES[artifact.stage]
    lineage: set[tuple[Path, str]] = set()
    for name, entry in artifact.inputs.items():
        source = Path(entry["folder"])
        if not source.is_dir():
            source = folder.parent / source.name  # the runs folder was moved
        if not source.is_dir() and STAGE_FOLDER.search(source.name):
            raise ArtifactError(
                f"{folder}: its input {entry['folder']} is missing, so its training prompts are "
                "unknown; restore that folder, or run the whole recipe again with `--force all`"
            )
        if not source.is_dir():
            continue  # a Hub id
        lineage |= training_tables(source)
        if stage.trains_model:
            kinds = [table.kind for table in stage.reads if table.input == name]
            read = {(source, kind) for kind in kinds if tables.has_table(source, kind, "train")}
            if read - lineage:
                artifacts.check_folder(source)
            lineage |= read
    return lineage
