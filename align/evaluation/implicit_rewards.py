"""Implicit rewards of policies on held-out pairs, with the baseline as the reference.

Left out: the scale ``beta`` of the implicit reward, which changes no accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from align.config.evaluate import Evaluate
from align.errors import DataError
from align.evaluation.intervals import Bootstrap, means_by_prompt
from align.evaluation.results import ImplicitRewards
from align.functional import winrate
from align.models.logps import completion_logps
from align.models.policy import Policy
from align.models.prefix_sharing import wrapper
from align.runtime import distributed
from align.runtime.progress import Logger

if TYPE_CHECKING:
    from align.data.rows import Row


def pair_logps(
    name: str, policy: Policy, pairs: Sequence[Row], config: Evaluate, logger: Logger
) -> Float[Tensor, "2 pairs"]:
    """Log-probabilities of all chosen and of all rejected completions, in nats.

    NaN where the prompt fills the model's positions. The ranks share the completions. With
    ``config.prefix_sharing``, the policy computes shared prompts once from here on.
    """
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(policy.model)
    sides = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    logps = distributed.map_rows(
        sides,
        lambda rows: completion_logps(
            policy.model,
            policy.tokenizer,
            rows,
            batch_size=config.batch_size,
            max_length=getattr(policy.model.config, "max_position_embeddings", None),
            progress=partial(logger.step, unit=f"{name}: scored completion"),
        ).tolist(),
        size=None,
    )
    return torch.tensor(logps, dtype=torch.float64).view(2, -1)


def implicit_rewards(
    config: Evaluate, pairs: Sequence[Row], logps: Mapping[str, Float[Tensor, "2 pairs"]]
) -> tuple[ImplicitRewards, ...]:
    """How often the chosen completion of a pair has the higher log-ratio, for each policy.

    ``logps`` has the log-probabilities of :func:`pair_logps` for each policy and the baseline. A
    tie counts one half. Each prompt counts once, however many pairs it has. Pairs whose prompt
    fills the model's positions are counted as ``invalid`` and left out.

    Raises:
        DataError: No pair is left.
    """
    bootstrap = Bootstrap(config.confidence, config.resamples, config.seed)
    results = []
    for policy in config.policies:
        if policy == config.baseline:
            continue
        chosen, rejected = logps[policy] - logps[config.baseline]
        outcomes = winrate.outcomes(chosen[:, None], rejected[:, None])[:, 0].tolist()
        invalid = sum(map(math.isnan, outcomes))
        accuracies = means_by_prompt(pairs, outcomes)
        if not len(accuracies):
            raise DataError(
                f"all {len(pairs)} held-out pairs have a prompt that fills the positions of "
                f"`{policy}`; evaluate on data with shorter prompts"
            )
        results.append(
            ImplicitRewards(
                policy=policy,
                reference=config.baseline,
                accuracy=accuracies.mean().item(),
                ci=bootstrap.proportion(accuracies),
                mean_margin=(chosen - rejected).nanmean().item(),
                n_pairs=len(pairs) - invalid,
                n_prompts=len(accuracies),
                invalid=invalid,
            )
        )
    return tuple(results)
