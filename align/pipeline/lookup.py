"""Finished stages by their names, for the commands that use a trained policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.config.base import Input
from align.config.stages import accepted_kinds
from align.errors import ArtifactError, nearest
from align.models import files
from align.runtime import artifacts, hub

CONTROL_RECIPE = "recipes/control/cartpole_ppo.yaml"
POLICY_RECIPE = "recipes/sft.yaml"


def find_policy(policy: str, runs: Path) -> Path | str:
    """The folder of a policy: a folder, or the newest finished stage of that name; else a Hub id.

    Raises:
        UserError: The folder has no model, no finished stage in ``runs`` has this name, or the
            model is not cached and the Hub cannot be reached.
    """
    folder = Path(policy).expanduser()
    if folder.is_dir():
        files.check_model_folder(folder)
        return folder
    if "/" in policy:
        hub.check_model(policy)
        return policy
    return newest_run(policy, runs, accepted_kinds(Input(policies=True)), recipe=POLICY_RECIPE)


def find_control_policy(policy: str, runs: Path) -> Path:
    """The folder of the policies of a ``control`` stage, or of the newest of that name.

    Raises:
        UserError: The folder has no policy, or no finished stage in ``runs`` has this name.
    """
    folder = Path(policy).expanduser()
    if not folder.is_dir():
        return newest_run(policy, runs, ("control",), recipe=CONTROL_RECIPE)
    if not (folder / "policy.json").is_file():
        raise ArtifactError(f"{folder}: no policy.json; name a `control` stage, or its folder")
    return folder


def newest_run(name: str, runs: Path, kinds: Sequence[str], *, recipe: str) -> Path:
    """The folder of the newest finished stage called ``name``, of one of these kinds.

    ``recipe`` is suggested if there is no finished stage at all.

    Raises:
        ArtifactError: No finished stage has this name.
    """
    folders = [(path, artifacts.read_artifact(path)) for path in runs.glob("*-????????????")]
    finished = [(path, artifact) for path, artifact in folders if artifact is not None]
    policies = [(path, artifact) for path, artifact in finished if artifact.stage in kinds]
    matching = [path for path, artifact in policies if artifact.name == name]
    if matching:
        return max(matching, key=lambda path: (path / artifacts.FILE).stat().st_mtime)
    started = any(a is None and path.name.startswith(f"{name}-") for path, a in folders)
    names = sorted({artifact.name for _, artifact in policies})
    hint = nearest(name, names) if names else f"; run a recipe first, such as {recipe}"
    raise ArtifactError(
        f"{runs}: no finished policy `{name}`{' (it is not finished yet)' if started else ''}{hint}"
    )
