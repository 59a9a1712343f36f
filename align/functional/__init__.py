"""Pure functions of tensors: losses, returns, advantages and statistics of win rates.

They use no configuration, model, device or global random state. The names below are part of the
public Python API.
"""

from align.functional.masked import masked_scale, masked_var, masked_whiten
from align.functional.policy_gradient import (
    adaptive_kl_coef,
    clipped_surrogate_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
    importance_ratio,
    importance_weights,
    kl_k1,
    kl_k3,
    kl_loss,
    reinforce_loss,
)
from align.functional.preference import bradley_terry_loss, dpo_loss, kto_loss
from align.functional.returns import discounted_returns, gae
from align.functional.token_rewards import (
    completion_gae,
    leave_one_out,
    rewards_to_go,
    token_rewards,
)
from align.functional.winrate import (
    bootstrap_interval,
    length_controlled_win_rate,
    outcomes,
    paired_permutation_p_value,
    proportion_interval,
    win_rate,
    win_rate_p_value,
)

__all__ = [
    "adaptive_kl_coef",
    "bootstrap_interval",
    "bradley_terry_loss",
    "clipped_surrogate_loss",
    "clipped_value_loss",
    "completion_gae",
    "discounted_returns",
    "dpo_loss",
    "entropy",
    "explained_variance",
    "gae",
    "importance_ratio",
    "importance_weights",
    "kl_k1",
    "kl_k3",
    "kl_loss",
    "kto_loss",
    "leave_one_out",
    "length_controlled_win_rate",
    "masked_scale",
    "masked_var",
    "masked_whiten",
    "outcomes",
    "paired_permutation_p_value",
    "proportion_interval",
    "reinforce_loss",
    "rewards_to_go",
    "token_rewards",
    "win_rate",
    "win_rate_p_value",
]
