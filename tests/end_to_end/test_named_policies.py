"""The policies that theory names for every method, in a world small enough to list everything.

World, named policies and runs are those of ``python -m benchmarks.proofs``, which trains every
method with three seeds and prints a page. Here the named policies are checked against other
computations, and some methods are trained with one seed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.config.methods import _LOSSES
from align.config.stages import STAGES
from benchmarks.proofs import methods, optima
from benchmarks.proofs.page import page
from benchmarks.proofs.training import train_online
from benchmarks.proofs.world import (
    LENGTHS,
    LIMIT,
    TEXTS,
    WORDS,
    kl,
    make_world,
    outcome_chances,
    systematic,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), 0)


# The world and the named policies


def test_the_optimal_objective_is_beta_times_the_log_of_its_normalizer(world):
    # J* = beta * log E_ref[exp(r / beta)], and J* - J = beta * KL(policy, p*) for any policy, such
    # as the reference
    beta, reference = 0.7, world.reference
    best = beta * (reference.exp() * (world.rewards / beta).exp()).sum(1).log().mean().item()
    optimum = optima.reward_and_kl(world, beta)

    def objective(policy: Tensor) -> float:
        return (policy.exp() * (world.rewards - beta * (policy - reference))).sum(1).mean().item()

    assert objective(optimum) == pytest.approx(best, abs=1e-6)
    assert best - objective(reference) == pytest.approx(beta * kl(reference, optimum), abs=1e-6)
    assert len(TEXTS) == 1 + 3 + 9


def test_a_systematic_sample_has_the_expected_counts_rounded_up_or_down():
    chances = torch.tensor([0.11, 0.52, 0.37]).double()
    generator = torch.Generator().manual_seed(0)
    for n in (1, 7, 50):
        counts = torch.bincount(torch.tensor(systematic(chances, n, generator)), minlength=3)
        assert counts.sum() == n
        assert ((counts - n * chances).abs() < 1).all()


def test_best_of_two_is_the_distribution_of_the_chosen_completions(world):
    chosen = outcome_chances(world).sum(2)
    assert kl(chosen.log(), optima.best_of_two(world)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        pytest.param("sigmoid", lambda world: optima.reward_and_kl(world, 1.0), id="DPO"),
        pytest.param("nca_pair", optima.best_of_two, id="NCA"),
    ],
)
def test_closed_forms_minimize_the_expected_loss(world, loss, named):
    assert kl(optima.minimizer(world, loss, 1.0), named(world)) == pytest.approx(0, abs=1e-6)


def test_no_policy_has_a_lower_loss_than_the_one_that_excludes_completions(world):
    named = optima.water_filling(world)
    assert (named.exp() == 0).any(1).all()
    assert torch.allclose(named.exp().sum(1), torch.ones(2).double())
    found = optima.minimizer(world, "apo_zero", 1.0)
    smallest = optima.expected_loss(world, named.clamp(min=-60), "apo_zero", 1.0)
    assert (smallest <= optima.expected_loss(world, found, "apo_zero", 1.0) + 1e-9).all()


@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm"])
def test_losses_of_means_per_token_are_stationary_at_their_named_policies(world, loss):
    named = methods.ipo(world) if loss == "ipo" else optima.length_scaled(world, world.rewards / 2)
    logits = named.clone().requires_grad_()
    per_token = (logits.log_softmax(1) - world.reference) / LENGTHS
    delta = per_token[:, :, None] - per_token[:, None, :]
    if loss == "ipo":
        # (delta - 1 / (2 beta))^2 with beta = 0.4
        losses = (delta - 1.25).square()
    else:
        losses = -torch.nn.functional.logsigmoid(2 * delta)
    (outcome_chances(world) * losses).sum().backward()
    assert logits.grad.abs().max() < 1e-6


FIRST = torch.tensor([WORDS.index(text[0]) if text else len(WORDS) for text in TEXTS])
"""The first token of each completion; the last number is eos."""
LATER = torch.tensor([[*WORDS, ""].index("".join(text.split()[1:])) for text in TEXTS])
"""The second token of each completion, eos included."""


def token_logps(first: Tensor, second: Tensor) -> Tensor:
    """Log-probabilities of both tokens of all completions, ``[prompt, completion, token]``."""
    one = first.log_softmax(1)[:, FIRST]
    two = second.log_softmax(2)[:, FIRST.clamp(max=len(WORDS) - 1), LATER]
    return torch.stack([one, two * (LENGTHS == LIMIT)], 2)


def tables(policy: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the first token, and of the second after each first word."""
    first = torch.stack([policy[:, k == FIRST].logsumexp(1) for k in range(len(WORDS) + 1)], 1)
    rows = [[(k == FIRST) & (j == LATER) for j in range(len(WORDS) + 1)] for k in range(len(WORDS))]
    second = torch.stack(
        [torch.stack([policy[:, row].sum(1) for row in each], 1) for each in rows], 1
    )
    return first, second


@pytest.mark.parametrize(
    ("scaled", "per_sequence", "own_kl_only"),
    [(True, True, False), (True, False, False), (False, True, False), (False, False, False),
     (False, False, True)],
)  # fmt: skip
def test_the_expected_gradient_is_zero_at_the_fixed_point(world, scaled, per_sequence, own_kl_only):
    """The expected loss of GRPO over all completions, differentiated with respect to each logit."""
    beta = 2.0
    if own_kl_only:
        policy = optima.token_credit(world, beta)
    else:
        policy, _, _ = optima.group_relative(world, beta, scaled=scaled, per_sequence=per_sequence)
    reference = token_logps(*tables(world.reference))

    def gradient(policy: Tensor) -> float:
        first, second = (table.clone().requires_grad_() for table in tables(policy))
        logps = token_logps(first, second)
        old, chances = logps.detach(), policy.exp()
        k3 = (reference - logps).expm1() - (reference - logps)
        later = torch.zeros_like(old)
        if not own_kl_only:
            later[:, :, 0] = k3.detach()[:, :, 1]
        mean = (chances * world.rewards).sum(1, keepdim=True)
        deviation = (chances * (world.rewards - mean).square()).sum(1, keepdim=True).sqrt()
        advantages = (world.rewards - mean) / (deviation if scaled else 1.0)
        ratio = (logps - old).exp()
        losses = ratio * (beta * (k3 + later) - advantages[:, :, None])
        weights = chances / (LENGTHS if per_sequence else 1.0)
        (weights[:, :, None] * losses).sum().backward()
        return max(first.grad.abs().max().item(), second.grad.abs().max().item())

    assert gradient(policy) < 1e-6
    assert gradient(world.reference) > 1e-2


# The rows


def test_every_training_method_has_a_row():
    trained = {kind for kind, stage in STAGES.items() if stage.trains_model}
    assert trained - {method.stage for method in methods.METHODS} == set()
    names = " ".join(method.name for method in methods.METHODS)
    for kind in ("dpo", "kto"):
        losses = {loss for loss in _LOSSES[kind] if f"{kind.upper()} stage, `{loss}`" not in names}
        assert losses == (set(methods.WITHOUT_POLICY) if kind == "dpo" else set())


def test_the_page_has_every_row_with_its_divergences_and_interval():
    runs = [
        methods.Run(method.name, seed, 0.5, 0.015 * seed, 0.25, 0.125, 0.75)
        for method in methods.METHODS
        for seed in (2, 0, 1)
    ]
    text = page(runs)
    # mean 0.015, standard deviation 0.015: 4.303 * 0.015 / sqrt(3) = 0.0373
    row = "| PPO | `ppo` | h = r/β | 0.50 | 0.000, 0.015, **0.030** | 0.015 ± 0.037 |\n"
    assert row in text
    assert text.count("0.015 ± 0.037 |") == len(methods.METHODS)
    assert "| 0.015 ± 0.037 | 0.25 | 0.12 |\n" in text


PAGE = Path(__file__).parents[2] / "docs" / "results" / "proofs.md"


def cells() -> dict[str, list[str]]:
    """The cells of the rows of the published page, by method."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in rows if len(row) > 5}


def test_the_published_page_has_every_method_within_the_bound():
    published = cells()
    assert {method.name for method in methods.METHODS} == published.keys() - {"method", "---"}
    for method in methods.METHODS:
        reached = [float(value.strip("*")) for value in published[method.name][4].split(",")]
        assert len(reached) == 3, method.name
        assert max(reached) <= methods.BOUND, method.name
        mean, _ = published[method.name][5].split(" ± ")
        assert float(mean) == pytest.approx(sum(reached) / 3, abs=1e-3)
    text = PAGE.read_text(encoding="utf-8")
    assert all(
        f"| `{loss}` | {reason} |" in text for loss, reason in methods.WITHOUT_POLICY.items()
    )


def test_the_lowest_of_several_minima_is_found_where_a_loss_is_not_convex(world):
    def loss(policy: Tensor) -> Tensor:
        return optima.expected_loss(world, policy, "discopop", 1.0)

    beside, lowest = (optima.minimizer(world, "discopop", 1.0, starts=n) for n in (1, 20))
    assert (loss(lowest) < loss(beside) - 0.05).all()
    # Near the optimum of reward and KL, where the loss is that of DPO's pairs almost everywhere.
    assert kl(lowest, optima.reward_and_kl(world, 1.0)) < 0.03 < kl(lowest, world.reference)


# Runs


def test_rloo_comes_close_to_the_optimal_policy_in_a_few_steps(world):
    settings = {"batch_size": 128, "n_completions": 64, "steps": 15, "learning_rate": 3e-3}
    policy = train_online("rloo", world, 0, settings)
    optimum = optima.reward_and_kl(world, 1.0)
    assert kl(policy, optimum) <= 0.3 * kl(world.reference, optimum)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO stage, `sigmoid`", "Reward model", "PPO", "GRPO"])
def test_a_method_reaches_the_policy_that_theory_names(tmp_path, name):
    method = next(method for method in methods.METHODS if method.name == name)
    run = methods.run(method, 0, tmp_path)
    assert run.start > 0.1
    assert run.reached <= methods.BOUND
