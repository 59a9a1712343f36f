"""The policies that theory names for every method, in a world small enough to list everything.

World, named policies and runs are those of ``python -m benchmarks.proofs``, which trains every
method with three seeds and prints a page. Here the named policies are checked against other
computations, and some methods are trained with one seed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.proofs import fixed_points, methods, optima, runs
from benchmarks.proofs.training import train_online
from benchmarks.proofs.world import (
    EOS,
    LENGTHS,
    LIMIT,
    PROMPTS,
    TEXTS,
    WORDS,
    kl,
    make_world,
    outcome_chances,
    systematic,
    write_matched_pairs,
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


def test_matched_pairs_have_the_sides_of_drawn_pairs(world):
    write_matched_pairs(world, 500, 0)
    rows = pq.read_table(world.data / "pairs-train.parquet").to_pylist()
    expected = outcome_chances(world)
    for i in range(len(expected)):
        own = [row for row in rows if row["prompt_id"] == str(i)]
        assert len(own) == 500
        for axis, side in ((1, "chosen"), (0, "rejected")):
            texts = Counter(row[side][0]["content"] for row in own)
            counts = torch.tensor([texts[text] for text in TEXTS])
            assert ((counts - 500 * expected[i].sum(axis)).abs() < 1).all()
        # The lower of both counts of a completion; drawn pairs are equal more rarely.
        both = torch.minimum(expected[i].sum(0), expected[i].sum(1)).sum()
        equal = sum(row["chosen"] == row["rejected"] for row in own)
        assert equal == pytest.approx(500 * both, abs=len(TEXTS))
        assert equal > 2 * 500 * expected[i].diagonal().sum()


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
    ("scale", "per_sequence", "own_kl_only"),
    [("group", True, False), ("group", False, False), ("none", True, False),
     ("none", False, False), ("none", False, True), ("batch", False, False)],
)  # fmt: skip
def test_the_expected_gradient_is_zero_at_the_fixed_point(world, scale, per_sequence, own_kl_only):
    """The expected loss of GRPO over all completions, differentiated with respect to each logit."""
    beta = 2.0
    if own_kl_only:
        policy = fixed_points.token_credit(world, beta)
    else:
        policy, _, _ = fixed_points.group_relative(
            world, beta, scale=scale, per_sequence=per_sequence
        )
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
        squares = (chances * world.rewards.square()).sum(1, keepdim=True)
        deviation = {
            "group": (squares - mean.square()).sqrt(),
            "batch": (squares.mean() - mean.mean().square()).sqrt(),
            "none": 1.0,
        }[scale]
        advantages = (world.rewards - mean) / deviation
        ratio = (logps - old).exp()
        losses = ratio * (beta * (k3 + later) - advantages[:, :, None])
        weights = chances / (LENGTHS if per_sequence else 1.0)
        (weights[:, :, None] * losses).sum().backward()
        return max(first.grad.abs().max().item(), second.grad.abs().max().item())

    assert gradient(policy) < 1e-6
    assert gradient(world.reference) > 1e-2


def test_the_expected_gradient_over_all_mixed_groups_is_zero_at_the_fixed_point(world):
    """The loss of every group of three completions, weighted by its probability."""
    beta, n, binary = 0.7, 3, world.binary()
    groups = torch.tensor(list(itertools.product(range(len(TEXTS)), repeat=n)))
    reference = token_logps(*tables(world.reference))

    def gradient(policy: Tensor) -> float:
        first, second = (table.clone().requires_grad_() for table in tables(policy))
        logps = token_logps(first, second)
        k3 = (reference - logps).expm1() - (reference - logps)
        later = torch.zeros_like(k3)
        later[:, :, 0] = k3.detach()[:, :, 1]
        ratio = (logps - logps.detach()).exp()
        total = torch.zeros(())
        for prompt, rewards in enumerate(binary.rewards):
            scores = rewards[groups]
            chances = policy[prompt].exp()[groups].prod(1) * (scores.amax(1) > scores.amin(1))
            chances = chances / chances.sum()
            advantages = (scores - scores.mean(1, keepdim=True))[:, :, None]
            losses = ratio[prompt, groups] * (beta * (k3 + later)[prompt, groups] - advantages)
            total = total + (chances * losses.sum((1, 2))).sum()
        total.backward()
        return max(first.grad.abs().max().item(), second.grad.abs().max().item())

    policy = fixed_points.mixed_groups(binary, beta, n=n)
    assert gradient(policy) < 1e-6
    assert gradient(optima.reward_and_kl(binary, beta)) > 1e-2
    # Large groups are hardly ever equal: the optimum itself.
    many = fixed_points.mixed_groups(binary, beta, n=400)
    assert kl(many, optima.reward_and_kl(binary, beta)) < 1e-4


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_normalized_rewards_minus_kl_are_equal_for_all_completions_at_the_optimum(world, scale):
    beta = 2.0
    policy = fixed_points.normalized_rewards(world, beta, scale=scale)
    shares = policy.exp() / (len(policy) if scale == "batch" else 1)
    total = -beta * (policy - world.reference)
    for part in world.parts:
        # A population of 100,000 completions in the policy's proportions.
        counts = (shares * 100_000).round().long()
        rows = [part[k].repeat_interleave(counts[k]) for k in range(len(part))]
        deviations = [row.std() for row in rows] if scale == "group" else [torch.cat(rows).std()]
        total = total + part / torch.stack(deviations)[:, None]
    assert (total.amax(1) - total.amin(1)).max() < 1e-3
    assert torch.allclose(sum(world.parts), world.rewards)
    assert all((part.amax(1) > part.amin(1)).all() for part in world.parts)


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
    run = runs.run(method, 0, tmp_path)
    assert run.start > 0.1
    assert run.reached <= methods.BOUND


def token_rows() -> list[tuple[Tensor, Tensor]]:
    """The tokens of each prompt with all completions, and those of the completions."""
    ids = {word: n for n, word in enumerate((EOS, *WORDS))}
    completions = [[*(ids[word] for word in text.split()), ids[EOS]][:LIMIT] for text in TEXTS]
    own = torch.tensor([row + [ids[EOS]] * (LIMIT - len(row)) for row in completions])
    heads = [[ids[EOS], *(ids[word] for word in prompt.split())] for prompt in PROMPTS]
    return [(torch.cat([torch.tensor([head] * len(own)), own], 1), own) for head in heads]


def log_probabilities(model: torch.nn.Module) -> Tensor:
    """Those of all completions, ``[prompt, completion]``, with a gradient."""
    exists = torch.arange(LIMIT) < LENGTHS[:, None]
    logps = []
    for tokens, own in token_rows():
        logits = model(input_ids=tokens).logits[:, -LIMIT - 1 : -1]
        logps.append((logits.log_softmax(-1).gather(2, own[..., None])[..., 0] * exists).sum(1))
    return torch.stack(logps).double()


@pytest.mark.slow
def test_noise_of_batches_not_the_exact_gradient_ends_far_from_a_policy_that_excludes(tmp_path):
    """Seed 2 with 320 steps and a learning rate of 1.5e-3, in a loop without code of TRL."""
    world = make_world(tmp_path, 2)
    reference, named = world.reference, optima.water_filling(world)
    wins = 2 * reference.exp() * optima.win_probabilities(world)
    sides = torch.stack([wins, 2 * reference.exp() - wins])
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        """Shares of each side in a batch with 50 of them for each prompt."""
        rows = torch.multinomial(sides.flatten(0, 1), 50, True, generator=generator)
        return torch.nn.functional.one_hot(rows, len(TEXTS)).double().mean(1).view_as(sides)

    def trained(shares: Callable[[], Tensor]) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(world.model)
        assert torch.allclose(log_probabilities(model), reference, atol=1e-4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=320)
        for _ in range(320):
            desirable, undesirable = shares()
            gains = torch.sigmoid(log_probabilities(model) - reference)
            optimizer.zero_grad()
            ((undesirable - desirable) * gains).sum().div(4).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return log_probabilities(model).detach()

    assert kl(named, trained(lambda: sides)) <= methods.BOUND
    collapsed = trained(drawn)
    assert kl(named, collapsed) > 1
    assert runs.excluded(collapsed, named) <= methods.BOUND
