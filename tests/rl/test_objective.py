"""Losses, ratios and aggregations of the policy's objective, by loops over rows and actions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from align.rl.objective import Objective
from align.rl.rollout import Rollout
from align.rl.update import Diagnostics, Evaluated, update

LENGTHS = [4, 1, 3, 2, 4, 3]
LONGEST = 7
CLIP = {"clip_low": 0.1, "clip_high": 0.2}
WAYS: list[dict[str, Any]] = [
    {"loss": loss, "ratio": ratio, "aggregate": aggregate, "kl": kl}
    for loss, ratio, aggregate, kl in itertools.product(
        ("clip", "cispo", "sapo", "vespo"),
        ("token", "sequence"),
        ("token", "sequence", "constant"),
        (None, "completion", "token"),
    )
]


class Table(nn.Module):
    """A policy with its own logits for every row and time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Parameter(torch.randn(len(LENGTHS), max(LENGTHS), 3, dtype=torch.float64))

    def logps(self, rows: Tensor, actions: Tensor) -> Tensor:
        return self.logits[rows].log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def rollout(*, kl: bool) -> Rollout:
    """Rows of different lengths, sampled by a policy that is a little older; padding is junk."""
    draw = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))

    def normal() -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    actions = torch.randint(3, shape, generator=draw)
    rows = torch.arange(len(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        old = Table().logps(rows, actions) + 0.3 * normal()
    advantages = normal()[:, :1].expand(shape)
    return Rollout(
        {"rows": rows, "actions": actions},
        logps=torch.where(mask, old, math.nan),
        advantages=torch.where(mask, advantages, math.nan),
        mask=mask,
        ref_logps=torch.where(mask, old + normal(), math.nan) if kl else None,
    )


def learn(batch: Rollout, objective: Objective, **options: Any) -> tuple[Tensor, Diagnostics]:
    """The gradient of one step, and the diagnostics."""
    table = Table()
    before = table.logits.detach().clone()

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        return Evaluated(table.logps(inputs["rows"], inputs["actions"]))

    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    order = torch.Generator().manual_seed(2)
    diagnostics = update(evaluate, batch, objective, optimizer, generator=order, **options)
    return before - table.logits.detach(), diagnostics


def by_hand(batch: Rollout, way: dict[str, Any], kl_coef: float) -> tuple[Tensor, Tensor]:
    """The loss of the batch, one action after the other, and its gradient."""
    table = Table()
    logps = table.logps(batch.inputs["rows"], batch.inputs["actions"])
    rows = []
    for i, length in enumerate(LENGTHS):
        ratios = [(logps[i, t] - batch.logps[i, t]).exp() for t in range(length)]
        whole = math.prod(float(ratio.detach()) for ratio in ratios)
        if way["ratio"] == "sequence":
            product = torch.stack(ratios).prod()
            ratios = [product ** (1 / length)] * length
        losses = []
        for t in range(length):
            advantage = batch.advantages[i, t]
            if way["loss"] == "cispo":
                weight = min(float(ratios[t].detach()), 1 + CLIP["clip_high"])
                loss = -weight * advantage * logps[i, t]
            elif way["loss"] == "sapo":
                slope = 1.0 if advantage > 0 else 1.05
                loss = -advantage * 4 / slope / (1 + (-slope * (ratios[t] - 1)).exp())
            elif way["loss"] == "vespo":
                power, decay = (2, 3) if advantage > 0 else (3, 2)
                weight = whole**power * math.exp(decay * (1 - whole))
                loss = -weight * advantage * logps[i, t]
            else:
                low, high = 1 - CLIP["clip_low"], 1 + CLIP["clip_high"]
                bounded = ratios[t].clamp(low, high)
                loss = -torch.minimum(ratios[t] * advantage, bounded * advantage)
            if batch.ref_logps is not None:
                k3 = [
                    (batch.ref_logps[i, s] - logps[i, s]).exp()
                    - 1
                    - (batch.ref_logps[i, s] - logps[i, s])
                    for s in range(t, length)
                ]
                if way["kl"] == "token":
                    loss = loss + kl_coef * ratios[t] * k3[0]
                else:
                    later = sum(float(term.detach()) for term in k3[1:])
                    own = (logps[i, t] - batch.logps[i, t]).exp()
                    loss = loss + kl_coef * own * (k3[0] + later)
            losses.append(loss)
        rows.append(torch.stack(losses))
    loss = {
        "token": torch.cat(rows).mean(),
        "sequence": torch.stack([row.mean() for row in rows]).mean(),
        "constant": torch.cat(rows).sum() / (len(rows) * LONGEST),
    }[way["aggregate"]]
    loss.backward()
    assert table.logits.grad is not None
    return loss.detach(), table.logits.grad


def objective_of(way: dict[str, Any], **settings: Any) -> Objective:
    kinds = {key: way[key] for key in ("loss", "ratio", "aggregate")}
    kl_credit = way["kl"] or "completion"
    return Objective(**CLIP, **kinds, longest=LONGEST, kl_credit=kl_credit, kl_coef=0.3, **settings)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(str(v) for v in way.values()))
def test_loss_and_gradient_by_hand(way: dict[str, Any]):
    batch = rollout(kl=way["kl"] is not None)
    loss, gradient = by_hand(batch, way, kl_coef=0.3)
    learned, diagnostics = learn(batch, objective_of(way))
    assert_close(learned, gradient, rtol=0, atol=1e-12)
    assert diagnostics.policy_loss == pytest.approx(float(loss), abs=1e-12)


@pytest.mark.parametrize("way", WAYS[::5], ids=lambda way: "-".join(str(v) for v in way.values()))
def test_the_size_of_micro_batches_does_not_change_the_gradient(way: dict[str, Any]):
    batch = rollout(kl=way["kl"] is not None)
    whole, _ = learn(batch, objective_of(way))
    parts, _ = learn(batch, objective_of(way, micro_batches=3))
    divided, _ = learn(batch, objective_of(way), divide=lambda part: part.split(len(LENGTHS)))
    assert_close(parts, whole, rtol=0, atol=1e-12)
    assert_close(divided, whole, rtol=0, atol=1e-12)


def test_only_real_actions_are_counted_as_clipped():
    """The padding of a row has its ratio too, and is not counted."""
    batch = rollout(kl=False)
    batch = dataclasses.replace(batch, logps=batch.logps - 1)  # every ratio is about e
    for ratio in ("token", "sequence"):
        _, diagnostics = learn(batch, Objective(**CLIP, ratio=ratio))  # type: ignore[arg-type]
        assert diagnostics.clip_fraction == 1.0
        assert diagnostics.ratio_max > 2


def test_the_ratio_of_a_sequence_has_the_same_gradient_for_all_of_its_actions():
    """One action moves far: alone it is clipped, its sequence is not."""
    batch = rollout(kl=False)
    old = Table().logps(batch.inputs["rows"], batch.inputs["actions"]).detach()
    logps = old.clone()
    logps[0, 0] -= 0.35  # e^0.35 = 1.42 > 1.2; e^(0.35 / 4) = 1.09 < 1.2
    ones = torch.ones_like(batch.advantages)
    batch = dataclasses.replace(batch, logps=logps, advantages=ones)
    alone, _ = learn(batch, Objective(**CLIP))
    together, _ = learn(batch, Objective(**CLIP, ratio="sequence", aggregate="sequence"))
    assert (alone[0, 0] == 0).all()
    assert (together[0, 0] != 0).all()


def test_the_weight_of_a_row_in_vespo_is_that_of_its_ratio_to_the_sampler():
    """Weights of another engine are a factor inside the weight of the row, not beside it."""
    batch = rollout(kl=False)
    shift = torch.linspace(-0.5, 0.4, batch.mask.numel(), dtype=torch.float64)
    sampler = batch.logps + shift.view(batch.mask.shape)
    weights = (batch.logps - sampler).exp()
    objective = objective_of({"loss": "vespo", "ratio": "token", "aggregate": "token", "kl": None})
    weighted, _ = learn(dataclasses.replace(batch, weights=weights), objective)
    by_sampler, _ = learn(dataclasses.replace(batch, logps=sampler), objective)
    unweighted, _ = learn(batch, objective)
    assert_close(weighted, by_sampler, rtol=0, atol=1e-12)
    assert (weighted - unweighted).abs().max() > 0.01


@pytest.mark.parametrize("loss", ["cispo", "sapo", "vespo"])
def test_weights_of_another_engine_scale_the_kl_terms_of_every_loss(loss: str):
    """What a reference adds to the loss is the same beside all of them."""

    def added_by_reference(loss: str, weight: float) -> float:
        batch = rollout(kl=True)
        weights = torch.full_like(batch.logps, weight)
        way = {"loss": loss, "ratio": "token", "aggregate": "token", "kl": "completion"}
        batch = dataclasses.replace(batch, weights=weights)
        _, with_kl = learn(batch, objective_of(way))
        _, without = learn(dataclasses.replace(batch, ref_logps=None), objective_of(way))
        return with_kl.policy_loss - without.policy_loss

    added = added_by_reference("clip", 1.0)
    assert added > 0.1
    assert added_by_reference(loss, 0.5) == pytest.approx(0.5 * added, abs=1e-12)
