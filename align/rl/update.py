"""One update of a policy, and of its critic if it has one, from a rollout. REINFORCE, A2C and PPO are settings of it.

| | epochs x minibatches | clip | rollout |
|---|---|---|---|
| REINFORCE | 1 x 1 | none | advantages with lam = 1, no values or a baseline's |
| A2C | 1 x 1 | none | values and returns |
| PPO | k x m | epsilon | values and returns |

**Checkpoints.** Between two calls nothing lives here. What comes next depends on the weights, the optimizer's state,
the generator's state (``generator.get_state()``) and whatever the caller counts: save these four, and a run that goes
on is the same run to the bit.

**Several processes.** Every rank calls with as many rows as the others and a model whose backward pass averages
gradients over the ranks (DistributedDataParallel and its kin). Lengths and masks may differ.

Left out: schedules (the learning rate is the optimizer's), penalties inside the reward (the rollout's), sampling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from align.functional.masked import masked_whiten, max_over_ranks, ranks, sum_over_ranks
from align.functional.policy_gradient import (
    clipped_surrogate_loss,
    clipped_value_loss,
    explained_variance,
    importance_ratio,
    kl_k3,
)
from align.rl.rollout import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an update optimises, and in how many steps. As it stands: one plain policy-gradient step."""

    epochs: int = 1
    minibatches: int = 1
    """Optimizer steps an epoch."""
    micro_batches: int = 1
    """Pieces in which a minibatch passes through the model. They save memory and change no gradient."""
    clip_low: float = math.inf
    clip_high: float = math.inf
    """How far a ratio may fall below and rise above 1 and still earn; infinity is no clip."""
    dual_clip: float | None = None
    """Bound of a bad action's loss, in multiples of its advantage; above 1."""
    value_coef: float = 0.5
    value_clip: float | None = None
    """In units of the returns."""
    entropy_coef: float = 0.0
    max_grad_norm: float = math.inf
    target_kl: float | None = None
    """No further step once a minibatch's KL(old, new) exceeds it; None is never. No hidden factor."""
    whiten: bool = False
    """Whiten advantages over the whole rollout and all ranks. Per minibatch, an action's weight would depend on the
    few others that the shuffle and the number of processes put beside it."""


class Evaluated(NamedTuple):
    """What the policy, or the critic, now says about a minibatch, with gradients. Padding may hold anything."""

    logps: Float[Tensor, "batch time"] | None = None
    """Log-probabilities of the rollout's actions."""
    entropy: Float[Tensor, "batch time"] | None = None
    values: Float[Tensor, "batch time"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """How an update went: means over the valid tokens of all its minibatches and ranks. NaN: there is nothing to tell."""

    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    """KL(old, new) in nats a token, estimated by k3 on the old policy's actions. Each minibatch before its own step."""
    clip_fraction: float
    """Share of the tokens whose ratio lies outside the clip."""
    ratio_max: float
    """Greatest ratio new / old of a token."""
    explained_variance: float
    """Of the critic before the update."""
    grad_norm: float
    """Mean over the steps, before gradients are clipped."""
    epochs: int
    """Epochs that were finished."""
    steps: int
    """Optimizer steps that were taken."""
    stopped_early: bool


Evaluate = Callable[[dict[str, Tensor]], Evaluated]


def update(
    evaluate: Evaluate | Sequence[Evaluate],
    rollout: Rollout,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    generator: torch.Generator,
    parameters: Iterable[Tensor] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    clip_gradients: Callable[[list[Tensor], float], Tensor] = torch.nn.utils.clip_grad_norm_,
) -> Diagnostics:
    """Improve the policy behind ``evaluate`` on ``rollout``: for each epoch, each row once, in a fresh order.

    ``evaluate`` goes from the inputs of some rows to what the policy says about their actions. Where policy and critic
    share nothing that learns, two functions, one for each, halve the memory: the first's graph is gone before the second's
    is made, and the gradients are the same. A minibatch's loss is
    the sum over its valid tokens / their number in all micro-batches and on all ranks, so a token weighs the same
    however the minibatch is cut up. The critic learns where the rollout has returns. Only ``generator`` is drawn from.

    Clipped together are ``parameters``, or all of the optimizer's. ``accelerator.backward`` and
    ``accelerator.clip_grad_norm_`` fit ``backward`` and ``clip_gradients``. No gradients are left on return.

    Raises:
        ValueError: Fewer rows than pieces, or something is missing that the objective or the rollout calls for.
    """
    pieces = objective.minibatches * objective.micro_batches
    if len(rollout) < pieces:
        raise ValueError(f"rollout: {len(rollout)} rows cannot fill {pieces} pieces")
    if parameters is None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
    parameters = list(parameters)
    rollout = _constants(rollout, whiten=objective.whiten)
    asked = [evaluate] if callable(evaluate) else list(evaluate)
    history: list[Tensor] = []  # tensors: a float for every minibatch would make a GPU wait
    norms: list[Tensor] = []
    counts: list[Tensor] = []
    stopped = False
    optimizer.zero_grad()
    for minibatch, tokens in _minibatches(rollout, objective, generator):
        counts.append(tokens)
        for piece in minibatch.split(objective.micro_batches):
            told: Tensor | None = None
            given: set[str] = set()
            for ask in asked:
                now = ask(piece.inputs)
                given |= {name for name in now._fields if getattr(now, name) is not None}
                terms = _terms(now, piece, objective)
                if loss := _losses(terms, objective):
                    # Gradients are averaged over the ranks: times their number it is the sum.
                    backward(sum(loss[1:], loss[0]) * ranks() / tokens)
                found = torch.stack(terms).detach()
                told = found if told is None else torch.where(told.isnan(), found, told)
                del now, terms, loss  # and with them the graph
            _check_given(given, rollout, objective)
            assert told is not None
            history.append(told)
        if objective.target_kl is not None:
            kl = torch.stack(history[-objective.micro_batches :])[:, _KL].sum()
            # "Not below" rather than "above": NaN stops too, before it reaches the weights.
            stopped = not bool(sum_over_ranks(kl) / tokens <= objective.target_kl)
            if stopped:
                break
        norms.append(clip_gradients(parameters, objective.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.zero_grad()

    every = torch.stack(history)
    means = sum_over_ranks(every[:, :_RATIO].sum(0)) / torch.stack(counts).sum()
    policy_loss, value_loss, entropy, kl, clip_fraction = means.tolist()
    return Diagnostics(
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=entropy,
        kl=kl,
        clip_fraction=clip_fraction,
        ratio_max=float(max_over_ranks(every[:, _RATIO].amax())),
        explained_variance=_explained_variance(rollout),
        grad_norm=float(torch.stack(norms).mean()) if norms else math.nan,
        epochs=len(norms) // objective.minibatches,
        steps=len(norms),
        stopped_early=stopped,
    )


class _Terms(NamedTuple):
    """Sums over a piece's tokens, and one maximum."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    kl: Tensor
    clipped: Tensor
    ratio_max: Tensor


_TIMED = ("logps", "advantages", "values", "returns", "weights")
_KL = _Terms._fields.index("kl")
_RATIO = _Terms._fields.index("ratio_max")


def _constants(rollout: Rollout, *, whiten: bool) -> Rollout:
    """The rollout with 0 in its padding, so that a sum over all entries is one over what is valid."""
    _check_shapes("rollout", rollout, _TIMED, rollout.mask.shape)
    if (rollout.values is None) != (rollout.returns is None):
        raise ValueError("rollout: values and returns come together or not at all")

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
    )


def _minibatches(
    rollout: Rollout, objective: Objective, generator: torch.Generator
) -> Iterator[tuple[Rollout, Tensor]]:
    """Each minibatch of each epoch, and the number of valid tokens that all ranks have in it."""
    for _ in range(objective.epochs):
        order = torch.randperm(len(rollout), generator=generator, device=generator.device)
        if (
            objective.micro_batches > 1
        ):  # rows that share a prompt stand together, and so may be computed together
            ends = [
                len(order) * part // objective.minibatches
                for part in range(objective.minibatches + 1)
            ]
            order = torch.cat(
                [order[slice(*part)].sort().values for part in itertools.pairwise(ends)]
            )
        minibatches = rollout.take(order).split(objective.minibatches)
        counts = sum_over_ranks(torch.stack([part.mask.sum() for part in minibatches]))
        yield from zip(minibatches, counts.clamp(min=1), strict=True)


def _terms(now: Evaluated, piece: Rollout, objective: Objective) -> _Terms:
    """What a piece adds to the losses and to the diagnostics; NaN where there is nothing to tell."""
    _check_shapes("evaluate", now, now._fields, piece.mask.shape)
    padding = ~piece.mask
    policy = value = entropy = kl = clipped = ratio_max = piece.logps.new_tensor(math.nan)
    if now.logps is not None:
        logps = now.logps.masked_fill(padding, 0)
        losses = clipped_surrogate_loss(
            logps,
            piece.logps,
            piece.advantages,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            dual_clip=objective.dual_clip,
        )
        policy = (losses if piece.weights is None else losses * piece.weights).sum()
        with torch.no_grad():
            ratio = importance_ratio(logps, piece.logps)
            outside = (ratio < 1 - objective.clip_low) | (ratio > 1 + objective.clip_high)
            clipped = outside.to(logps.dtype).sum()
            kl = kl_k3(piece.logps, logps).sum()
            ratio_max = ratio.masked_fill(padding, -math.inf).amax()
    if now.values is not None and piece.values is not None and piece.returns is not None:
        values = now.values.masked_fill(padding, 0)
        value = clipped_value_loss(
            values, piece.values, piece.returns, clip=objective.value_clip
        ).sum()
    if now.entropy is not None:
        entropy = now.entropy.masked_fill(padding, 0).sum()
    return _Terms(policy, value, entropy, kl, clipped, ratio_max)


def _check_shapes(where: str, of: object, names: Iterable[str], shape: torch.Size) -> None:
    """Refuse what torch would broadcast: log-probabilities ``[batch]`` against ``[batch, 1]`` make a square."""
    for name in names:
        tensor = getattr(of, name)
        if tensor is not None and tensor.shape != shape:
            found = f"shape {tuple(tensor.shape)}, and the mask has {tuple(shape)}"
            raise ValueError(f"{where}: {name} has {found}")


def _losses(terms: _Terms, objective: Objective) -> list[Tensor]:
    """A piece's shares of the loss, still sums: those that something learns from."""
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


def _check_given(given: set[str], rollout: Rollout, objective: Objective) -> None:
    """Refuse an evaluation that leaves out what is to be learned."""
    if "logps" not in given:
        raise ValueError("evaluate gave no log-probabilities")
    if rollout.returns is not None and "values" not in given:
        raise ValueError("evaluate gave no values, and the rollout has returns to learn")
    if objective.entropy_coef and "entropy" not in given:
        raise ValueError("evaluate gave no entropy, and entropy_coef is not 0")


def _explained_variance(rollout: Rollout) -> float:
    if rollout.values is None or rollout.returns is None:
        return math.nan
    return float(explained_variance(rollout.values, rollout.returns, rollout.mask))
