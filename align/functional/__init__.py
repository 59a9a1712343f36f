"""Pure functions of tensors: losses, returns, advantages and statistics of win rates.

They use no configuration, model, device or global random state. The names below are part of the
public Python API.
"""

from align.functional.agreement import (
    cohen_kappa,
    consistency,
    detectable_difference,
    krippendorff_alpha,
    length_bias,
    position_bias,
    self_agreement,
)
from align.functional.best_of_n import best_of_n_accuracy, best_of_n_kl, best_of_n_values
from align.functional.bradley_terry import bradley_terry_strengths, holm_adjusted, win_matrix
from align.functional.constrained import ascended_multiplier, penalized_advantages
from align.functional.dynamic_programming import (
    action_values,
    improved_policy,
    iterated_policy_values,
    policy_values,
)
from align.functional.intervals import bootstrap_interval, proportion_interval
from align.functional.length_control import length_controlled_win_rate, length_controlled_win_rates
from align.functional.masked import masked_scale, masked_var, masked_whiten
from align.functional.offline import advantage_weights, expectile_loss
from align.functional.overoptimization import fit_overoptimization, overoptimization_gain
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
from align.functional.prediction_powered import prediction_powered_mean
from align.functional.preference import bradley_terry_loss, dpo_loss, kto_loss
from align.functional.returns import discounted_returns, gae
from align.functional.sequential import decline_e_values
from align.functional.token_rewards import (
    completion_gae,
    leave_one_out,
    rewards_to_go,
    token_rewards,
)
from align.functional.winrate import (
    missing_bounds,
    outcomes,
    paired_permutation_p_value,
    win_rate,
    win_rate_p_value,
)

__all__ = [
    "action_values",
    "adaptive_kl_coef",
    "advantage_weights",
    "ascended_multiplier",
    "best_of_n_accuracy",
    "best_of_n_kl",
    "best_of_n_values",
    "bootstrap_interval",
    "bradley_terry_loss",
    "bradley_terry_strengths",
    "clipped_surrogate_loss",
    "clipped_value_loss",
    "cohen_kappa",
    "completion_gae",
    "consistency",
    "decline_e_values",
    "detectable_difference",
    "discounted_returns",
    "dpo_loss",
    "entropy",
    "expectile_loss",
    "explained_variance",
    "fit_overoptimization",
    "gae",
    "holm_adjusted",
    "importance_ratio",
    "importance_weights",
    "improved_policy",
    "iterated_policy_values",
    "kl_k1",
    "kl_k3",
    "kl_loss",
    "krippendorff_alpha",
    "kto_loss",
    "leave_one_out",
    "length_bias",
    "length_controlled_win_rate",
    "length_controlled_win_rates",
    "masked_scale",
    "masked_var",
    "masked_whiten",
    "missing_bounds",
    "outcomes",
    "overoptimization_gain",
    "paired_permutation_p_value",
    "penalized_advantages",
    "policy_values",
    "position_bias",
    "prediction_powered_mean",
    "proportion_interval",
    "reinforce_loss",
    "rewards_to_go",
    "self_agreement",
    "token_rewards",
    "win_matrix",
    "win_rate",
    "win_rate_p_value",
]
