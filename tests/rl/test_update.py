"""One update: against hand-written steps, in pieces and processes, across a checkpoint, and on bandits with known optima."""

from __future__ import annotations

import copy
import dataclasses
import math
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from align.functional.masked import (
    masked_mean,
    masked_scale,
    masked_var,
    masked_whiten,
    max_over_ranks,
)
from align.functional.policy_gradient import importance_weights, reinforce_loss
from align.rl.rollout import Rollout
from align.rl.update import Diagnostics, Evaluated, Objective, update

PPO = Objective(
    epochs=2,
    minibatches=2,
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=2.0,
    value_coef=0.7,
    value_clip=0.2,
    entropy_coef=0.05,
    max_grad_norm=1.0,
    whiten=True,
)


class Model(nn.Module):
    """A token's logits and value from its observation; float64, so that only mathematics makes a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8, dtype=torch.float64)
        self.policy = nn.Linear(8, 3, dtype=torch.float64)
        self.value = nn.Linear(8, 1, dtype=torch.float64)

    def forward(self, seen: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        body = self.body(seen).tanh()
        logps = self.policy(body).log_softmax(-1)
        taken = logps.gather(-1, actions[..., None])[..., 0]
        return taken, -(logps.exp() * logps).sum(-1), self.value(body)[..., 0]


class Evaluate:
    """What ``update`` asks for, and a record of the rows it asked about."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: list[list[int]] = []

    def __call__(self, inputs: dict[str, Tensor]) -> Evaluated:
        self.rows.append(inputs["row"].tolist())
        return Evaluated(*self.model(inputs["seen"], inputs["actions"]))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def sgd(of: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(of.parameters(), lr=lr)


def rollout(rows: int = 11, time: int = 5, *, off: float = 0.0) -> Rollout:
    """Rows of 1 to ``time`` tokens by the policy of :func:`model`, its log-probabilities ``off`` by noise."""
    draw = generator(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = {
        "row": torch.arange(rows),
        "seen": normal(rows, time, 4),
        "actions": torch.randint(3, (rows, time), generator=draw),
    }
    lengths = torch.randint(1, time + 1, (rows, 1), generator=draw)
    with torch.no_grad():
        logps, _, values = model()(inputs["seen"], inputs["actions"])
    return Rollout(
        inputs,
        logps=logps + off * normal(rows, time),
        advantages=normal(rows, time) + 0.5,
        mask=torch.arange(time) < lengths,
        values=values + off * normal(rows, time),
        returns=values + normal(rows, time),
    )


def weights(of: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in of.parameters()])


def learn(given: Rollout, objective: Objective, *, lr: float = 1.0) -> tuple[Tensor, Diagnostics]:
    """The weights after one update of :func:`model`, and what was told of it."""
    learner = model()
    told = update(Evaluate(learner), given, objective, sgd(learner, lr), generator=generator())
    return weights(learner), told


def same(left: Tensor, right: Tensor) -> None:
    assert_close(left, right, rtol=0, atol=1e-12)


# --- three algorithms, one update ---


def test_the_first_step_is_reinforces_to_the_bit_whatever_the_clip():
    given = dataclasses.replace(rollout(), values=None, returns=None)
    plain, _ = learn(given, Objective())
    clipped, _ = learn(given, Objective(clip_low=0.2, clip_high=0.2, dual_clip=3.0))
    assert torch.equal(plain, clipped)

    learner = model()
    logps, _, _ = learner(given.inputs["seen"], given.inputs["actions"])
    loss = reinforce_loss(logps, given.advantages)[given.mask].sum() / given.mask.sum()
    loss.backward()
    with torch.no_grad():
        for p in learner.parameters():
            p -= 0 if p.grad is None else p.grad
    same(plain, weights(learner))
    assert not torch.equal(plain, weights(model()))


def by_hand(given: Rollout, objective: Objective, lr: float) -> Tensor:
    """Token by token, with Python's min and max, one gradient step after the other."""
    learner, order = model(), generator()
    advantages = given.advantages
    if objective.whiten:
        valid = advantages[given.mask]
        advantages = (advantages - valid.mean()) / (valid.var(correction=0) + 1e-8).sqrt()
    for _ in range(objective.epochs):
        shuffled = torch.randperm(len(given), generator=order)
        for rows in shuffled.split(math.ceil(len(given) / objective.minibatches)):
            logps, entropies, values = learner(given.inputs["seen"], given.inputs["actions"])
            losses = []
            for at in [(int(b), t) for b in rows for t in range(given.mask.shape[1])]:
                if not given.mask[at]:
                    continue
                ratio, advantage = (logps[at] - given.logps[at]).exp(), advantages[at]
                low, high = 1 - objective.clip_low, 1 + objective.clip_high
                gain = min(ratio * advantage, min(max(ratio, low), high) * advantage)
                if objective.dual_clip is not None and advantage < 0:
                    gain = max(gain, objective.dual_clip * advantage)
                if given.weights is not None:
                    gain = gain * given.weights[at]
                error = (values[at] - given.returns[at]) ** 2
                if objective.value_clip is not None:
                    step = values[at] - given.values[at]
                    step = min(max(step, -objective.value_clip), objective.value_clip)
                    error = max(error, (given.values[at] + step - given.returns[at]) ** 2)
                losses.append(
                    -gain
                    + objective.value_coef * 0.5 * error
                    - objective.entropy_coef * entropies[at]
                )
            gradients = torch.autograd.grad(sum(losses) / len(losses), list(learner.parameters()))
            norm = sum((g**2).sum() for g in gradients).sqrt()
            scale = min(1.0, objective.max_grad_norm / (norm.item() + 1e-6))
            with torch.no_grad():
                for p, g in zip(learner.parameters(), gradients, strict=True):
                    p -= lr * scale * g
    return weights(learner)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(Objective(), id="A2C: one plain step"),
        pytest.param(Objective(value_coef=0.25, entropy_coef=0.1, whiten=True), id="A2C, weighted"),
        pytest.param(PPO, id="PPO"),
        pytest.param(
            dataclasses.replace(
                PPO, value_clip=None, dual_clip=None, max_grad_norm=math.inf, whiten=False
            ),
            id="PPO without value clip, dual clip, gradient clip and whitening",
        ),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_an_update_is_the_hand_written_one(objective, weighted):
    # The old policy and critic are some way off: clips of both are at work from the first step on.
    given = rollout(rows=10, off=0.6)
    if weighted:
        draw = torch.rand(10, 5, generator=generator(2), dtype=torch.float64)
        given = dataclasses.replace(given, weights=2 * draw)
    found, _ = learn(given, objective, lr=0.3)
    same(found, by_hand(given, objective, lr=0.3))


# --- pieces and padding ---


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_micro_batches_change_no_gradient(pieces):
    given = rollout(off=0.3)
    whole = dataclasses.replace(PPO, minibatches=1)
    expected, told = learn(given, whole)
    found, again = learn(given, dataclasses.replace(whole, micro_batches=pieces))
    same(found, expected)
    assert dataclasses.asdict(again) == pytest.approx(dataclasses.asdict(told), rel=1e-12)


def test_micro_batches_pass_through_the_model_one_by_one():
    evaluate = Evaluate(learner := model())
    objective = Objective(minibatches=2, micro_batches=3)
    update(evaluate, rollout(), objective, sgd(learner), generator=generator())
    assert [len(rows) for rows in evaluate.rows] == [1, 2, 2, 2, 2, 2]


def test_padding_is_never_read_and_more_of_it_changes_neither_weights_nor_metrics():
    given = rollout(off=0.3)
    # No ratio above 1: the greatest one must not come from the padding.
    given = dataclasses.replace(given, logps=given.logps + 3.0)
    expected, told = learn(given, PPO)
    rows, more = len(given), 4

    def padded(tensor: Tensor) -> Tensor:
        junk = torch.full((rows, more), math.nan, dtype=tensor.dtype)
        return torch.cat([tensor.masked_fill(~given.mask, math.nan), junk], dim=1)

    wide = {
        "row": given.inputs["row"],
        "seen": torch.cat([given.inputs["seen"], torch.ones(rows, more, 4).double()], dim=1),
        "actions": torch.cat([given.inputs["actions"], torch.zeros(rows, more).long()], dim=1),
    }
    junk = Rollout(
        wide,
        logps=padded(given.logps),
        advantages=padded(given.advantages),
        mask=torch.cat([given.mask, torch.zeros(rows, more).bool()], dim=1),
        values=padded(given.values),
        returns=padded(given.returns),
        weights=padded(torch.ones_like(given.logps)),
    )
    learner = model()

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        padding = ~junk.mask[inputs["row"]]
        now = learner(inputs["seen"], inputs["actions"])
        return Evaluated(*(tensor.masked_fill(padding, math.nan) for tensor in now))

    again = update(evaluate, junk, PPO, sgd(learner), generator=generator())
    same(weights(learner), expected)
    assert dataclasses.asdict(again) == pytest.approx(dataclasses.asdict(told), rel=1e-12)
    assert told.ratio_max < 1


def test_a_minibatch_of_padding_alone_is_a_step_of_nothing():
    given = rollout()
    empty = dataclasses.replace(given, mask=torch.zeros_like(given.mask))
    found, told = learn(empty, dataclasses.replace(PPO, whiten=False, target_kl=0.1))
    assert torch.equal(found, weights(model()))
    assert (told.steps, told.policy_loss, told.kl, told.grad_norm) == (4, 0, 0, 0)


def test_each_row_comes_once_an_epoch_in_orders_that_differ():
    evaluate = Evaluate(learner := model())
    objective = Objective(epochs=3, minibatches=4)
    told = update(evaluate, rollout(), objective, sgd(learner), generator=generator())
    assert [len(rows) for rows in evaluate.rows] == [2, 3, 3, 3] * 3
    epochs = [list(chain(*evaluate.rows[start : start + 4])) for start in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, range(11)]}) == 4
    assert (told.epochs, told.steps, told.stopped_early) == (3, 12, False)


def test_the_order_comes_from_the_generator_and_nothing_else_is_drawn():
    given, orders = rollout(), []
    for seed in (0, 0, 1):
        evaluate = Evaluate(learner := model())
        torch.manual_seed(len(orders))
        state = torch.get_rng_state()
        update(evaluate, given, Objective(minibatches=3), sgd(learner), generator=generator(seed))
        assert torch.equal(torch.get_rng_state(), state)
        orders.append(evaluate.rows)
    assert orders[0] == orders[1] != orders[2]


# --- what is told, when to stop ---


def test_diagnostics_by_hand():
    # Two tokens, log-ratios log 2 and 0 before the only step, and one token of padding; SGD with lr 0.
    two = math.log(2)
    given = Rollout(
        {},
        logps=torch.tensor([[-1.0 - two, -1.0, 7.0]]),
        advantages=torch.tensor([[3.0, -1.0, 7.0]]),
        mask=torch.tensor([[True, True, False]]),
        values=torch.tensor([[0.0, 1.0, 7.0]]),
        returns=torch.tensor([[1.0, 5.0, 7.0]]),
    )
    logps = torch.tensor([[-1.0, -1.0, 5.0]], requires_grad=True)
    entropies, values = torch.tensor([[0.5, 0.7, 9.0]]), torch.tensor([[0.0, 2.0, 9.0]])
    told = update(
        lambda _: Evaluated(1 * logps, entropies, values),
        given,
        Objective(clip_low=0.2, clip_high=0.5, epochs=2),
        torch.optim.SGD([logps], lr=0.0),
        generator=generator(),
    )
    assert dataclasses.asdict(told) == pytest.approx(
        {
            "policy_loss": (-3 * 1.5 + 1) / 2,
            "value_loss": (0.5 * 1**2 + 0.5 * 3**2) / 2,
            "entropy": 0.6,
            "kl": (2 - 1 - two) / 2,
            "clip_fraction": 0.5,
            "ratio_max": 2.0,
            "explained_variance": 1 - 2.25 / 4,  # errors 1 and 4, returns 1 and 5
            "grad_norm": 0.5,  # the first is clipped; the second: ratio 1 * advantage -1 / 2 tokens
            "epochs": 2,
            "steps": 2,
            "stopped_early": False,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(("shift", "expected"), [(-0.3, 1.0), (-0.1, 0.0), (0.3, 0.0), (0.4, 1.0)])
def test_the_clip_fraction_counts_on_both_sides(shift, expected):
    # ratios 0.74, 0.90, 1.35 and 1.49, and 0.8 to 1.4 is inside
    given = rollout()
    given = dataclasses.replace(given, logps=given.logps - shift)
    _, told = learn(given, Objective(clip_low=0.2, clip_high=0.4))
    assert told.clip_fraction == expected


def test_what_is_not_there_is_nan():
    given = dataclasses.replace(rollout(), values=None, returns=None)
    learner = model()

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        return Evaluated(learner(inputs["seen"], inputs["actions"])[0])

    told = update(evaluate, given, Objective(), sgd(learner), generator=generator())
    assert math.isnan(told.value_loss)
    assert math.isnan(told.entropy)
    assert math.isnan(told.explained_variance)
    assert math.isfinite(told.policy_loss)
    assert weights(learner).isfinite().all()


@pytest.mark.parametrize(("factor", "stops"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_kl_that_stops_is_that_of_the_minibatch_before_its_step(factor, stops, pieces):
    # new - old = 0.5 for every token: k3 is e^0.5 - 1 - 0.5
    given = rollout()
    given = dataclasses.replace(given, logps=given.logps - 0.5)
    kl = math.exp(0.5) - 1.5
    objective = Objective(micro_batches=pieces, target_kl=factor * kl)
    found, told = learn(given, objective)
    assert told.kl == pytest.approx(kl, rel=1e-12)
    assert told.stopped_early == stops
    assert (told.epochs, told.steps) == ((0, 0) if stops else (1, 1))
    assert torch.equal(found, weights(model())) == stops
    assert math.isnan(told.grad_norm) == stops


def test_an_update_that_went_too_far_stops_in_the_middle_and_leaves_no_gradients():
    learner = model()
    objective = dataclasses.replace(PPO, epochs=5, target_kl=0.01, max_grad_norm=math.inf)
    told = update(Evaluate(learner), rollout(), objective, sgd(learner), generator=generator())
    assert told.stopped_early
    assert 0 < told.steps < 10
    assert told.epochs == told.steps // 2
    assert all(p.grad is None for p in learner.parameters())

    # Those steps are the first ones of the run without a target.
    other = model()
    epochs = dataclasses.replace(objective, epochs=told.steps // 2, target_kl=None)
    if told.steps % 2 == 0:
        update(Evaluate(other), rollout(), epochs, sgd(other), generator=generator())
        assert torch.equal(weights(learner), weights(other))


def test_with_a_target_a_nan_stops_before_it_reaches_the_weights():
    given = rollout()
    broken = dataclasses.replace(given, logps=given.logps * math.nan)
    found, told = learn(broken, Objective(target_kl=1e9))
    assert told.stopped_early
    assert torch.equal(found, weights(model()))


def test_the_gradient_norm_is_bounded_and_told_as_it_was_before():
    given, start = rollout(), weights(model())
    free, told = learn(given, Objective())
    assert told.grad_norm == pytest.approx((free - start).norm().item(), rel=1e-9)
    bound = told.grad_norm / 3
    held, again = learn(given, Objective(max_grad_norm=bound))
    assert (held - start).norm().item() == pytest.approx(bound, rel=1e-5)  # torch adds 1e-6
    assert (held - start).norm().item() <= bound
    assert again.grad_norm == told.grad_norm


def test_the_norm_that_is_told_is_the_mean_over_the_steps():
    learner, norms = model(), []

    def clip(parameters: list[Tensor], bound: float) -> Tensor:
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    told = update(
        Evaluate(learner),
        rollout(),
        PPO,
        sgd(learner),
        generator=generator(),
        clip_gradients=clip,
    )
    assert len(set(norms)) == 4
    assert told.grad_norm == pytest.approx(sum(norms) / 4, rel=1e-12)


def test_only_the_given_parameters_are_clipped_and_the_callers_functions_are_used():
    learner, losses, clipped = model(), [], []

    def backward(loss: Tensor) -> None:
        losses.append(loss.detach())
        loss.backward()

    def clip(parameters: list[Tensor], bound: float) -> Tensor:
        clipped.append((parameters, bound))
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    told = update(
        Evaluate(learner),
        rollout(),
        Objective(max_grad_norm=0.5),
        sgd(learner),
        generator=generator(),
        parameters=learner.policy.parameters(),
        backward=backward,
        clip_gradients=clip,
    )
    ((parameters, bound),) = clipped
    assert all(a is b for a, b in zip(parameters, learner.policy.parameters(), strict=True))
    assert bound == 0.5
    assert losses[0].item() == pytest.approx(told.policy_loss + 0.5 * told.value_loss, rel=1e-12)


def test_gradients_of_earlier_days_do_not_count():
    expected, _ = learn(rollout(), PPO)
    learner = model()
    for p in learner.parameters():
        p.grad = torch.ones_like(p)
    update(Evaluate(learner), rollout(), PPO, sgd(learner), generator=generator())
    assert torch.equal(weights(learner), expected)


def test_a_run_that_was_saved_between_updates_is_the_same_run(tmp_path):
    def start() -> tuple[Model, torch.optim.Adam, torch.Generator]:
        learner = model()
        return learner, torch.optim.Adam(learner.parameters(), lr=0.01, eps=1e-5), generator(5)

    learner, adam, orders = start()
    for _ in range(4):
        update(Evaluate(learner), rollout(), PPO, adam, generator=orders)
    expected = weights(learner)

    learner, adam, orders = start()
    for _ in range(2):
        update(Evaluate(learner), rollout(), PPO, adam, generator=orders)
    state = {"model": learner.state_dict(), "adam": adam.state_dict(), "orders": orders.get_state()}
    torch.save(state, tmp_path / "checkpoint.pt")

    learner, adam, orders = start()
    state = torch.load(tmp_path / "checkpoint.pt")
    learner.load_state_dict(state["model"])
    adam.load_state_dict(state["adam"])
    orders.set_state(state["orders"])
    for _ in range(2):
        update(Evaluate(learner), rollout(), PPO, adam, generator=orders)
    assert torch.equal(weights(learner), expected)


# --- mistakes ---


def test_fewer_rows_than_pieces_are_refused():
    with pytest.raises(ValueError, match="11 rows cannot fill 12 pieces"):
        learn(rollout(), Objective(minibatches=4, micro_batches=3))


@pytest.mark.parametrize("missing", ["values", "returns"])
def test_values_and_returns_come_together(missing):
    with pytest.raises(ValueError, match="come together or not at all"):
        learn(dataclasses.replace(rollout(), **{missing: None}), Objective())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"values": None}, "gave no values", id="no values"),
        pytest.param({"entropy": None}, "gave no entropy", id="no entropy"),
        pytest.param(
            {"logps": torch.zeros(11)},
            r"evaluate: logps has shape \(11,\), .* \(11, 5\)",
            id="flat",
        ),
    ],
)
def test_what_evaluate_fails_to_give_is_named(change, message):
    zeros = torch.zeros(11, 5, dtype=torch.float64, requires_grad=True)
    now = Evaluated(zeros, zeros, zeros)._replace(**change)
    with pytest.raises(ValueError, match=message):
        update(
            lambda _: now,
            rollout(),
            Objective(entropy_coef=0.1),
            torch.optim.SGD([zeros], lr=1.0),
            generator=generator(),
        )


# --- rollouts ---


def test_rows_are_taken_split_and_moved_with_all_that_belongs_to_them():
    given = dataclasses.replace(rollout(), weights=rollout().advantages)
    order = torch.tensor([3, 0, 3])
    taken = given.take(order)
    assert len(taken) == 3
    parts = given.split(4)
    assert [len(part) for part in parts] == [2, 3, 3, 3]
    moved = given.to("meta")
    for name in ("logps", "advantages", "mask", "values", "returns", "weights"):
        whole = getattr(given, name)
        assert torch.equal(getattr(taken, name), whole[order])
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
        assert getattr(moved, name).device.type == "meta"
    assert taken.inputs["row"].tolist() == [3, 0, 3]
    assert torch.cat([part.inputs["row"] for part in parts]).tolist() == list(range(11))
    assert moved.inputs["seen"].device.type == "meta"
    assert dataclasses.replace(given, values=None).take(order).values is None


# --- bandits ---


def test_ppo_finds_the_best_arm():
    logits = torch.zeros(3, requires_grad=True)
    rewards, draw = torch.tensor([0.0, 1.0, 0.5]), generator(0)
    adam = torch.optim.Adam([logits], lr=0.1)
    objective = Objective(epochs=4, minibatches=2, clip_low=0.2, clip_high=0.2, whiten=True)

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        return Evaluated(logits.log_softmax(0)[inputs["arm"]][:, None])

    for _ in range(30):
        arms = torch.multinomial(logits.detach().softmax(0), 64, replacement=True, generator=draw)
        inputs = {"arm": arms}
        with torch.no_grad():
            logps = evaluate(inputs).logps
        mask = torch.ones_like(logps).bool()
        given = Rollout(inputs, logps, rewards[arms][:, None], mask)
        update(evaluate, given, objective, adam, generator=draw)
    assert logits.softmax(0)[1] > 0.98


def test_with_an_entropy_bonus_the_policy_becomes_softmax_of_reward_over_coefficient():
    # argmax of E[r] + c * H is softmax(r / c). Every arm once, weighted by its probability: no sampling noise is left.
    rewards, coefficient = torch.tensor([[1.0], [0.0], [0.4]]).double(), 0.5
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    uniform = torch.full((3, 1), math.log(1 / 3), dtype=torch.float64)

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        logps = logits.log_softmax(0)
        own = -(logps.exp() * logps).sum().expand(len(inputs["arm"]), 1)
        return Evaluated(logps[inputs["arm"]][:, None], own)

    inputs, sgd = {"arm": torch.arange(3)}, torch.optim.SGD([logits], lr=4.0)
    for _ in range(150):
        with torch.no_grad():
            logps = evaluate(inputs).logps
        drawn = importance_weights(logps, uniform, cap=math.inf)
        given = Rollout(inputs, logps, rewards, torch.ones(3, 1).bool(), weights=drawn)
        update(evaluate, given, Objective(entropy_coef=coefficient), sgd, generator=generator())
    same(logits.softmax(0), (rewards[:, 0] / coefficient).softmax(0))


# --- two processes ---


WHOLE = dataclasses.replace(PPO, minibatches=1, micro_batches=2)
STOP = dataclasses.replace(WHOLE, epochs=4, target_kl=0.04, max_grad_norm=math.inf)


def far(rank: int) -> Tensor:
    """Log-ratios of the rank's tokens: k3 is 0.149 on rank 0 and 0.005 on rank 1."""
    return torch.full((6, 5), (0.5, 0.1)[rank], dtype=torch.float64)


def worlds() -> dict[str, tuple[Rollout, Objective]]:
    """The whole rollouts; the last is beyond its target on rank 0 and on average, but not on rank 1."""
    near = rollout(12)
    apart = dataclasses.replace(near, logps=near.logps - torch.cat([far(0), far(1)]))
    return {"whole": (rollout(12, off=0.3), WHOLE), "stop": (near, STOP), "apart": (apart, STOP)}


def half(given: Rollout, rank: int) -> Rollout:
    """The rank's half of an even number of rows, ragged as they are."""
    return given.split(2)[rank]


def statistics(given: Rollout) -> dict[str, Any]:
    return {
        "mean": masked_mean(given.advantages, given.mask),
        "variance": masked_var(given.advantages, given.mask),
        "whitened": masked_whiten(given.advantages, given.mask),
        "scaled": masked_scale(given.advantages, given.mask),
        "max": max_over_ranks(given.advantages.amax()),
    }


def one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found = statistics(half(rollout(12, off=0.3), rank))
    for name, (given, objective) in worlds().items():
        learner = DistributedDataParallel(model())
        mine = half(given, rank)
        told = update(Evaluate(learner), mine, objective, sgd(learner), generator=generator(rank))
        found[name] = (weights(learner), dataclasses.asdict(told))
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_processes_whiten_as_one(two):
    given = rollout(12, off=0.3)
    assert given.split(2)[0].mask.sum() != given.split(2)[1].mask.sum()
    one = statistics(given)
    for name in ("mean", "variance", "max"):
        same(two[0][name], one[name])
        assert torch.equal(two[0][name], two[1][name])
    for name in ("whitened", "scaled"):
        same(torch.cat([rank[name] for rank in two]), one[name])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("whole", 2, id="all steps"),
        pytest.param("stop", 2, id="both stop after the second"),
        pytest.param("apart", 0, id="both stop, though only one would"),
    ],
)
def test_two_processes_learn_the_same_as_one_with_all_rows(two, name, steps):
    found, told = learn(*worlds()[name])
    assert told.steps == steps
    assert told.stopped_early == (name != "whole")
    for rank in two:
        same(rank[name][0], found)
        assert rank[name][1] == pytest.approx(dataclasses.asdict(told), rel=1e-12, nan_ok=True)
    assert torch.equal(two[0][name][0], two[1][name][0])


def test_settings_and_rollouts_cannot_be_changed_by_mistake():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPO.epochs = 3
    with pytest.raises(TypeError, match="epohcs"):
        Objective(epohcs=3)
    assert copy.copy(PPO) == PPO
