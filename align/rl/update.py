"""One update of a policy, and of its critic if there is one, from a rollout.

REINFORCE, A2C and PPO are settings of it:

| | epochs x minibatches | clip | rollout |
|---|---|---|---|
| REINFORCE | 1 x 1 | none | advantages with lam = 1, no values or those of a baseline |
| A2C | 1 x 1 | none | values and returns |
| PPO | k x m | epsilon | values and returns |

**Checkpoints.** No state is kept between two calls. The next update depends on the weights, the
optimizer's state, the generator's state (``generator.get_state()``) and the caller's counters: a
run resumed from these four is bitwise the uninterrupted run.

**Several ranks.** Every rank calls with the same number of rows and a model whose backward pass
averages gradients over the ranks (as DistributedDataParallel does). Lengths and masks may differ.

Left out: schedules (the optimizer has the learning rate), penalties inside the reward (the rollout
has them), sampling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.masked import masked_whiten, max_over_ranks, ranks, sum_over_ranks
from align.functional.policy_gradient import (
    clipped_value_loss,
    explained_variance,
    importance_ratio,
    kl_k3,
    sequence_logps,
)
from align.rl.objective import Objective
from align.rl.policy_losses import policy_losses
from align.rl.rollout import Rollout


class Evaluated(NamedTuple):
    """Outputs of policy or critic for a minibatch, with gradients. Padding may have any value."""

    logps: Float[Tensor, "batch time"] | None = None
    """Log-probabilities of the rollout's actions."""
    entropy: Float[Tensor, "batch time"] | None = None
    """Entropies of the policy, in nats."""
    values: Float[Tensor, "batch time"] | None = None
    """Values by the critic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """Diagnostics of an update: means over the valid tokens of all minibatches and ranks.

    A metric that does not apply, such as the value loss without a critic, is NaN.
    """

    policy_loss: float
    """Surrogate loss, and the KL term where the rollout has a reference."""
    value_loss: float
    entropy: float
    kl: float
    """KL(old, new) in nats per token, estimated by k3 on the actions of the old policy.

    Measured for each minibatch before its step.
    """
    clip_fraction: float
    """Share of the tokens whose ratio lies outside the clip range."""
    ratio_max: float
    """Greatest probability ratio new / old of a token."""
    explained_variance: float
    """Share of the variance of the returns that the critic predicted before the update."""
    grad_norm: float
    """Mean over the steps of the gradient norm before clipping."""
    epochs: int
    """Completed epochs."""
    steps: int
    """Completed optimizer steps."""
    stopped_early: bool
    """Whether ``target_kl`` ended the update."""


Evaluator = Callable[[dict[str, Tensor]], Evaluated]
"""Maps the inputs of some rows to the outputs of policy or critic for them."""


def update(
    evaluate: Evaluator | Sequence[Evaluator],
    rollout: Rollout,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    generator: torch.Generator,
    parameters: Iterable[Tensor] | None = None,
    divide: Callable[[Rollout], Sequence[Rollout]] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    clip_gradients: Callable[[list[Tensor], float], Tensor] = torch.nn.utils.clip_grad_norm_,
) -> Diagnostics:
    """Update the policy on ``rollout``: each epoch takes every row once, in a new random order.

    ``evaluate`` maps the inputs of some rows to log-probabilities, entropies and values. Where
    policy and critic share no trained parameters, two functions, one for each, halve the memory:
    the graph of the first is freed before that of the second is built, and the gradients are the
    same. The loss of a minibatch is the sum over its valid tokens divided by their number in all
    micro-batches and on all ranks, unless ``objective.aggregate`` differs, so that every token has
    the same weight however the minibatch is split: into ``micro_batches`` equal parts, or by
    ``divide``. The critic is trained if the rollout has returns. Random numbers come from
    ``generator`` alone.

    Gradients of ``parameters`` are clipped together, by default those of all of the optimizer's.
    ``accelerator.backward`` and ``accelerator.clip_grad_norm_`` fit ``backward`` and
    ``clip_gradients``. No gradients remain on return.

    Raises:
        ValueError: The rollout has fewer rows than micro-batches, tensors differ in shape, or
            ``evaluate`` lacks an output that the objective or the rollout needs.
    """
    n_pieces = objective.minibatches * objective.micro_batches
    if len(rollout) < n_pieces:
        raise ValueError(
            f"rollout: {len(rollout)} rows are fewer than the {n_pieces} micro-batches of an epoch"
        )
    if parameters is None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
    parameters = list(parameters)
    rollout = _constants(rollout, whiten=objective.whiten is True)
    evaluators = [evaluate] if callable(evaluate) else list(evaluate)
    history: list[Tensor] = []  # tensors: converting each to a float would synchronize with the GPU
    norms: list[Tensor] = []
    counts: list[Tensor] = []
    stopped = False
    optimizer.zero_grad()
    in_order = divide is not None or objective.micro_batches > 1
    for minibatch, tokens in _minibatches(rollout, objective, generator, in_order=in_order):
        counts.append(tokens)
        per_row = tokens.to(rollout.logps.dtype) / (len(minibatch) * ranks())
        pieces = divide(minibatch) if divide else minibatch.split(objective.micro_batches)
        for piece in pieces:
            totals: Tensor | None = None
            outputs: set[str] = set()
            for evaluator in evaluators:
                evaluated = evaluator(piece.inputs)
                outputs |= {k for k in evaluated._fields if getattr(evaluated, k) is not None}
                terms = _terms(evaluated, piece, objective, tokens_per_row=per_row)
                if losses := _losses(terms, objective):
                    # Gradients are averaged over the ranks; times their number, they are summed.
                    backward(sum(losses[1:], losses[0]) * ranks() / tokens)
                stacked = torch.stack(terms).detach()
                totals = stacked if totals is None else torch.where(totals.isnan(), stacked, totals)
                del evaluated, terms, losses  # frees the graph
            _check_outputs(outputs, rollout, objective)
            assert totals is not None
            history.append(totals)
        if objective.target_kl is not None:
            kl = torch.stack(history[-len(pieces) :])[:, _KL].sum()
            # "not <=" rather than ">": NaN stops as well, before it reaches the weights.
            stopped = not bool(sum_over_ranks(kl) / tokens <= objective.target_kl)
            if stopped:
                break
        norms.append(clip_gradients(parameters, objective.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.zero_grad()

    terms_of_pieces = torch.stack(history)
    means = sum_over_ranks(terms_of_pieces[:, :_RATIO].sum(0)) / torch.stack(counts).sum()
    policy_loss, value_loss, entropy, kl, clip_fraction = means.tolist()
    return Diagnostics(
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=entropy,
        kl=kl,
        clip_fraction=clip_fraction,
        ratio_max=float(max_over_ranks(terms_of_pieces[:, _RATIO].amax())),
        explained_variance=_explained_variance(rollout),
        grad_norm=float(torch.stack(norms).mean()) if norms else math.nan,
        epochs=len(norms) // objective.minibatches,
        steps=len(norms),
        stopped_early=stopped,
    )


class _Terms(NamedTuple):
    """Sums over the tokens of a micro-batch, and one maximum."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    kl: Tensor
    clipped: Tensor
    ratio_max: Tensor


_TIMED = ("logps", "advantages", "values", "returns", "weights", "ref_logps")
_KL = _Terms._fields.index("kl")
_RATIO = _Terms._fields.index("ratio_max")


def _constants(rollout: Rollout, *, whiten: bool) -> Rollout:
    """The rollout with 0 in its padding, so that sums over all entries are sums over valid ones."""
    _check_shapes("rollout", rollout, _TIMED, rollout.mask.shape)
    if (rollout.values is None) != (rollout.returns is None):
        raise ValueError(
            "rollout: expected both values and returns or neither, got only one of them"
        )

    def blank(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().masked_fill(~rollout.mask, 0)

    whitened = masked_whiten(rollout.advantages, rollout.mask) if whiten else rollout.advantages
    return Rollout(
        inputs=rollout.inputs,
        logps=cast(Tensor, blank(rollout.logps)),
        advantages=cast(Tensor, blank(whitened)),
        mask=rollout.mask,
        values=blank(rollout.values),
        returns=blank(rollout.returns),
        weights=blank(rollout.weights),
        ref_logps=blank(rollout.ref_logps),
    )


def _minibatches(
    rollout: Rollout, objective: Objective, generator: torch.Generator, *, in_order: bool
) -> Iterator[tuple[Rollout, Tensor]]:
    """Each minibatch of each epoch, with the number of its valid tokens on all ranks."""
    for _ in range(objective.epochs):
        order = torch.randperm(len(rollout), generator=generator, device=generator.device)
        if in_order:
            # Rows of one prompt are consecutive; in order, they share a micro-batch and its prefix.
            ends = [
                len(order) * part // objective.minibatches
                for part in range(objective.minibatches + 1)
            ]
            order = torch.cat(
                [order[slice(*part)].sort().values for part in itertools.pairwise(ends)]
            )
        minibatches = rollout.take(order).split(objective.minibatches)
        counts = sum_over_ranks(torch.stack([part.mask.sum() for part in minibatches]))
        for part, count in zip(minibatches, counts.clamp(min=1), strict=True):
            if objective.whiten == "minibatch":
                part = replace(part, advantages=masked_whiten(part.advantages, part.mask))
            yield part, count


def _terms(
    evaluated: Evaluated, piece: Rollout, objective: Objective, *, tokens_per_row: Tensor
) -> _Terms:
    """A micro-batch's share of losses and diagnostics; NaN where ``evaluated`` has no output."""
    _check_shapes("evaluate", evaluated, evaluated._fields, piece.mask.shape)
    padding = ~piece.mask
    policy = value = entropy = kl = clipped = ratio_max = piece.logps.new_tensor(math.nan)
    if evaluated.logps is not None:
        logps = evaluated.logps.masked_fill(padding, 0)
        compared = logps  # those of which the ratio is clipped
        if objective.ratio == "sequence":
            compared = sequence_logps(logps, piece.logps, piece.mask)
        losses = policy_losses(logps, compared, piece, objective)
        if objective.aggregate != "token":
            losses = losses * _row_weights(piece, objective, tokens_per_row)
        policy = losses.sum()
        with torch.no_grad():
            ratio = importance_ratio(compared, piece.logps)
            outside = (ratio < 1 - objective.clip_low) | (ratio > 1 + objective.clip_high)
            clipped = (outside & piece.mask).to(logps.dtype).sum()
            kl = kl_k3(piece.logps, logps).sum()
            ratio_max = ratio.masked_fill(padding, -math.inf).amax()
    if evaluated.values is not None and piece.values is not None and piece.returns is not None:
        values = evaluated.values.masked_fill(padding, 0)
        value = clipped_value_loss(
            values, piece.values, piece.returns, clip=objective.value_clip
        ).sum()
    if evaluated.entropy is not None:
        entropy = evaluated.entropy.masked_fill(padding, 0).sum()
    return _Terms(policy, value, entropy, kl, clipped, ratio_max)


def _row_weights(piece: Rollout, objective: Objective, tokens_per_row: Tensor) -> Tensor:
    """Factors of the losses of rows, whose sum is then divided by the number of tokens."""
    if objective.aggregate == "constant":
        return tokens_per_row / objective.longest
    lengths = piece.mask.sum(1, keepdim=True).clamp(min=1)
    return tokens_per_row / lengths.to(tokens_per_row.dtype)


def _check_shapes(where: str, owner: object, names: Iterable[str], shape: torch.Size) -> None:
    """Refuse shapes that torch would broadcast: ``[batch]`` and ``[batch, 1]`` make a square."""
    for name in names:
        tensor = getattr(owner, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected that of the mask, "
                f"{tuple(shape)}"
            )


def _losses(terms: _Terms, objective: Objective) -> list[Tensor]:
    """A micro-batch's terms of the loss, as sums: those with a weight and a gradient."""
    shares = [
        terms.policy,
        objective.value_coef * terms.value,
        -objective.entropy_coef * terms.entropy,
    ]
    weights = (1.0, objective.value_coef, objective.entropy_coef)
    return [
        share
        for share, weight in zip(shares, weights, strict=True)
        if weight and share.requires_grad
    ]


def _check_outputs(outputs: set[str], rollout: Rollout, objective: Objective) -> None:
    """Refuse evaluators that lack an output which the objective or the rollout needs."""
    if "logps" not in outputs:
        raise ValueError("evaluate: returned no log-probabilities")
    if rollout.returns is not None and "values" not in outputs:
        raise ValueError("evaluate: returned no values, but the rollout has returns to learn from")
    if objective.entropy_coef and "entropy" not in outputs:
        raise ValueError("evaluate: returned no entropy, but entropy_coef is not 0")


def _explained_variance(rollout: Rollout) -> float:
    if rollout.values is None or rollout.returns is None:
        return math.nan
    return float(explained_variance(rollout.values, rollout.returns, rollout.mask))
