"""Keys of recipes that were renamed or removed, for errors about their old names."""

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


REMOVED: dict[tuple[str, str], str] = {
    ("PPO", "kl_estimator"): (
        "the reward contains the log-ratio, k1 (k3 there has another gradient than the KL "
        "divergence and collapses the policy); remove it, or set `kl_placement: loss` to use k3"
    ),
    ("PPO", "top_p"): (
        "training samples from the whole distribution, because a truncated one moves the optimum; "
        "remove it, or lower `temperature`"
    ),
}
"""The class of a stage and a removed key → the reason and the repair."""


def hint(classes: Iterable[type[Stage] | None], key: str) -> str:
    """The end of an error message if ``key`` is the name of an old key, else nothing."""
    for name in (cls.__name__ for cls in classes if cls):
        if (name, key) in RENAMED:
            return f"; renamed to {RENAMED[name, key]}"
        if (name, key) in REMOVED:
            return f"; removed: {REMOVED[name, key]}"
    return ""
