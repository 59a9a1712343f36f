"""The update of a PPO step: ratios, clipping, whitening, minibatches, gradients and Adam.

Rows are those of the checklist in the design notes on PPO.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures
from helpers.ppo_fixtures import Folders, Recorder, flat_weights, recorded_gradients
from torch import Tensor
from torch.testing import assert_close

from align.errors import UserError
from align.online_rl import trainer
from align.online_rl.completions import Completions
from align.online_rl.experience import compute_experience, make_rollout
from align.online_rl.optimization import clip_gradients
from align.online_rl.sampling import Sampler
from align.online_rl.trainer import OnlineRLTrainer
from align.rl.rollout import Rollout

LOADED = [
    pytest.param("sft", False, id="separate models"),
    pytest.param("sft", True, id="one backbone, fresh adapter"),
    pytest.param("lora", True, id="one backbone, the SFT adapter"),
    pytest.param("lora", False, id="separate models, the SFT adapter merged"),
]


def row_indices(rollout: Rollout, inputs: dict[str, Tensor]) -> Tensor:
    """Indices of some rows of a rollout, by their tokens."""
    places = {tuple(ids.tolist()): row for row, ids in enumerate(rollout.inputs["ids"])}
    return torch.tensor([places[tuple(ids.tolist())] for ids in inputs["ids"]])


# The ratio is 1 before learning


@pytest.mark.parametrize(("source", "lora"), LOADED)
def test_row_02_the_ratio_is_1_before_the_first_step_and_in_all_epochs_at_learning_rate_0(
    folders: Folders, tmp_path: Path, recorder: Recorder, source: str, lora: bool
):
    ppo = ppo_fixtures.build_trainer(
        folders,
        tmp_path,
        source=getattr(folders.world, source),
        lora=lora,
        epochs=3,
        minibatches=2,
        micro_batch_size=2,
    )
    ppo_fixtures.set_learning_rates_to_0(ppo)
    ppo.step(0)
    (rollout,) = recorder.rollouts
    lengths = {len(prompt) for prompt in recorder.completions[0].prompts}
    assert len(lengths) > 1, "no prompt is padded on the left"
    assert len(recorder.policy_calls) == 3 * 2 * 2  # epochs, minibatches, pieces of two rows
    for inputs, logps in recorder.policy_calls:
        rows = row_indices(rollout, inputs)
        valid = rollout.mask[rows]
        assert (logps - rollout.logps[rows])[valid].abs().max() < 1e-4
    (diagnostics,) = recorder.diagnostics
    assert diagnostics.ratio_max == pytest.approx(1.0, abs=1e-4)
    assert (diagnostics.clip_fraction, diagnostics.steps) == (0, 6)


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_02_the_ratio_differs_from_1_once_the_policy_learns(
    folders: Folders, tmp_path: Path, recorder: Recorder, lora: bool
):
    ppo_fixtures.build_trainer(folders, tmp_path, lora=lora, epochs=2).step(0)
    assert recorder.diagnostics[0].ratio_max > 1.01


# Whitening


def test_row_16_advantages_are_whitened_over_the_valid_tokens_of_the_whole_batch(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Whitening in the update must equal a rollout whose advantages were whitened beforehand.
    rollouts: list[Rollout] = []

    def unchanged(rollout: Rollout) -> Rollout:
        rollouts.append(rollout)
        return rollout

    def whitened(rollout: Rollout) -> Rollout:
        valid = rollout.advantages[rollout.mask].double()
        scaled = (rollout.advantages.double() - valid.mean()) / valid.std(correction=0)
        return dataclasses.replace(rollout, advantages=(scaled * rollout.mask).float())

    def padding_filled(rollout: Rollout) -> Rollout:
        junk = torch.where(rollout.mask, rollout.advantages, 1e3)
        return dataclasses.replace(rollout, advantages=junk)

    first_steps = {}
    for name, change, whiten in (
        ("by the update", unchanged, True),
        ("beforehand", whitened, False),
        ("junk in the padding", padding_filled, True),
        ("never", unchanged, False),
    ):
        monkeypatch.setattr(
            trainer, "make_rollout", lambda *a, f=change, **k: f(make_rollout(*a, **k))
        )
        settings = {"minibatches": 2, "micro_batch_size": 2, "epochs": 1, "max_new_tokens": 40}
        ppo = ppo_fixtures.build_trainer(
            folders, tmp_path / name, normalize_advantages=whiten, **settings
        )
        n_policy = len(ppo.models.parameters(ppo.models.policy))
        with recorded_gradients(monkeypatch) as gradients:
            ppo.step(0)
        first_steps[name] = torch.cat([g.flatten() for g in gradients[0][:n_policy]]).double()
    expected = first_steps["beforehand"]
    assert expected.norm() > 1e-3
    for name in ("by the update", "junk in the padding"):
        assert (first_steps[name] - expected).norm() < 1e-4 * expected.norm()
    assert (first_steps["never"] - expected).norm() > 0.1 * expected.norm()
    raw = rollouts[0].advantages[rollouts[0].mask]
    assert abs(raw.mean()) > 0.05  # whitening does change something


# The critic's loss


def test_row_18_the_value_loss_is_half_the_larger_squared_error_of_plain_and_clipped_values(
    folders: Folders, tmp_path: Path, recorder: Recorder
):
    weights, losses = [], []
    for name, clip in (("none", None), ("wide", 1e6), ("narrow", 1e-3)):
        settings = {"value_clip": clip, "normalize_advantages": False, "epochs": 2}
        ppo = ppo_fixtures.build_trainer(folders, tmp_path / name, **settings)
        ppo.step(0)
        weights.append(flat_weights(ppo))
        losses.append(recorder.diagnostics[-1].value_loss)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])

    # Both epochs by hand, over the tokens of all completions: 0.5 * max(plain, clipped).
    rollout = recorder.rollouts[-1]
    assert len(recorder.critic_calls) == 3 * 2
    total = torch.zeros((), dtype=torch.float64)
    for inputs, values in recorder.critic_calls[-2:]:
        rows = row_indices(rollout, inputs)
        for b, t in rollout.mask[rows].nonzero().tolist():
            value, before = values[b, t].item(), rollout.values[rows[b], t].item()
            target = rollout.returns[rows[b], t].item()
            clipped = min(max(value, before - 1e-3), before + 1e-3)
            total += 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
    assert losses[2] == pytest.approx(total.item() / (2 * rollout.mask.sum().item()), rel=1e-4)


# Minibatches and micro-batches


def test_row_19_each_epoch_uses_every_completion_once_in_a_new_order(
    folders: Folders, tmp_path: Path, recorder: Recorder
):
    settings = {"epochs": 3, "minibatches": 2, "micro_batch_size": 2}
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, **settings)
    ppo.step(0)
    ppo.step(1)
    rows = [tuple(ids.tolist()) for inputs, _ in recorder.policy_calls for ids in inputs["ids"]]
    orders = []
    for step, rollout in enumerate(recorder.rollouts):
        whole = [tuple(ids.tolist()) for ids in rollout.inputs["ids"]]
        assert len(set(whole)) == 8
        for epoch in range(3):
            part = rows[step * 24 + epoch * 8 : step * 24 + epoch * 8 + 8]
            assert sorted(part) == sorted(whole)
            orders.append(tuple(whole.index(row) for row in part))
    assert len(set(orders)) == 6
    assert {frozenset(order[:4]) for order in orders} != {frozenset(orders[0][:4])}


@pytest.mark.parametrize("lora", [False, True], ids=["separate models", "one backbone"])
def test_row_20_gradients_are_equal_for_micro_batches_of_1_2_4_and_8(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
):
    results = {}
    for size in (8, 4, 2, 1):
        settings = {"micro_batch_size": size, "epochs": 1, "max_new_tokens": 40}
        ppo = ppo_fixtures.build_trainer(folders, tmp_path / str(size), lora=lora, **settings)
        ppo_fixtures.perturb(ppo.models)
        with recorded_gradients(monkeypatch) as gradients:
            ppo.step(0)
        (only,) = gradients
        results[size] = torch.cat([g.flatten() for g in only]).double()
    assert results[8].norm() > 1e-3
    for size in (4, 2, 1):
        # A mean of each piece's mean would differ by a tenth: lengths are 3 to 40 tokens.
        assert (results[size] - results[8]).norm() < 1e-5 * results[8].norm()


def test_row_20_a_token_has_the_same_weight_in_long_and_short_completions(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
):
    # The loss of all tokens by hand: sum of -advantage * log-probability / number of tokens.
    settings = {"micro_batch_size": 2, "epochs": 1, "max_new_tokens": 40, "kind": "reinforce"}
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, normalize_advantages=False, **settings)
    with recorded_gradients(monkeypatch) as gradients:
        ppo_fixtures.set_learning_rates_to_0(ppo)
        ppo.step(0)
    completions, rollout = recorder.completions[0], recorder.rollouts[0]
    lengths = [len(c) for c in completions.completions]
    assert max(lengths) > 2 * min(lengths)
    policy = ppo.models.policy
    loss = torch.zeros(())
    advantages = ppo_fixtures.columns(rollout.advantages, completions)
    for prompt, row, advantage in zip(
        completions.prompts, completions.rows, advantages, strict=True
    ):
        logits = policy.model(input_ids=torch.tensor([row])).logits[0, len(prompt) - 1 : -1]
        tokens = torch.tensor(row[len(prompt) :])[:, None]
        logps = (logits / 0.7).log_softmax(-1).gather(1, tokens)[:, 0]
        loss = loss - (advantage * logps).sum() / sum(lengths)
    expected = torch.autograd.grad(loss, ppo.models.parameters(policy))
    ours = torch.cat([g.flatten() for g in gradients[0]])
    theirs = torch.cat([g.flatten() for g in expected])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


# Gradient clipping and Adam


def test_row_21_gradients_are_clipped_and_their_norm_is_logged(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"max_grad_norm": 0.01, "epochs": 1, "minibatches": 2}
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, **settings)
    clipped: list[list[float]] = []
    step = ppo.optimizer.step

    def norm(parameters: list[Tensor]) -> float:
        squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        return math.sqrt(sum(squares))

    def recording() -> None:
        clipped.append([norm(group["params"]) for group in ppo.optimizer.param_groups])
        step()

    monkeypatch.setattr(ppo.optimizer, "step", recording)
    with recorded_gradients(monkeypatch) as gradients:
        ppo.step(0)
    n = len(ppo.models.parameters(ppo.models.policy))
    norms = [math.sqrt(sum(g.double().square().sum() for g in each[:n])) for each in gradients]
    assert all(norm > 0.02 for norm in norms)
    assert ppo.metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    for policy, critic in clipped:  # separately: a poor critic does not slow the policy down
        assert policy == pytest.approx(0.01, rel=1e-3) and policy <= 0.01 + 1e-8
        assert critic == pytest.approx(0.01, rel=1e-3) and critic <= 0.01 + 1e-8


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_changes_a_weight(
    folders: Folders, tmp_path: Path
):
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, batch_size=4, epochs=1)
    before = flat_weights(ppo)
    parameters = list(ppo.models.weights().values())
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(UserError, match="a gradient of the policy is not finite"):
        clip_gradients(ppo.optimizer, parameters, 1.0)
    assert torch.equal(flat_weights(ppo), before)


def test_the_batch_of_a_gradient_that_is_not_finite_is_saved_until_the_next_attempt(
    folders: Folders, tmp_path: Path
):
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, batch_size=4, epochs=1)
    weights = ppo.models.weights()
    next(iter(weights.values())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"^step 3: a gradient .*/not-finite\.json has the batch$"):
        ppo.step(2)
    content = json.loads((tmp_path / "not-finite.json").read_text(encoding="utf-8"))
    assert content["step"] == 3
    assert len(content["rows"]) == 4
    for row in content["rows"]:
        decoded = ppo.models.tokenizer.decode(row["completion_tokens"], skip_special_tokens=True)
        assert row["completion"].strip() == decoded.strip()
        assert row["prompt"][-1]["content"] in ppo.models.tokenizer.decode(row["prompt_tokens"])
        assert len(row["advantages"]) == len(row["logps"]) == len(row["completion_tokens"])
        assert math.isfinite(row["reward"])
    ppo.resume()
    assert not list(tmp_path.glob("not-finite*"))


def test_weights_that_are_not_finite_are_not_saved(folders: Folders, tmp_path: Path):
    ppo = ppo_fixtures.build_trainer(folders, tmp_path)
    ppo.check_weights(0)
    for name, key in (("critic", "critic_learning_rate"), ("policy", "learning_rate")):
        ppo.models.weights()[f"{name}.0"].data.flatten()[0] = float("inf")
        message = f"a weight of the {name} is not finite after 3 steps .* lower `{key}`"
        with pytest.raises(UserError, match=message):
            ppo.check_weights(3)


def test_row_22_adams_epsilon_of_1e_5_changes_the_weights(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"max_grad_norm": 1e-4, "epochs": 1, "learning_rate": 0.01}
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, critic_learning_rate=0.02, **settings)
    weights = ppo.models.weights()
    before = {name: p.detach().clone() for name, p in weights.items()}
    gradients = {}
    step = ppo.optimizer.step

    def recording() -> None:
        gradients.update({name: p.grad.clone() for name, p in weights.items()})
        step()

    monkeypatch.setattr(ppo.optimizer, "step", recording)
    ppo.step(0)
    for name, p in weights.items():
        # Adam's first step: both moments are those of the gradient, so it is lr * g / (|g| + eps).
        # Here |g| is about eps.
        rate, g = (0.01 if name.startswith("policy") else 0.02), gradients[name]
        assert_close(p.detach(), before[name] - rate * g / (g.abs() + 1e-5), rtol=1e-4, atol=1e-6)
    size = torch.cat([g.flatten() for g in gradients.values()]).abs().mean()
    assert 1e-8 < size < 1e-4


# Ratios far from 1


@pytest.mark.parametrize(
    ("settings", "difference", "advantage", "expected"),
    [
        # loss = -A * min(ratio, 1 + clip_high) for A > 0
        pytest.param({}, math.log(1.25), 1.0, -1.2, id="clipped at 1 + 0.2"),
        pytest.param({"clip_high": 0.3}, math.log(1.25), 1.0, -1.25, id="clip-higher: not clipped"),
        pytest.param({"clip_high": 0.3}, math.log(0.75), -1.0, 0.8, id="still clipped at 1 - 0.2"),
        # e^100 is clamped to e^20; without the dual clip the loss is 1 * e^20 = 4.9e8
        pytest.param({}, 100.0, -1.0, math.exp(20), id="a log-ratio of 100 is clamped to 20"),
        pytest.param({"dual_clip": 3.0}, 100.0, -1.0, 3.0, id="dual clip bounds a bad action"),
        pytest.param({}, 100.0, 1.0, -1.2, id="a good action is clipped at any distance"),
        pytest.param({}, -100.0, 1.0, 0.0, id="a ratio of e^-100 gives no loss"),
    ],
)
def test_row_23_ratios_far_from_1_give_finite_steps_within_the_bounds(
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, float],
    difference: float,
    advantage: float,
    expected: float,
):
    def shifted(*args: Any, **kwargs: Any) -> Rollout:
        """Old log-probabilities that are ``difference`` too low, and one advantage everywhere."""
        rollout = make_rollout(*args, **kwargs)
        advantages = torch.full_like(rollout.advantages, advantage) * rollout.mask
        return dataclasses.replace(rollout, logps=rollout.logps - difference, advantages=advantages)

    monkeypatch.setattr(trainer, "make_rollout", shifted)
    settings = {"epochs": 1, "normalize_advantages": False, "kind": "reinforce"} | settings
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, lora=True, max_new_tokens=8, **settings)
    ppo.step(0)
    metrics = ppo.metrics
    assert metrics["policy_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert math.isfinite(metrics["grad_norm"])
    assert flat_weights(ppo).isfinite().all()
    assert metrics["ratio_max"] == pytest.approx(math.exp(min(difference, 20)), rel=1e-4, abs=1e-30)


@dataclasses.dataclass
class NoisySampler:
    """Samples with the policy, but reports log-probabilities that differ from the policy's."""

    ppo: OnlineRLTrainer
    sampler: Sampler
    scale: float
    generator: torch.Generator
    noise: list[list[float]] = dataclasses.field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> Completions:
        completions = self.sampler.generate(prompts, seeds=seeds, max_new_tokens=max_new_tokens)
        logps = compute_experience(self.ppo.models, completions, batch_size=16).logps
        self.noise = [
            (self.scale * torch.randn(len(c), generator=self.generator)).tolist()
            for c in completions.completions
        ]
        rows = zip(ppo_fixtures.columns(logps, completions), self.noise, strict=True)
        reported = [(row.double() - torch.tensor(n)).tolist() for row, n in rows]
        return dataclasses.replace(completions, sampler_logps=reported)


def test_row_24_completions_of_another_engine_are_weighted_by_truncated_ratios(
    folders: Folders, tmp_path: Path, recorder: Recorder
):
    generator = torch.Generator().manual_seed(0)
    noise: dict[str, list[list[float]]] = {}
    metrics: list[dict[str, float]] = []

    def run(name: str, scale: float | None) -> tuple[Rollout, Tensor]:
        ppo = ppo_fixtures.build_trainer(folders, tmp_path / name, importance_cap=1.5, epochs=1)
        if scale is not None:
            ppo.config = ppo.config.model_copy(update={"sampler": "vllm"})
            ppo.sampler = NoisySampler(ppo, ppo.sampler, scale, generator)
        ppo.step(0)
        metrics.append(ppo.metrics)
        if scale is not None:
            noise[name] = ppo.sampler.noise
        return recorder.rollouts[-1], flat_weights(ppo)

    own, plain = run("own", None)
    assert own.weights is None
    assert metrics[-1]["sampler/ratio_mean"] == pytest.approx(1, abs=1e-5)
    same, weighted = run("same", 0.0)
    assert (same.weights[same.mask] == 1).all()
    assert torch.equal(plain, weighted)

    noisy, changed = run("noisy", 1.0)
    completions = recorder.completions[-1]
    columns = ppo_fixtures.columns(noisy.weights, completions)
    for row, differences in zip(columns, noise["noisy"], strict=True):
        expected = torch.tensor([min(math.exp(d), 1.5) for d in differences])
        assert_close(row, expected, rtol=1e-4, atol=1e-5)
    assert (noisy.weights[noisy.mask] == 1.5).any() and (noisy.weights[noisy.mask] < 0.9).any()
    assert not torch.equal(plain, changed)
    ratios = [math.exp(d) for row in noise["noisy"] for d in row]  # logged before they are cut
    assert metrics[-1]["sampler/ratio_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert metrics[-1]["sampler/ratio_min"] == pytest.approx(min(ratios), rel=1e-4)
    above = sum(ratio > 1.5 for ratio in ratios) / len(ratios)
    assert metrics[-1]["sampler/above_cap"] == pytest.approx(above, abs=1e-6)
    wild, finite = run("wild", 100.0)
    assert wild.weights[wild.mask].max() <= 1.5
    assert finite.isfinite().all()


# Padding


def test_row_27_padding_changes_no_metric_of_the_update(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tensors, results = Completions.tensors, []

    def wider(self: Any, pad: int, device: Any) -> dict[str, Tensor]:
        fill = {"ids": pad, "mask": 0, "labels": -100}
        return {
            key: torch.nn.functional.pad(value, (0, 11), value=fill[key])
            for key, value in tensors(self, pad, device).items()
        }

    for name, method in (("unchanged", tensors), ("wider", wider)):
        monkeypatch.setattr(Completions, "tensors", method)
        settings = {"micro_batch_size": 2, "epochs": 2, "entropy_coef": 0.01}
        ppo = ppo_fixtures.build_trainer(folders, tmp_path / name, lora=True, **settings)
        ppo_fixtures.perturb(ppo.models)
        ppo.step(0)
        results.append({k: v for k, v in ppo.metrics.items() if "seconds" not in k})
    assert results[1] == pytest.approx(results[0], rel=1e-3, abs=1e-5)
    assert results[0]["clip_fraction"] > 0


@pytest.mark.parametrize("share", [True, False])
def test_the_gradient_does_not_depend_on_the_tokens_of_a_forward_pass(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: bool
):
    results = []
    for name, sizes in (("rows", {"micro_batch_size": 8}), ("tokens", {"tokens_per_batch": 120})):
        with pytest.MonkeyPatch.context() as patch, recorded_gradients(patch) as gradients:
            recorder = Recorder(patch)
            ppo = ppo_fixtures.build_trainer(
                folders, tmp_path / name, n_completions=2, prefix_sharing=share, epochs=1, **sizes
            )
            ppo.step(0)
        results.append((gradients[0], recorder.policy_calls, recorder.rollouts[0]))
    (expected, _, rows), (actual, calls, others) = results
    assert torch.equal(rows.inputs["ids"], others.inputs["ids"])
    assert len(calls) > 1
    taken = []
    for inputs, _ in calls:
        ids = [
            row[:n] for row, n in zip(inputs["ids"].tolist(), inputs["mask"].sum(1), strict=True)
        ]
        taken += [tuple(row) for row in ids]
        prefixes = {tuple(row[: k + 1]) for row in ids for k in range(len(row))}
        tokens = len(prefixes) if share else len(ids) * max(map(len, ids))
        assert len(ids) == 1 or tokens <= 120
    assert len(taken) == 8
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)
