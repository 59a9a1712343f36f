"""Watch a policy of ``control`` play: in a window, or as a GIF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import UserError


def play(folder: Path, *, gif: Path | None, episodes: int, seed: int | None) -> None:
    """Play episodes of the policy that ``seed`` trained, and say what each returned.

    Raises:
        UserError: There is no such seed, the environment cannot be made or drawn, or the file cannot be written.
    """
    config = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    seeds = [s for s in config["seeds"] if (folder / f"policy-{s}.safetensors").is_file()]
    if not seeds or seed not in (None, *seeds):
        found = ", ".join(map(str, seeds)) or "none"
        raise UserError(f"{folder}: no policy of seed {seed}; found {found}")
    chosen = seeds[0] if seed is None else seed
    if gif is not None and (gif.suffix.lower() != ".gif" or not gif.absolute().parent.is_dir()):
        raise UserError(f"--gif {gif}: expected a file that ends in .gif, in a folder that exists")
    from align.control import policy_files, spaces

    render = "human" if gif is None else "rgb_array"
    options = {**config["options"], "render_mode": render}
    try:
        spaces.inspect_env(config["environment"], options, config["distribution"])
    except spaces.UnfitError as error:
        raise UserError(f"{folder}: {error}") from None

    frames: list[Any] = []
    trained = policy_files.load(folder, chosen)
    try:
        for played in policy_files.watch(trained, render=render, episodes=episodes, seed=chosen):
            frames += [played.frame] if gif is not None else []
            if played.returned is not None:
                print(f"{config['environment']}, seed {chosen}: return {played.returned:.1f}")
    except policy_files.cannot_render() as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"nothing can be drawn here ({told}); write a file with --gif FILE"
        ) from None
    if gif is not None:
        policy_files.write_gif(frames, gif, fps=policy_files.frames_a_second(trained))
        print(f"{gif}: {len(frames)} frames, {gif.stat().st_size / 1e6:.1f} MB")
