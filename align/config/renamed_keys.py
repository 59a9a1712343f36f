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
    ("OnlineRL", "whiten_advantages"): "`normalize_advantages`",
    ("OnlineRL", "whiten_rewards"): "`normalize_rewards`",
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
    ("OnlineRL", "advantages"): (
        "the kind of the stage is the estimator; remove it, and write `stage: ppo` (GAE), "
        "`stage: grpo`, `stage: rloo` or `stage: reinforce`"
    ),
    ("OnlineRL", "kl_estimator"): (
        "the reward contains the log-ratio, k1 (k3 there has another gradient than the KL "
        "divergence and collapses the policy); remove it, or set `kl_placement: loss` to use k3"
    ),
    ("OnlineRL", "top_p"): (
        "training samples from the whole distribution, because a truncated one moves the optimum; "
        "remove it, or lower `temperature`"
    ),
}
"""The class of a stage and a removed key → the reason and the repair."""


def hint(classes: Iterable[type[Stage] | None], key: str) -> str:
    """The end of an error message if ``key`` is the name of an old key, else nothing."""
    for name in (base.__name__ for cls in classes if cls for base in cls.__mro__):
        if (name, key) in RENAMED:
            return f"; renamed to {RENAMED[name, key]}"
        if (name, key) in REMOVED:
            return f"; removed: {REMOVED[name, key]}"
    return ""
