"""``align play``: show a policy of a ``control`` stage in a window, or write a GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.errors import ArtifactError, UserError, printable


def play(folder: Path, *, gif: Path | None, episodes: int, seed: int | None) -> None:
    """Play greedy episodes of one policy and print their returns.

    ``seed`` selects the policy that was trained with it; None selects the first. With ``gif``, the
    episodes are written to that file.

    Raises:
        UserError: The folder has no policy of this seed, the environment cannot be built or
            rendered, or the file cannot be written.
    """
    from align.config.base import GymEnvironment
    from align.control import policy_files, spaces

    seeds = policy_files.seeds(folder)
    if not seeds or seed not in (None, *seeds):
        listed = ", ".join(map(str, seeds)) or "none"
        raise ArtifactError(f"{folder}: no policy of seed {seed}; found {listed}")
    selected = seeds[0] if seed is None else seed
    if gif is not None and (gif.suffix.lower() != ".gif" or not gif.absolute().parent.is_dir()):
        raise UserError(f"--gif {gif}: expected a file name ending in .gif, in an existing folder")
    trained = policy_files.load(folder, selected)
    render_mode = "human" if gif is None else "rgb_array"
    try:
        options = {**trained.options, "render_mode": render_mode}
        needs = ("several agents",) if trained.n_agents > 1 else ()
        spaces.inspect_env(GymEnvironment(trained.environment, options, needs=needs))
    except spaces.UnfitError as error:
        raise UserError(f"{folder}: {error}") from None

    images: list[Any] = []
    try:
        frames = policy_files.play_episodes(
            trained, render_mode=render_mode, episodes=episodes, seed=selected
        )
        for frame in frames:
            if gif is not None:
                images.append(frame.image)
            if frame.episode_return is not None:
                name = printable(trained.environment)
                print(f"{name}, seed {selected}: return {frame.episode_return:.1f}")
    except policy_files.render_errors() as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{trained.environment}: cannot open a window ({reason}); write a file with --gif FILE"
        ) from None
    if gif is not None:
        policy_files.write_gif(images, gif, fps=policy_files.frames_per_second(trained))
        print(f"{printable(str(gif))}: {len(images)} frames, {gif.stat().st_size / 1e6:.1f} MB")
