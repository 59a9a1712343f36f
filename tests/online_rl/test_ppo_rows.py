"""The checklist of PPO on language models, rows 13 to 30: what is learnt from completions, and what is told of it.

Expected values come from loops over the tokens of each completion, and from plain models that read one row alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures
from helpers.ppo_fixtures import Cast, Watch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from align.functional.token_rewards import completion_gae
from align.models import tokenization
from align.models.logps import small_vocabulary_tiles
from align.online_rl import experience, models, plots, trainer
from align.rewards import gold
from align.rl import update
from align.runtime import distributed

HOW = {
    "advantages": "gae",
    "n_completions": 1,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
    "sampler_logps": None,
    "importance_cap": 2.0,
}
"""Of a rollout. With ``reinforce`` and a discount of 0 its advantages are each token's own reward."""
OWN = HOW | {"advantages": "reinforce", "gamma": 0.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    return ppo_fixtures.cast(tmp_path_factory.getbasetemp())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


class Spoken:
    """A learner whose policy has left its reference, and what its roles say about eight completions."""

    def __init__(self, made: Cast, folder: Path, **settings: Any) -> None:
        self.learner = ppo_fixtures.learner(
            made, folder, lora=True, **{"max_new_tokens": 40} | settings
        )
        ppo_fixtures.move(self.learner.cast)
        self.said = ppo_fixtures.said(self.learner)
        self.scores = torch.linspace(-1.0, 2.0, 8)
        self.inputs = ppo_fixtures.inputs_of(self.learner, self.said)
        self.spoken = experience.compute_experience(self.learner.cast, self.inputs, batch_size=8)

    def widened(self, more: int) -> experience.Experience:
        """The same completions in a batch of more columns; what is said there is junk."""
        pad = self.learner.cast.tokenizer.pad_token_id
        rest = torch.zeros(8, more, dtype=torch.long)
        ids, mask, labels = (self.inputs[key] for key in ("ids", "mask", "labels"))
        inputs = {
            "ids": torch.cat([ids, rest + pad], 1),
            "mask": torch.cat([mask, rest], 1),
            "labels": torch.cat([labels, rest - 100], 1),
        }
        return experience.compute_experience(self.learner.cast, inputs, batch_size=3)

    def junk(self) -> experience.Experience:
        """With other numbers wherever no token of a completion is chosen."""
        told = self.spoken
        wrong = {
            name: torch.where(told.mask, getattr(told, name), 1e3)
            for name in ("logps", "entropy", "values")
        }
        wrong["ref_logps"] = torch.where(told.mask, told.ref_logps, -1e3)
        return experience.Experience(inputs=told.inputs, **wrong)


@pytest.fixture(scope="module")
def told(made: Cast, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return Spoken(made, tmp_path_factory.mktemp("told"))


def learned(learner: trainer.PPOTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.cast.weights().values()])


# Rows 13 and 14: KL -----------------------------------------------------------------------------------------------------


def test_row_13_both_kl_estimators_in_the_reward_are_unbiased_and_k3_is_never_negative(
    made: Cast, tmp_path: Path
):
    learner = ppo_fixtures.learner(made, tmp_path, lora=True, max_new_tokens=1, temperature=1.0)
    ppo_fixtures.move(learner.cast, scale=0.2)
    learner.cast.saved.save_pretrained(str(tmp_path / "moved"), selected_adapters=["default"])
    n, prompt = 1024, learner.prompts[0]
    policy, reference = (
        ppo_fixtures.distribution(ppo_fixtures.plain(folder), [*prompt, 0], 1.0)[-1]
        for folder in (tmp_path / "moved", made.world.sft)
    )
    exact = (policy.exp() * (policy - reference)).sum()
    assert exact > 0.02
    # One token each, drawn here: generate takes seconds for as many.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(policy.exp(), n, replacement=True, generator=generator).tolist()
    said = experience.Completions([prompt] * n, [[token] for token in drawn], [False] * n)
    spoken = experience.compute_experience(
        learner.cast, ppo_fixtures.inputs_of(learner, said), batch_size=n
    )
    for estimator in ("k1", "k3"):
        how = OWN | {"kl_coef": 1.0, "kl_estimator": estimator}
        rewards = experience.make_rollout(spoken, torch.zeros(n), **how).advantages[:, -1]
        error = rewards.std() / math.sqrt(n)
        assert abs(-rewards.mean() - exact) < 3 * error
        assert error < exact / 3
        if estimator == "k3":
            assert (rewards <= 0).all()


@pytest.mark.parametrize(
    ("target", "horizon", "factor"),
    [
        pytest.param(1 / 2, 8, 1.2, id="kl is twice the target: 1 + 0.2 * 8 / 8"),
        pytest.param(1 / 2, 32, 1.05, id="a longer horizon: 1 + 0.2 * 8 / 32"),
        pytest.param(1 / 1.1, 8, 1.1, id="kl is 1.1 times the target: 1 + 0.1"),
        pytest.param(2.0, 8, 0.8, id="kl is half the target: 1 - 0.2"),
    ],
)
def test_row_14_the_coefficient_of_the_kl_adapts_by_the_kl_of_whole_completions(
    made: Cast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Spoken,
    target: float,
    horizon: int,
    factor: float,
):
    # 0.05 nats at every token: a completion's KL is 0.05 times its length, and the mean is over completions.
    far = dataclasses.replace(told.spoken, ref_logps=told.spoken.logps - 0.05)
    kl = 0.05 * sum(map(len, told.said.completions)) / 8
    settings = {"kl_target": kl * target, "kl_horizon": horizon, "kl_coef": 0.3}
    learner = ppo_fixtures.learner(made, tmp_path, lora=True, max_new_tokens=40, **settings)
    ppo_fixtures.frozen(learner)
    monkeypatch.setattr(trainer.PPOTrainer, "sample", lambda *_: told.said)
    monkeypatch.setattr(experience, "compute_experience", lambda *_, **__: far)
    coefficients = []
    rollout = experience.make_rollout
    monkeypatch.setattr(
        experience,
        "make_rollout",
        lambda *a, **k: coefficients.append(k["kl_coef"]) or rollout(*a, **k),
    )
    learner.step(0)
    learner.step(1)
    assert coefficients[0] == 0.3
    assert coefficients[1] == pytest.approx(0.3 * factor, rel=1e-5)
    assert learner.latest["kl_coef"] == coefficients[1]  # the one that the step was taken with
    assert learner.kl_coef == pytest.approx(0.3 * factor**2, rel=1e-5)


def test_row_14_without_a_target_the_coefficient_is_fixed(made: Cast, tmp_path: Path):
    learner = ppo_fixtures.learner(made, tmp_path, kl_coef=0.3)
    learner.step(0)
    learner.step(1)
    assert learner.latest["kl"] != 0
    assert learner.kl_coef == 0.3


# Rows 15 to 17: advantages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_row_15_advantages_of_completions_are_the_double_sum_over_their_tokens(
    told: Spoken, gamma: float, lam: float
):
    how = HOW | {"gamma": gamma, "lam": lam}
    found = experience.make_rollout(told.spoken, told.scores, **how)
    kl = ppo_fixtures.columns(told.spoken.logps - told.spoken.ref_logps, told.said)
    values = ppo_fixtures.columns(told.spoken.values, told.said)
    for i, tokens in enumerate(told.said.completions):
        rewards = (-0.05 * kl[i].double()).tolist()
        rewards[-1] += told.scores[i].item()
        v = [*values[i].double().tolist(), 0.0]  # nothing follows the last token
        deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
        expected = [
            sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(tokens)))
            for t in range(len(tokens))
        ]
        ours = ppo_fixtures.columns(found.advantages, told.said)[i]
        assert_close(ours, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        targets = torch.tensor(expected) + values[i]
        assert_close(
            ppo_fixtures.columns(found.returns, told.said)[i], targets, rtol=1e-4, atol=1e-5
        )
    assert (found.advantages[~found.mask] == 0).all()
    assert found.mask.sum() == sum(map(len, told.said.completions))


@pytest.mark.parametrize("advantages", ["gae", "reinforce", "rloo"])
def test_row_15_more_padding_and_what_lies_in_it_change_no_advantage(told: Spoken, advantages: str):
    how = HOW | {"advantages": advantages, "n_completions": 2}
    how["whiten_rewards"] = advantages == "gae"
    before = experience.make_rollout(told.spoken, told.scores, **how)
    junk = experience.make_rollout(told.junk(), told.scores, **how)
    wide = experience.make_rollout(told.widened(9), told.scores, **how)
    for name in ("advantages", "mask") + (("values", "returns") if advantages == "gae" else ()):
        assert torch.equal(getattr(junk, name)[before.mask], getattr(before, name)[before.mask])
        more = getattr(wide, name)
        assert more[:, -9:].count_nonzero() == 0
        close = {"rtol": 1e-4, "atol": 1e-5} if name != "mask" else {}
        assert_close(more[:, :-9], getattr(before, name), **close)


def test_row_15_nothing_comes_back_over_the_last_token_whatever_stands_behind_it():
    # 1 + 3 - 2 = 2 and, with nothing behind it, 5 - 3 = 2; gamma and lambda are 1: 2 + 2 and 2
    rewards, values = torch.tensor([[9.0, 1.0, 5.0, 7.0]]), torch.tensor([[8.0, 2.0, 3.0, 9.0]])
    mask = torch.tensor([[False, True, True, False]])
    found = completion_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert_close(found, torch.tensor([[0.0, 4.0, 2.0, 0.0]]))


def test_row_16_advantages_are_whitened_over_the_valid_tokens_of_the_whole_batch(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Tensor] = []
    terms = update._terms

    def spy(now: Any, piece: Any, objective: Any) -> Any:
        if now.logps is not None:
            seen.append(piece.advantages[piece.mask])
        assert (piece.advantages[~piece.mask] == 0).all()
        return terms(now, piece, objective)

    monkeypatch.setattr(update, "_terms", spy)
    settings = {"minibatches": 2, "micro_batch_size": 2, "epochs": 1, "max_new_tokens": 40}
    watch = Watch(monkeypatch)
    learner = ppo_fixtures.learner(made, tmp_path, **settings)
    learner.step(0)
    assert len(seen) == 4
    whole = torch.cat(seen).double()
    assert whole.mean().item() == pytest.approx(0, abs=1e-6)
    assert whole.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert abs(seen[0].mean()) > 0.01  # no minibatch is whitened by itself
    raw = watch.rollouts[0].advantages[watch.rollouts[0].mask].double()
    by_hand = (raw - raw.mean()) / raw.std(correction=0)
    assert_close(whole.sort().values, by_hand.sort().values, rtol=1e-4, atol=1e-5)
    assert abs(raw.mean()) > 0.05


def test_row_17_rewards_are_scaled_to_variance_1_around_the_mean_that_they_have(told: Spoken):
    plain, scaled = (
        experience.make_rollout(told.spoken, told.scores, **OWN | {"whiten_rewards": yes})
        for yes in (False, True)
    )
    mask = plain.mask
    before, after = (each.advantages[mask].double() for each in (plain, scaled))
    assert abs(before.mean()) > 1e-3 and abs(before.std() - 1) > 0.1
    assert_close(after.mean(), before.mean(), rtol=0, atol=1e-6)
    assert after.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (scaled.advantages[~mask] == 0).all()


# Rows 18 to 22: the update ----------------------------------------------------------------------------------------------


def test_row_18_value_clipping_is_half_the_greater_error_and_inside_the_range_no_clipping(
    made: Cast, tmp_path: Path, watch: Watch
):
    weights, losses = [], []
    for name, clip in (("none", None), ("wide", 1e6), ("narrow", 1e-3)):
        settings = {"value_clip": clip, "normalize_advantages": False, "epochs": 2}
        learner = ppo_fixtures.learner(made, tmp_path / name, **settings)
        learner.step(0)
        weights.append(learned(learner))
        losses.append(watch.diagnostics[-1].value_loss)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])

    # Both epochs by hand, over the tokens of all completions: 0.5 * max(plain, clipped).
    rollout = watch.rollouts[-1]
    assert len(watch.valued) == 3 * 2
    total = torch.zeros((), dtype=torch.float64)
    for inputs, values in watch.valued[-2:]:
        old = {tuple(ids.tolist()): row for row, ids in enumerate(rollout.inputs["ids"])}
        rows = torch.tensor([old[tuple(ids.tolist())] for ids in inputs["ids"]])
        for b, t in rollout.mask[rows].nonzero().tolist():
            value, before = values[b, t].item(), rollout.values[rows[b], t].item()
            target = rollout.returns[rows[b], t].item()
            kept = min(max(value, before - 1e-3), before + 1e-3)
            total += 0.5 * max((value - target) ** 2, (kept - target) ** 2)
    assert losses[2] == pytest.approx(total.item() / (2 * rollout.mask.sum().item()), rel=1e-4)


def test_row_19_each_epoch_takes_every_completion_once_in_an_order_of_its_own(
    made: Cast, tmp_path: Path, watch: Watch
):
    settings = {"epochs": 3, "minibatches": 2, "micro_batch_size": 2}
    learner = ppo_fixtures.learner(made, tmp_path, **settings)
    learner.step(0)
    learner.step(1)
    rows = [tuple(ids.tolist()) for inputs, _ in watch.asked for ids in inputs["ids"]]
    orders = []
    for step, rollout in enumerate(watch.rollouts):
        whole = [tuple(ids.tolist()) for ids in rollout.inputs["ids"]]
        assert len(set(whole)) == 8
        for epoch in range(3):
            part = rows[step * 24 + epoch * 8 : step * 24 + epoch * 8 + 8]
            assert sorted(part) == sorted(whole)
            orders.append(tuple(whole.index(row) for row in part))
    assert len(set(orders)) == 6
    assert {frozenset(order[:4]) for order in orders} != {frozenset(orders[0][:4])}


@contextlib.contextmanager
def gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Tensor]]]:
    """Gradients of each optimizer step, before they are clipped."""
    found: list[list[Tensor]] = []
    clip = trainer.PPOTrainer.clip

    def spy(self: trainer.PPOTrainer, parameters: list[Tensor], norm: float) -> Tensor:
        found.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip(self, parameters, norm)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.PPOTrainer, "clip", spy)
        yield found


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_20_gradients_are_the_same_for_micro_batches_of_1_2_4_and_8(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
):
    found = {}
    for size in (8, 4, 2, 1):
        settings = {"micro_batch_size": size, "epochs": 1, "max_new_tokens": 40}
        learner = ppo_fixtures.learner(made, tmp_path / str(size), lora=lora, **settings)
        ppo_fixtures.move(learner.cast)
        with gradients(monkeypatch) as taken:
            learner.step(0)
        (only,) = taken
        found[size] = torch.cat([g.flatten() for g in only]).double()
    assert found[8].norm() > 1e-3
    for size in (4, 2, 1):
        # A mean of each piece's mean would be off by a tenth: lengths are 3 to 40 tokens.
        assert (found[size] - found[8]).norm() < 1e-5 * found[8].norm()


def test_row_20_a_token_weighs_the_same_in_a_long_completion_and_in_a_short_one(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Against the loss of all tokens by hand: sum of -advantage * log-probability / number of tokens.
    watch = Watch(monkeypatch)
    settings = {"micro_batch_size": 2, "epochs": 1, "max_new_tokens": 40, "advantages": "reinforce"}
    learner = ppo_fixtures.learner(made, tmp_path, normalize_advantages=False, **settings)
    cast = learner.cast
    with gradients(monkeypatch) as taken:
        ppo_fixtures.frozen(learner)
        learner.step(0)
    said, rollout = watch.said[0], watch.rollouts[0]
    lengths = [len(c) for c in said.completions]
    assert max(lengths) > 2 * min(lengths)
    loss = torch.zeros(())
    advantages = ppo_fixtures.columns(rollout.advantages, said)
    for prompt, row, advantage in zip(said.prompts, said.rows, advantages, strict=True):
        logits = cast.policy.model(input_ids=torch.tensor([row])).logits[0, len(prompt) - 1 : -1]
        taken_tokens = torch.tensor(row[len(prompt) :])[:, None]
        logps = (logits / 0.7).log_softmax(-1).gather(1, taken_tokens)[:, 0]
        loss = loss - (advantage * logps).sum() / sum(lengths)
    expected = torch.autograd.grad(loss, cast.parameters(cast.policy))
    ours = torch.cat([g.flatten() for g in taken[0]])
    theirs = torch.cat([g.flatten() for g in expected])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_row_21_gradients_are_clipped_and_their_norm_is_told(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"max_grad_norm": 0.01, "epochs": 1, "minibatches": 2}
    learner = ppo_fixtures.learner(made, tmp_path, **settings)
    after: list[list[float]] = []
    step = learner.optimizer.step

    def spy() -> None:
        after.append([norm(group["params"]) for group in learner.optimizer.param_groups])
        step()

    def norm(parameters: list[Tensor]) -> float:
        squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        return math.sqrt(sum(squares))

    monkeypatch.setattr(learner.optimizer, "step", spy)
    with gradients(monkeypatch) as before:
        learner.step(0)
    n = len(learner.cast.parameters(learner.cast.policy))
    norms = [math.sqrt(sum(g.double().square().sum() for g in each[:n])) for each in before]
    assert all(norm > 0.02 for norm in norms)
    assert learner.latest["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    for policy, critic in after:  # each by itself: a critic far off does not slow the policy down
        assert policy == pytest.approx(0.01, rel=1e-3) and policy <= 0.01 + 1e-8
        assert critic == pytest.approx(0.01, rel=1e-3) and critic <= 0.01 + 1e-8


def test_row_22_adams_epsilon_of_1e_5_reaches_the_optimizer_and_the_weights(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"max_grad_norm": 1e-4, "epochs": 1, "learning_rate": 0.01}
    learner = ppo_fixtures.learner(made, tmp_path, critic_learning_rate=0.02, **settings)
    cast = learner.cast
    before = {name: p.detach().clone() for name, p in cast.weights().items()}
    taken = {}
    step = learner.optimizer.step

    def spy() -> None:
        taken.update({name: p.grad.clone() for name, p in cast.weights().items()})
        step()

    monkeypatch.setattr(learner.optimizer, "step", spy)
    learner.step(0)
    for name, p in cast.weights().items():
        # Adam's first step: both moments are the gradient's own, so lr * g / (|g| + eps). Here |g| is about eps.
        rate, g = (0.01 if name.startswith("policy") else 0.02), taken[name]
        assert_close(p.detach(), before[name] - rate * g / (g.abs() + 1e-5), rtol=1e-4, atol=1e-6)
    size = torch.cat([g.flatten() for g in taken.values()]).abs().mean()
    assert 1e-8 < size < 1e-4


# Rows 23 and 24: ratios ---------------------------------------------------------------------------------------------------


def off_by(given: Any, difference: float, advantage: float) -> Any:
    """A rollout whose old log-probabilities lie ``difference`` below the policy's, with one advantage everywhere."""
    advantages = torch.full_like(given.advantages, advantage) * given.mask
    return dataclasses.replace(given, logps=given.logps - difference, advantages=advantages)


@pytest.mark.parametrize(
    ("settings", "difference", "advantage", "expected"),
    [
        # loss = -A * min(ratio, 1 + clip_high) for A > 0
        pytest.param({}, math.log(1.25), 1.0, -1.2, id="clipped at 1 + 0.2"),
        pytest.param({"clip_high": 0.3}, math.log(1.25), 1.0, -1.25, id="clip-higher: not clipped"),
        pytest.param({"clip_high": 0.3}, math.log(0.75), -1.0, 0.8, id="clipped at 1 - 0.2 still"),
        # e^100 ends at e^20; without the dual clip the loss is 1 * e^20 = 4.9e8
        pytest.param({}, 100.0, -1.0, math.exp(20), id="a log-ratio of 100 is clamped to 20"),
        pytest.param(
            {"dual_clip": 3.0}, 100.0, -1.0, 3.0, id="dual clip: a bad action's is bounded"
        ),
        pytest.param({}, 100.0, 1.0, -1.2, id="a good action is clipped at any distance"),
        pytest.param({}, -100.0, 1.0, 0.0, id="a ratio of e^-100 earns nothing"),
    ],
)
def test_row_23_far_ratios_give_finite_steps_within_the_bounds(
    made: Cast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, float],
    difference: float,
    advantage: float,
    expected: float,
):
    how = {"epochs": 1, "normalize_advantages": False, "advantages": "reinforce"} | settings
    learner = ppo_fixtures.learner(made, tmp_path, lora=True, max_new_tokens=8, **how)
    rollout = experience.make_rollout
    monkeypatch.setattr(
        experience, "make_rollout", lambda *a, **k: off_by(rollout(*a, **k), difference, advantage)
    )
    learner.step(0)
    figures = learner.latest
    assert figures["policy_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert math.isfinite(figures["grad_norm"])
    assert learned(learner).isfinite().all()
    assert figures["ratio_max"] == pytest.approx(math.exp(min(difference, 20)), rel=1e-4, abs=1e-30)


def with_sampler(said: experience.Completions, logps: list[list[float]]) -> experience.Completions:
    return experience.Completions(said.prompts, said.completions, said.finished, logps)


def test_row_24_another_engines_samples_are_weighed_by_truncated_ratios(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Spoken, watch: Watch
):
    sample, generator = trainer.PPOTrainer.sample, torch.Generator().manual_seed(0)
    noise: dict[str, list[list[float]]] = {}

    def run(name: str, scale: float | None) -> Any:
        def sampled(self: trainer.PPOTrainer, *args: Any) -> experience.Completions:
            said = sample(self, *args)
            if scale is None:
                return said
            inputs = ppo_fixtures.inputs_of(self, said)
            logps = experience.compute_experience(self.cast, inputs, batch_size=16).logps
            noise[name] = [
                (scale * torch.randn(len(c), generator=generator)).tolist()
                for c in said.completions
            ]
            other = [
                (row.double() - torch.tensor(n)).tolist()
                for row, n in zip(ppo_fixtures.columns(logps, said), noise[name], strict=True)
            ]
            return with_sampler(said, other)

        monkeypatch.setattr(trainer.PPOTrainer, "sample", sampled)
        learner = ppo_fixtures.learner(made, tmp_path / name, importance_cap=1.5, epochs=1)
        learner.step(0)
        return watch.rollouts[-1], learned(learner)

    own, plain = run("own", None)
    assert own.weights is None
    same, weighted = run("same", 0.0)
    assert (same.weights[same.mask] == 1).all()
    assert torch.equal(plain, weighted)

    noisy, changed = run("noisy", 1.0)
    said = watch.said[-1]
    for row, n in zip(ppo_fixtures.columns(noisy.weights, said), noise["noisy"], strict=True):
        expected = torch.tensor([min(math.exp(each), 1.5) for each in n])
        assert_close(row, expected, rtol=1e-4, atol=1e-5)
    assert (noisy.weights[noisy.mask] == 1.5).any() and (noisy.weights[noisy.mask] < 0.9).any()
    assert not torch.equal(plain, changed)
    wild, finite = run("wild", 100.0)
    assert wild.weights[wild.mask].max() <= 1.5
    assert finite.isfinite().all()


# Rows 25 and 26: seeds, the reference -----------------------------------------------------------------------------------


def test_row_25_ranks_take_other_prompts_and_sample_differently_and_a_run_repeats_itself(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    learner = ppo_fixtures.learner(made, tmp_path / "a", n_completions=2, batch_size=8)
    alone = [learner.drawn(step) for step in range(3)]
    taken, said = [], []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        taken.append([learner.drawn(step) for step in range(3)])
        said.append(learner.sample([learner.prompts[0]] * 3, "sample", 0).completions)
    for step in range(3):
        ours, theirs = (each[step] for each in taken)
        assert len(ours) == len(theirs) == 4
        assert not set(ours) & set(theirs)
        assert sorted(ours + theirs) == sorted(alone[step])
    assert len({tuple(c) for c in said[0] + said[1]}) == 6
    monkeypatch.undo()

    runs = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        learner = ppo_fixtures.learner(made, tmp_path / name, lora=True, seed=seed)
        learner.step(0)
        learner.step(1)
        runs.append(learned(learner))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_row_25_prompts_come_in_a_fresh_order_every_epoch_and_each_once(made: Cast, tmp_path: Path):
    learner = ppo_fixtures.learner(
        made, tmp_path, rewards=[ppo_fixtures.FIVE], advantages="reinforce"
    )
    n = len(learner.prompts)
    stream = [i for step in range(math.ceil(2 * n / 8)) for i in learner.drawn(step)]
    first, second = stream[:n], stream[n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second != sorted(second)


@pytest.mark.parametrize(
    ("source", "lora", "adapter"),
    [
        pytest.param("sft", False, None, id="separate models"),
        pytest.param("sft", True, None, id="a fresh adapter: the reference is without it"),
        pytest.param("lora", True, models.REFERENCE, id="the SFT adapter: a frozen copy of it"),
        pytest.param("lora", False, None, id="the SFT adapter, merged"),
    ],
)
def test_row_26_the_reference_is_frozen_and_at_first_the_policy_itself(
    made: Cast, tmp_path: Path, watch: Watch, source: str, lora: bool, adapter: str | None
):
    learner = ppo_fixtures.learner(
        made, tmp_path, source=getattr(made.world, source), lora=lora, max_new_tokens=12
    )
    cast = learner.cast
    assert cast.reference.adapter == adapter
    learning = {p.data_ptr() for p in cast.weights().values()}
    frozen = {
        (place, name): p.detach().clone()
        for place, model in enumerate(cast.models())
        for name, p in model.named_parameters()
        if p.data_ptr() not in learning
    }
    assert frozen
    for step in range(2):
        learner.step(step)
    before, after = watch.spoken
    assert torch.equal(before.logps, before.ref_logps)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["kl"] == 0
    assert (after.logps - after.ref_logps).abs().max() > 1e-3
    for place, model in enumerate(cast.models()):
        for name, p in model.named_parameters():
            if (place, name) in frozen:
                assert torch.equal(p, frozen[place, name]), name
                assert not p.requires_grad and p.grad is None
    again = experience.compute_experience(cast, before.inputs, batch_size=16)
    assert torch.equal(again.ref_logps, before.ref_logps)
    assert not torch.equal(again.logps, before.logps)


# Row 27: metrics ----------------------------------------------------------------------------------------------------------


def test_row_27_metrics_count_the_tokens_of_completions_and_nothing_else(
    made: Cast, tmp_path: Path, told: Spoken
):
    learner, said = told.learner, told.said
    judged = learner.judge(said, learner.rows[:8])
    found = learner.figures(said, told.spoken, judged, None)
    learner.cast.saved.save_pretrained(str(tmp_path / "moved"), selected_adapters=["default"])
    policy, reference = ppo_fixtures.plain(tmp_path / "moved"), ppo_fixtures.plain(made.world.sft)
    kl = entropy = n = 0.0
    for prompt, row in zip(said.prompts, said.rows, strict=True):
        ours, theirs = (ppo_fixtures.distribution(m, row, 0.7) for m in (policy, reference))
        for t in range(len(prompt) - 1, len(row) - 1):
            kl += (ours[t, row[t + 1]] - theirs[t, row[t + 1]]).item()
            entropy -= (ours[t].exp() * ours[t]).sum().item()
            n += 1
    assert found["tokens"] == n / 8
    assert found["kl"] == pytest.approx(kl / 8, abs=1e-4)
    assert found["kl_per_token"] == pytest.approx(kl / n, abs=1e-5)
    assert found["entropy"] == pytest.approx(entropy / n, rel=1e-4)
    assert found["entropy"] >= 0
    assert found["missing_eos"] == sum(not f for f in said.finished) / 8
    assert found["score"] == pytest.approx(found["reward"] - found["missing_eos"], abs=1e-6)

    assert learner.figures(said, told.junk(), judged, None) == pytest.approx(found, rel=1e-6)
    assert learner.figures(said, told.widened(17), judged, None) == pytest.approx(found, rel=1e-4)


def test_row_27_more_padding_changes_no_metric_of_the_update(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tensors, found = experience.Completions.tensors, []

    def wider(self: Any, pad: int, device: Any) -> dict[str, Tensor]:
        fill = {"ids": pad, "mask": 0, "labels": -100}
        return {
            key: torch.nn.functional.pad(value, (0, 11), value=fill[key])
            for key, value in tensors(self, pad, device).items()
        }

    for name, how in (("as it is", tensors), ("wider", wider)):
        monkeypatch.setattr(experience.Completions, "tensors", how)
        settings = {"micro_batch_size": 2, "epochs": 2, "entropy_coef": 0.01}
        learner = ppo_fixtures.learner(made, tmp_path / name, lora=True, **settings)
        ppo_fixtures.move(learner.cast)
        learner.step(0)
        found.append({k: v for k, v in learner.latest.items() if "seconds" not in k})
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
    assert found[0]["clip_fraction"] > 0


# Row 28: memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor) and not func.is_view:
                self.numel = max(self.numel, each.numel())
        return found


def test_row_28_logits_of_all_tokens_are_never_made_and_none_are_stored(made: Cast, tmp_path: Path):
    vocabulary, rows, length, width = 20_000, 32, 40, 8
    source = tmp_path / "wide"
    config = json.loads((made.world.sft / "config.json").read_text())
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": 1}
    shape |= {"intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 64}
    AutoModelForCausalLM.from_config(LlamaConfig(**config | shape)).save_pretrained(source)
    tokenization.load_tokenizer(made.world.sft).save_pretrained(source)
    cast = ppo_fixtures.build(source, [], lora=False, share=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator).tolist()
    said = experience.Completions(
        [row[:4] for row in ids], [row[4:] for row in ids], [False] * rows
    )
    inputs = said.tensors(0, "cpu")
    whole = rows * (length - 4) * vocabulary  # the logits of all tokens: 23 million numbers
    stored: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.numel())
        return tensor

    with small_vocabulary_tiles(), Largest() as made_by:
        experience.compute_experience(cast, inputs, batch_size=rows)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            now = ppo_fixtures.evaluated(cast, inputs)
        (now.logps.sum() + now.entropy.sum() + now.values.sum()).backward()
    head = cast.policy.model.lm_head.weight
    assert head.grad.abs().max() > 0
    assert max(stored) == head.numel()  # the head's own weight, 160,000
    assert made_by.numel <= 256 * 32_768 < whole / 2  # a tile of TRL's: 256 tokens on CPU


# Rows 29 and 30: what is told ---------------------------------------------------------------------------------------------


def test_row_29_sampling_stops_at_eos_and_wasted_tokens_are_told(made: Cast, tmp_path: Path):
    settings = {"max_new_tokens": 100, "sample_batch_size": 2}
    learner = ppo_fixtures.learner(made, tmp_path, **settings)
    model, widths = learner.cast.policy.model, []
    generate = model.generate

    def spy(**kwargs: Any) -> Tensor:
        output = generate(**kwargs)
        widths.append((output.shape[1] - kwargs["input_ids"].shape[1]) * len(output))
        return output

    eos = learner.cast.tokenizer.eos_token_id
    likelier = torch.zeros(model.config.vocab_size)
    likelier[eos] = 4.0  # e^4 = 55 times as likely at every token, or hardly a completion ends
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + likelier)
    model.generate = spy
    learner.step(0)
    assert len(widths) == 4
    assert max(widths) < 2 * 100, "sampling goes on behind the eos"
    tokens = learner.latest["tokens"] * 8
    assert learner.latest["wasted_tokens"] == pytest.approx(1 - tokens / sum(widths))
    assert 0 < learner.latest["wasted_tokens"] < 1


def test_row_30_reward_hacking_is_visible_in_metrics_and_in_one_picture(
    made: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("matplotlib")
    import matplotlib.figure as figures

    drawn = []
    save = figures.Figure.savefig

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(figures.Figure, "savefig", spy)
    learner = ppo_fixtures.learner(
        made, tmp_path, judge="gold", eval_steps=1, eval_split="test", n_eval_prompts=4
    )
    judging = []
    monkeypatch.setattr(
        gold,
        "gold_score",
        lambda prompt, text: judging.append((prompt, text)) or float(len(judging) % 3),
    )
    for step in range(3):
        learner.step(step)
        learner.evaluate(step + 1)
    metrics = learner.finish()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "score" in line]
    held_out = [line for line in lines if "eval_score" in line]
    seen = {"reward", "gold", "kl", "tokens", "missing_eos"}
    assert len(steps) == len(held_out) == 3
    for line in steps:
        assert seen | {"score", "entropy", "clip_fraction", "grad_norm"} <= line.keys()
    for line in held_out:
        assert {f"eval_{key}" for key in seen} <= line.keys()
    assert seen <= metrics["ppo"].keys()

    prompts = {row["prompt"][-1]["content"] for row in learner.rows + learner.held_out}
    assert {prompt for prompt, _ in judging} <= prompts
    # 8 completions a step, 4 held out: gold's mean over each, in the order in which it was asked
    first = [float((k + 1) % 3) for k in range(8)]
    assert steps[0]["gold"] == pytest.approx(sum(first) / 8)

    assert (tmp_path / plots.PICTURE).stat().st_size > 10_000
    (picture,) = drawn
    titles = [axes.get_title(loc="left") for axes in picture.axes]
    for key in ("gold", "kl", "tokens", "missing_eos", "score"):
        assert dict(plots.PANELS)[key] in titles
    both = [axes for axes in picture.axes if axes.get_ylabel() in ("reward", "gold score")]
    assert [axes.get_ylabel() for axes in both] == ["reward", "gold score"]
    assert both[0].get_position().bounds == both[1].get_position().bounds  # one plot, two scales
    for axes, key in zip(both, ("reward", "gold"), strict=True):
        (points,) = axes.lines
        assert points.get_ydata().tolist() == [line[key] for line in steps]
        distance = [math.sqrt(max(0.0, line["kl"])) for line in steps]
        assert points.get_xdata().tolist() == pytest.approx(distance)
