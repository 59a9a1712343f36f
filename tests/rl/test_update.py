"""One update: against steps by hand, in micro-batches, on two ranks, resumed, and on bandits."""

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
from helpers import forks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from align.functional.masked import (
    masked_scale,
    masked_var,
    masked_whiten,
    max_over_ranks,
    sum_over_ranks,
)
from align.functional.policy_gradient import importance_weights, reinforce_loss
from align.rl.objective import Objective
from align.rl.rollout import Rollout
from align.rl.update import Diagnostics, Evaluated, update

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)

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
    """Logits and value of a token from its observation, in float64 to make round-off negligible."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8, dtype=torch.float64)
        self.policy = nn.Linear(8, 3, dtype=torch.float64)
        self.value = nn.Linear(8, 1, dtype=torch.float64)

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        body = self.body(observations).tanh()
        logps = self.policy(body).log_softmax(-1)
        action_logps = logps.gather(-1, actions[..., None])[..., 0]
        return action_logps, -(logps.exp() * logps).sum(-1), self.value(body)[..., 0]


class Evaluate:
    """An evaluator that records the rows that ``update`` passed to it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: list[list[int]] = []

    def __call__(self, inputs: dict[str, Tensor]) -> Evaluated:
        self.rows.append(inputs["row"].tolist())
        return Evaluated(*self.model(inputs["observations"], inputs["actions"]))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def sgd(module: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=lr)


def rollout(rows: int = 11, time: int = 5, *, noise: float = 0.0) -> Rollout:
    """Rows of 1 to ``time`` tokens by the policy of :func:`model`.

    Its log-probabilities and values have normal ``noise`` added, as if they were older.
    """
    draw = generator(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = {
        "row": torch.arange(rows),
        "observations": normal(rows, time, 4),
        "actions": torch.randint(3, (rows, time), generator=draw),
    }
    lengths = torch.randint(1, time + 1, (rows, 1), generator=draw)
    with torch.no_grad():
        logps, _, values = model()(inputs["observations"], inputs["actions"])
    return Rollout(
        inputs,
        logps=logps + noise * normal(rows, time),
        advantages=normal(rows, time) + 0.5,
        mask=torch.arange(time) < lengths,
        values=values + noise * normal(rows, time),
        returns=values + normal(rows, time),
    )


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def learn(batch: Rollout, objective: Objective, *, lr: float = 1.0) -> tuple[Tensor, Diagnostics]:
    """The weights after one update of :func:`model`, and its diagnostics."""
    learner = model()
    diagnostics = update(
        Evaluate(learner), batch, objective, sgd(learner, lr), generator=generator()
    )
    return weights(learner), diagnostics


def same(left: Tensor, right: Tensor) -> None:
    assert_close(left, right, rtol=0, atol=1e-12)


# --- three algorithms, one update ---


def test_the_first_step_is_bitwise_that_of_reinforce_for_any_clip():
    batch = dataclasses.replace(rollout(), values=None, returns=None)
    plain, _ = learn(batch, Objective())
    clipped, _ = learn(batch, Objective(clip_low=0.2, clip_high=0.2, dual_clip=3.0))
    assert torch.equal(plain, clipped)

    learner = model()
    logps, _, _ = learner(batch.inputs["observations"], batch.inputs["actions"])
    loss = reinforce_loss(logps, batch.advantages)[batch.mask].sum() / batch.mask.sum()
    loss.backward()
    with torch.no_grad():
        for p in learner.parameters():
            p -= 0 if p.grad is None else p.grad
    same(plain, weights(learner))
    assert not torch.equal(plain, weights(model()))


def by_hand(batch: Rollout, objective: Objective, lr: float) -> Tensor:
    """The weights after an update computed token by token, with min and max of Python."""
    learner, order = model(), generator()
    advantages = batch.advantages

    def whitened(rows: Any) -> Tensor:
        valid = batch.advantages[rows][batch.mask[rows]]
        return (batch.advantages - valid.mean()) / (valid.var(correction=0) + 1e-8).sqrt()

    if objective.whiten is True:
        advantages = whitened(...)
    for _ in range(objective.epochs):
        shuffled = torch.randperm(len(batch), generator=order)
        for rows in shuffled.split(math.ceil(len(batch) / objective.minibatches)):
            logps, entropies, values = learner(
                batch.inputs["observations"], batch.inputs["actions"]
            )
            if objective.whiten == "minibatch":
                advantages = whitened(rows)
            losses = []
            for at in [(int(b), t) for b in rows for t in range(batch.mask.shape[1])]:
                if not batch.mask[at]:
                    continue
                ratio, advantage = (logps[at] - batch.logps[at]).exp(), advantages[at]
                low, high = 1 - objective.clip_low, 1 + objective.clip_high
                gain = min(ratio * advantage, min(max(ratio, low), high) * advantage)
                if objective.dual_clip is not None and advantage < 0:
                    gain = max(gain, objective.dual_clip * advantage)
                if batch.ref_logps is not None:
                    k3 = [
                        (r - new).exp() - 1 - (r - new)
                        for new, r in zip(logps[at[0]], batch.ref_logps[at[0]], strict=True)
                    ]
                    n_tokens = int(batch.mask[at[0]].sum())
                    later = sum(each.item() for each in k3[at[1] + 1 : n_tokens])
                    gain = gain - objective.kl_coef * ratio * (k3[at[1]] + later)
                if batch.weights is not None:
                    gain = gain * batch.weights[at]
                error = (values[at] - batch.returns[at]) ** 2
                if objective.value_clip is not None:
                    step = values[at] - batch.values[at]
                    step = min(max(step, -objective.value_clip), objective.value_clip)
                    error = max(error, (batch.values[at] + step - batch.returns[at]) ** 2)
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
            dataclasses.replace(PPO, whiten="minibatch"), id="PPO, normalized in minibatches"
        ),
        pytest.param(
            dataclasses.replace(
                PPO, value_clip=None, dual_clip=None, max_grad_norm=math.inf, whiten=False
            ),
            id="PPO without value clip, dual clip, gradient clip and normalization",
        ),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_an_update_equals_the_one_by_hand(objective, weighted, kl_coef):
    # Old policy and critic differ from the new: both clips are active from the first step.
    batch = rollout(rows=10, noise=0.6)
    if weighted:
        draw = torch.rand(10, 5, generator=generator(2), dtype=torch.float64)
        batch = dataclasses.replace(batch, weights=2 * draw)
    if kl_coef:
        reference = batch.logps + torch.randn(10, 5, generator=generator(3), dtype=torch.float64)
        batch = dataclasses.replace(batch, ref_logps=reference)
        objective = dataclasses.replace(objective, kl_coef=kl_coef)
    updated, _ = learn(batch, objective, lr=0.3)
    same(updated, by_hand(batch, objective, lr=0.3))


# --- micro-batches and padding ---


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_micro_batches_change_no_gradient(pieces):
    batch = rollout(noise=0.3)
    whole = dataclasses.replace(PPO, minibatches=1)
    expected, diagnostics = learn(batch, whole)
    updated, repeated = learn(batch, dataclasses.replace(whole, micro_batches=pieces))
    same(updated, expected)
    assert dataclasses.asdict(repeated) == pytest.approx(dataclasses.asdict(diagnostics), rel=1e-12)


def test_micro_batches_pass_through_the_model_one_at_a_time():
    evaluate = Evaluate(learner := model())
    objective = Objective(minibatches=2, micro_batches=3)
    update(evaluate, rollout(), objective, sgd(learner), generator=generator())
    assert [len(rows) for rows in evaluate.rows] == [1, 2, 2, 2, 2, 2]


def test_padding_is_never_read_and_changes_neither_weights_nor_diagnostics():
    batch = rollout(noise=0.3)
    # No ratio above 1: the maximum must not come from the padding.
    batch = dataclasses.replace(batch, logps=batch.logps + 3.0)
    expected, diagnostics = learn(batch, PPO)
    rows, extra = len(batch), 4

    def padded(tensor: Tensor) -> Tensor:
        junk = torch.full((rows, extra), math.nan, dtype=tensor.dtype)
        return torch.cat([tensor.masked_fill(~batch.mask, math.nan), junk], dim=1)

    wide = {
        "row": batch.inputs["row"],
        "observations": torch.cat(
            [batch.inputs["observations"], torch.ones(rows, extra, 4).double()], dim=1
        ),
        "actions": torch.cat([batch.inputs["actions"], torch.zeros(rows, extra).long()], dim=1),
    }
    junk = Rollout(
        wide,
        logps=padded(batch.logps),
        advantages=padded(batch.advantages),
        mask=torch.cat([batch.mask, torch.zeros(rows, extra).bool()], dim=1),
        values=padded(batch.values),
        returns=padded(batch.returns),
        weights=padded(torch.ones_like(batch.logps)),
    )
    learner = model()

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        padding = ~junk.mask[inputs["row"]]
        outputs = learner(inputs["observations"], inputs["actions"])
        return Evaluated(*(tensor.masked_fill(padding, math.nan) for tensor in outputs))

    repeated = update(evaluate, junk, PPO, sgd(learner), generator=generator())
    same(weights(learner), expected)
    assert dataclasses.asdict(repeated) == pytest.approx(dataclasses.asdict(diagnostics), rel=1e-12)
    assert diagnostics.ratio_max < 1


def test_a_minibatch_of_padding_alone_changes_no_weight():
    batch = rollout()
    empty = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    updated, diagnostics = learn(empty, dataclasses.replace(PPO, whiten=False, target_kl=0.1))
    assert torch.equal(updated, weights(model()))
    assert (diagnostics.steps, diagnostics.policy_loss, diagnostics.kl, diagnostics.grad_norm) == (
        4,
        0,
        0,
        0,
    )


def test_each_epoch_takes_every_row_once_in_an_order_that_differs():
    evaluate = Evaluate(learner := model())
    objective = Objective(epochs=3, minibatches=4)
    diagnostics = update(evaluate, rollout(), objective, sgd(learner), generator=generator())
    assert [len(rows) for rows in evaluate.rows] == [2, 3, 3, 3] * 3
    epochs = [list(chain(*evaluate.rows[start : start + 4])) for start in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, range(11)]}) == 4
    assert (diagnostics.epochs, diagnostics.steps, diagnostics.stopped_early) == (3, 12, False)


def test_the_order_comes_from_the_generator_alone():
    batch, orders = rollout(), []
    for seed in (0, 0, 1):
        evaluate = Evaluate(learner := model())
        torch.manual_seed(len(orders))
        state = torch.get_rng_state()
        update(evaluate, batch, Objective(minibatches=3), sgd(learner), generator=generator(seed))
        assert torch.equal(torch.get_rng_state(), state)
        orders.append(evaluate.rows)
    assert orders[0] == orders[1] != orders[2]


# --- diagnostics, early stopping ---


def test_diagnostics_by_hand():
    # Two tokens, log-ratios log 2 and 0 before the only step, and one token of padding; SGD with lr
    # 0.
    log_2 = math.log(2)
    batch = Rollout(
        {},
        logps=torch.tensor([[-1.0 - log_2, -1.0, 7.0]]),
        advantages=torch.tensor([[3.0, -1.0, 7.0]]),
        mask=torch.tensor([[True, True, False]]),
        values=torch.tensor([[0.0, 1.0, 7.0]]),
        returns=torch.tensor([[1.0, 5.0, 7.0]]),
    )
    logps = torch.tensor([[-1.0, -1.0, 5.0]], requires_grad=True)
    entropies, values = torch.tensor([[0.5, 0.7, 9.0]]), torch.tensor([[0.0, 2.0, 9.0]])
    diagnostics = update(
        lambda _: Evaluated(1 * logps, entropies, values),
        batch,
        Objective(clip_low=0.2, clip_high=0.5, epochs=2),
        torch.optim.SGD([logps], lr=0.0),
        generator=generator(),
    )
    assert dataclasses.asdict(diagnostics) == pytest.approx(
        {
            "policy_loss": (-3 * 1.5 + 1) / 2,
            "value_loss": (0.5 * 1**2 + 0.5 * 3**2) / 2,
            "entropy": 0.6,
            "kl": (2 - 1 - log_2) / 2,
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
    batch = rollout()
    batch = dataclasses.replace(batch, logps=batch.logps - shift)
    _, diagnostics = learn(batch, Objective(clip_low=0.2, clip_high=0.4))
    assert diagnostics.clip_fraction == expected


def test_diagnostics_that_do_not_apply_are_nan():
    batch = dataclasses.replace(rollout(), values=None, returns=None)
    learner = model()

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        return Evaluated(learner(inputs["observations"], inputs["actions"])[0])

    diagnostics = update(evaluate, batch, Objective(), sgd(learner), generator=generator())
    assert math.isnan(diagnostics.value_loss)
    assert math.isnan(diagnostics.entropy)
    assert math.isnan(diagnostics.explained_variance)
    assert math.isfinite(diagnostics.policy_loss)
    assert weights(learner).isfinite().all()


@pytest.mark.parametrize(("factor", "stops"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_an_update_stops_by_the_kl_of_a_minibatch_before_its_step(factor, stops, pieces):
    # new - old = 0.5 for every token: k3 is e^0.5 - 1 - 0.5
    batch = rollout()
    batch = dataclasses.replace(batch, logps=batch.logps - 0.5)
    kl = math.exp(0.5) - 1.5
    objective = Objective(micro_batches=pieces, target_kl=factor * kl)
    updated, diagnostics = learn(batch, objective)
    assert diagnostics.kl == pytest.approx(kl, rel=1e-12)
    assert diagnostics.stopped_early == stops
    assert (diagnostics.epochs, diagnostics.steps) == ((0, 0) if stops else (1, 1))
    assert torch.equal(updated, weights(model())) == stops
    assert math.isnan(diagnostics.grad_norm) == stops


def test_an_update_beyond_its_target_stops_early_and_leaves_no_gradients():
    learner = model()
    objective = dataclasses.replace(PPO, epochs=5, target_kl=0.01, max_grad_norm=math.inf)
    diagnostics = update(
        Evaluate(learner), rollout(), objective, sgd(learner), generator=generator()
    )
    assert diagnostics.stopped_early
    assert 0 < diagnostics.steps < 10
    assert diagnostics.epochs == diagnostics.steps // 2
    assert all(p.grad is None for p in learner.parameters())

    # Its steps are the first ones of the update without a target.
    other = model()
    epochs = dataclasses.replace(objective, epochs=diagnostics.steps // 2, target_kl=None)
    if diagnostics.steps % 2 == 0:
        update(Evaluate(other), rollout(), epochs, sgd(other), generator=generator())
        assert torch.equal(weights(learner), weights(other))


def test_with_a_target_nan_stops_the_update_before_it_reaches_the_weights():
    batch = rollout()
    broken = dataclasses.replace(batch, logps=batch.logps * math.nan)
    updated, diagnostics = learn(broken, Objective(target_kl=1e9))
    assert diagnostics.stopped_early
    assert torch.equal(updated, weights(model()))


def test_gradients_are_clipped_and_the_reported_norm_is_that_before_clipping():
    batch, start = rollout(), weights(model())
    free, diagnostics = learn(batch, Objective())
    assert diagnostics.grad_norm == pytest.approx((free - start).norm().item(), rel=1e-9)
    bound = diagnostics.grad_norm / 3
    held, repeated = learn(batch, Objective(max_grad_norm=bound))
    assert (held - start).norm().item() == pytest.approx(bound, rel=1e-5)  # torch adds 1e-6
    assert (held - start).norm().item() <= bound
    assert repeated.grad_norm == diagnostics.grad_norm


def test_the_reported_norm_is_the_mean_over_the_steps():
    learner, norms = model(), []

    def clip(parameters: list[Tensor], bound: float) -> Tensor:
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    diagnostics = update(
        Evaluate(learner),
        rollout(),
        PPO,
        sgd(learner),
        generator=generator(),
        clip_gradients=clip,
    )
    assert len(set(norms)) == 4
    assert diagnostics.grad_norm == pytest.approx(sum(norms) / 4, rel=1e-12)


def test_only_the_passed_parameters_are_clipped_by_the_passed_functions():
    learner, losses, clipped = model(), [], []

    def backward(loss: Tensor) -> None:
        losses.append(loss.detach())
        loss.backward()

    def clip(parameters: list[Tensor], bound: float) -> Tensor:
        clipped.append((parameters, bound))
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    diagnostics = update(
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
    assert losses[0].item() == pytest.approx(
        diagnostics.policy_loss + 0.5 * diagnostics.value_loss, rel=1e-12
    )


def test_earlier_gradients_are_discarded():
    expected, _ = learn(rollout(), PPO)
    learner = model()
    for p in learner.parameters():
        p.grad = torch.ones_like(p)
    update(Evaluate(learner), rollout(), PPO, sgd(learner), generator=generator())
    assert torch.equal(weights(learner), expected)


def test_a_run_resumed_between_updates_is_bitwise_the_uninterrupted_run(tmp_path):
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


# --- errors ---


def test_fewer_rows_than_micro_batches_are_refused():
    with pytest.raises(ValueError, match="11 rows are fewer than the 12 micro-batches"):
        learn(rollout(), Objective(minibatches=4, micro_batches=3))


@pytest.mark.parametrize("missing", ["values", "returns"])
def test_values_without_returns_are_refused_and_returns_without_values(missing):
    with pytest.raises(ValueError, match="both values and returns or neither, got only one"):
        learn(dataclasses.replace(rollout(), **{missing: None}), Objective())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"values": None}, "returned no values", id="no values"),
        pytest.param({"entropy": None}, "returned no entropy", id="no entropy"),
        pytest.param(
            {"logps": torch.zeros(11)},
            r"evaluate: logps has shape \(11,\), expected .* \(11, 5\)",
            id="flat",
        ),
    ],
)
def test_an_output_that_evaluate_lacks_is_named(change, message):
    zeros = torch.zeros(11, 5, dtype=torch.float64, requires_grad=True)
    outputs = Evaluated(zeros, zeros, zeros)._replace(**change)
    with pytest.raises(ValueError, match=message):
        update(
            lambda _: outputs,
            rollout(),
            Objective(entropy_coef=0.1),
            torch.optim.SGD([zeros], lr=1.0),
            generator=generator(),
        )


# --- rollouts ---


def test_all_tensors_of_a_rollout_are_taken_split_and_moved_together():
    batch = rollout()
    batch = dataclasses.replace(batch, weights=batch.advantages, ref_logps=batch.logps - 1)
    order = torch.tensor([3, 0, 3])
    taken = batch.take(order)
    assert len(taken) == 3
    parts = batch.split(4)
    assert [len(part) for part in parts] == [2, 3, 3, 3]
    moved = batch.to("meta")
    for name in ("logps", "advantages", "mask", "values", "returns", "weights", "ref_logps"):
        whole = getattr(batch, name)
        assert torch.equal(getattr(taken, name), whole[order])
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
        assert getattr(moved, name).device.type == "meta"
    assert taken.inputs["row"].tolist() == [3, 0, 3]
    assert torch.cat([part.inputs["row"] for part in parts]).tolist() == list(range(11))
    assert moved.inputs["observations"].device.type == "meta"
    assert dataclasses.replace(batch, values=None).take(order).values is None


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
        batch = Rollout(inputs, logps, rewards[arms][:, None], mask)
        update(evaluate, batch, objective, adam, generator=draw)
    assert logits.softmax(0)[1] > 0.98


def test_with_an_entropy_bonus_the_policy_converges_to_softmax_of_reward_over_coefficient():
    # argmax of E[r] + c * H is softmax(r / c). Every arm once, weighted by its probability:
    # no sampling noise.
    rewards, coefficient = torch.tensor([[1.0], [0.0], [0.4]]).double(), 0.5
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    uniform = torch.full((3, 1), math.log(1 / 3), dtype=torch.float64)

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        logps = logits.log_softmax(0)
        entropy = -(logps.exp() * logps).sum().expand(len(inputs["arm"]), 1)
        return Evaluated(logps[inputs["arm"]][:, None], entropy)

    inputs, sgd = {"arm": torch.arange(3)}, torch.optim.SGD([logits], lr=4.0)
    for _ in range(150):
        with torch.no_grad():
            logps = evaluate(inputs).logps
        importance = importance_weights(logps, uniform, cap=math.inf)
        batch = Rollout(inputs, logps, rewards, torch.ones(3, 1).bool(), weights=importance)
        update(evaluate, batch, Objective(entropy_coef=coefficient), sgd, generator=generator())
    same(logits.softmax(0), (rewards[:, 0] / coefficient).softmax(0))


# --- two ranks ---


WHOLE = dataclasses.replace(PPO, minibatches=1, micro_batches=2)
STOP = dataclasses.replace(WHOLE, epochs=4, target_kl=0.04, max_grad_norm=math.inf)


def shift(rank: int) -> Tensor:
    """Log-ratios of the rank's tokens: k3 is 0.149 on rank 0 and 0.005 on rank 1."""
    return torch.full((6, 5), (0.5, 0.1)[rank], dtype=torch.float64)


def cases() -> dict[str, tuple[Rollout, Objective]]:
    """Rollouts of both ranks together, with objectives.

    The last exceeds its target on rank 0 and on average, but not on rank 1.
    """
    exact = rollout(12)
    apart = dataclasses.replace(exact, logps=exact.logps - torch.cat([shift(0), shift(1)]))
    noisy = rollout(12, noise=0.3)
    by_rows = dataclasses.replace(WHOLE, aggregate="sequence", ratio="sequence")
    by_length = dataclasses.replace(WHOLE, aggregate="constant", longest=5, loss="cispo")
    return {
        "whole": (noisy, WHOLE),
        "sequence": (noisy, by_rows),
        "constant": (noisy, by_length),
        "stop": (exact, STOP),
        "apart": (apart, STOP),
    }


def half(batch: Rollout, rank: int) -> Rollout:
    """The rank's half of an even number of rows, of different lengths."""
    return batch.split(2)[rank]


def statistics(batch: Rollout) -> dict[str, Any]:
    return {
        "sum": sum_over_ranks(batch.advantages[batch.mask].sum()),
        "variance": masked_var(batch.advantages, batch.mask),
        "whitened": masked_whiten(batch.advantages, batch.mask),
        "scaled": masked_scale(batch.advantages, batch.mask),
        "max": max_over_ranks(batch.advantages.amax()),
    }


def run_rank(folder: Path) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = statistics(half(rollout(12, noise=0.3), rank))
    for name, (batch, objective) in cases().items():
        learner = DistributedDataParallel(model())
        own_rows = half(batch, rank)
        diagnostics = update(
            Evaluate(learner), own_rows, objective, sgd(learner), generator=generator(rank)
        )
        results[name] = (weights(learner), dataclasses.asdict(diagnostics))
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    log = folder / "log"
    with forks.ranks(run_rank, folder, log=log) as ranks:
        assert [forks.wait(rank) for rank in ranks] == [0, 0], log.read_text()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_two_ranks_whiten_as_one(two):
    batch = rollout(12, noise=0.3)
    assert batch.split(2)[0].mask.sum() != batch.split(2)[1].mask.sum()
    one = statistics(batch)
    for name in ("sum", "variance", "max"):
        same(two[0][name], one[name])
        assert torch.equal(two[0][name], two[1][name])
    for name in ("whitened", "scaled"):
        same(torch.cat([rank[name] for rank in two]), one[name])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("whole", 2, id="all steps"),
        pytest.param("sequence", 2, id="a mean over rows"),
        pytest.param("constant", 2, id="a sum over rows"),
        pytest.param("stop", 2, id="both stop after the second"),
        pytest.param("apart", 0, id="both stop, although one alone would not"),
    ],
)
def test_two_ranks_learn_the_same_as_one_with_all_rows(two, name, steps):
    updated, diagnostics = learn(*cases()[name])
    assert diagnostics.steps == steps
    assert diagnostics.stopped_early == (name in ("stop", "apart"))
    for rank in two:
        same(rank[name][0], updated)
        assert rank[name][1] == pytest.approx(
            dataclasses.asdict(diagnostics), rel=1e-12, nan_ok=True
        )
    assert torch.equal(two[0][name][0], two[1][name][0])


def test_objectives_are_frozen_and_refuse_unknown_fields():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPO.epochs = 3
    with pytest.raises(TypeError, match="epohcs"):
        Objective(epohcs=3)
    assert copy.copy(PPO) == PPO
