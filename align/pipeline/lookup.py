"""pipeline.lookup"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.config.base import POLICY_STAGES
from align.errors import UserError, nearest
from align.models import files
from align.runtime import artifacts


def find_policy(policy: str, runs: Path) -> Path | str:
    """The folder of a policy: one named, or the newest finished stage of a name under ``runs``;
    else a Hub id.

    Raises:
        UserError: There is no such stage, or it did not finish.
    """
    folder = Path(policy).expanduser()
    if folder.is_dir():
        files.model_folder(folder)
        return folder
    if "/" in policy:
        return policy
    return newest_run(policy, runs, POLICY_STAGES, recipe="recipes/sft.yaml")


def newest_run(name: str, runs: Path, stages: Sequence[str], *, recipe: str) -> Path:
    """The newest finished stage called ``name`` of these kinds; ``recipe`` is told to whoever has
    none.

    Raises:
        UserError: There is no such stage, or it did not finish.
    """
    made = [(p, artifacts.read_artifact(p)) for p in runs.glob("*-????????????")]
    finished = [(p, a) for p, a in made if a is not None and a.stage in stages]
    mine = [p for p, a in finished if a.name == name]
    unfinished = any(a is None and p.name.startswith(f"{name}-") for p, a in made)
    if not mine:
        names = sorted({a.name for _, a in finished})
        raise UserError(
            f"{runs}: no finished policy `{name}`{' (it did not finish yet)' if unfinished else ''}"
            f"{nearest(name, names) if names else f'; run a recipe first, such as {recipe}'}"
        )
    return max(mine, key=lambda p: (p / artifacts.FILE).stat().st_mtime)


CONTROL_RECIPE = "recipes/control/cartpole_ppo.yaml"


def find_control_policy(policy: str, runs: Path) -> Path:
    """The folder of trained policies: one named, or the newest finished stage of a name under
    ``runs``.

    Raises:
        UserError: There is no such stage, it did not finish, or the folder has none.
    """
    folder = Path(policy).expanduser()
    if not folder.is_dir():
        return newest_run(policy, runs, ("control",), recipe=CONTROL_RECIPE)
    if not (folder / "policy.json").is_file():
        raise UserError(f"{folder}: no policy.json; name a `control` stage, or its folder")
    return folder
