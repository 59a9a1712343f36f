"""Keys of recipes that were renamed, removed or refused, for errors about them."""

from __future__ import annotations

from collections.abc import Iterable

from align.config.base import Stage

RENAMED: dict[tuple[str, str], str] = {
    ("PolicyGradient", "stretch"): "`n_steps`",
    ("PolicyGradient", "envs"): "`n_envs`",
    ("PolicyGradient", "hidden"): "`hidden_sizes`",
    ("PolicyGradient", "whiten"): "`normalize_advantages`",
    ("PolicyGradient", "lam"): "`gae_lambda`",
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
}
"""The class of a stage and a removed key → the reason and the repair."""


WHOLE_DISTRIBUTION = (
    "training samples from the whole distribution, as its log-probabilities are computed (a part of "
    "it would move the optimum); remove it, or lower `temperature`"
)
REFUSED: dict[tuple[str, str], str] = {
    ("OnlineRL", key): WHOLE_DISTRIBUTION
    for key in ("top_p", "top_k", "min_p", "repetition_penalty")
}
"""The class of a stage and a key that others have → why it is refused, and the repair."""


def hint(classes: Iterable[type[Stage] | None], key: str) -> str:
    """The end of an error message if ``key`` is an old or a refused key, else nothing."""
    for name in (base.__name__ for cls in classes if cls for base in cls.__mro__):
        if (name, key) in RENAMED:
            return f"; renamed to {RENAMED[name, key]}"
        if (name, key) in REMOVED:
            return f"; removed: {REMOVED[name, key]}"
        if (name, key) in REFUSED:
            return f"; {REFUSED[name, key]}"
    return ""
