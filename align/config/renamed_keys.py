"""Keys of recipes that were renamed in version 0.2, for errors about their old names."""

from __future__ import annotations

from collections.abc import Iterable

from align.config.base import Stage

RENAMED: dict[tuple[str, str], str] = {
    ("Control", "stretch"): "`n_steps`",
    ("Control", "envs"): "`n_envs`",
    ("Control", "hidden"): "`hidden_sizes`",
    ("Control", "whiten"): "`normalize_advantages`",
    ("Control", "lam"): "`gae_lambda`",
    ("Control", "level"): "`confidence`",
    ("PPO", "lam"): "`gae_lambda`",
    ("PPO", "whiten_advantages"): "`normalize_advantages`",
    ("PPO", "whiten_rewards"): "`normalize_rewards`",
    ("Prepare", "keep"): "`keep_columns`",
    ("Prepare", "ngram"): "`decontamination_ngram`",
    ("Evaluate", "level"): "`confidence`",
    (
        "Label",
        "labels",
    ): "`label_noise` (`label_noise: bradley_terry`; leave it out for exact labels)",
    ("Label", "slope"): "`label_noise_slope`",
}
"""The class of a stage and the old name of a key → the new name."""


def hint(classes: Iterable[type[Stage] | None], key: str) -> str:
    """The end of an error message if ``key`` is the old name of a key, else nothing."""
    for cls in classes:
        new = RENAMED.get((cls.__name__, key)) if cls else None
        if new:
            return f"; renamed to {new}"
    return ""
