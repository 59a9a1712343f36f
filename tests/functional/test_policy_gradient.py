"""Policy-gradient losses and estimators: values by hand, exact expectations, autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from align.functional.policy_gradient import (
    MAX_LOGRATIO,
    adaptive_kl_coef,
    clipped_surrogate_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
    importance_ratio,
    importance_weights,
    kl_k1,
    kl_k3,
    kl_loss,
    reinforce_loss,
    sapo_loss,
    vespo_loss,
)


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surrogate(ratio: float, advantage: float, **clips: float) -> float:
    clips = {"clip_low": 0.2, "clip_high": 0.2} | clips
    loss = clipped_surrogate_loss(
        float64([math.log(ratio) - 1.0]), float64([-1.0]), float64([advantage]), **clips
    )
    return loss.item()


# --- surrogates ---


def test_reinforce_by_hand():
    # -A * log p
    loss = reinforce_loss(float64([-2.0, -0.5]), float64([3.0, -1.0]))
    assert_close(loss, float64([6.0, -0.5]))


def test_the_expected_reinforce_gradient_is_that_of_the_expected_reward():
    # sum over actions of p * grad(-r * log p) = -grad(sum of p * r), exactly
    logits, rewards = normal(5).requires_grad_(), normal(5, seed=1)
    logps = logits.log_softmax(0)
    estimated = torch.autograd.grad(
        (logps.detach().exp() * reinforce_loss(logps, rewards)).sum(), logits
    )
    exact = torch.autograd.grad(-(logits.softmax(0) * rewards).sum(), logits)
    assert_close(estimated, exact)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        pytest.param(1.1, +1.0, -1.1, id="inside the range: plain ratio"),
        pytest.param(0.9, -2.0, +1.8, id="inside the range, bad action: plain ratio"),
        pytest.param(1.5, +1.0, -1.2, id="good action, too far up: clipped"),
        pytest.param(0.5, +1.0, -0.5, id="good action, moved the wrong way: not clipped"),
        pytest.param(0.5, -1.0, +0.8, id="bad action, too far down: clipped"),
        pytest.param(1.5, -1.0, +1.5, id="bad action, moved the wrong way: not clipped"),
    ],
)
def test_ppo_clip_by_hand(ratio, advantage, expected):
    assert surrogate(ratio, advantage) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        pytest.param(1.25, +1.0, -1.25, id="clip-higher: a good action may rise by 28 %"),
        pytest.param(1.5, +1.0, -1.28, id="and no further"),
        pytest.param(0.7, -1.0, +0.8, id="a bad one falls by 20 % only"),
    ],
)
def test_clip_higher_by_hand(ratio, advantage, expected):
    loss = surrogate(ratio, advantage, clip_low=0.2, clip_high=0.28)
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        pytest.param(10.0, -2.0, +6.0, id="bad action far up: bounded by 3 * 2"),
        pytest.param(2.0, -2.0, +4.0, id="bad action below the bound: as before"),
        pytest.param(0.5, -2.0, +1.6, id="bad action too far down: clipped as before"),
        pytest.param(10.0, +2.0, -2.4, id="good action: as before"),
        pytest.param(0.01, +2.0, -0.02, id="good action far down: as before"),
    ],
)
def test_dual_clip_by_hand(ratio, advantage, expected):
    assert surrogate(ratio, advantage, dual_clip=3.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_infinite_clips_do_not_clip(ratio, advantage):
    loss = surrogate(ratio, advantage, clip_low=math.inf, clip_high=math.inf)
    assert loss == pytest.approx(-ratio * advantage, rel=1e-12)


@pytest.mark.parametrize("difference", [-100.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_the_loss_of_a_log_ratio_of_100_and_its_gradient_are_finite_in_float32(
    difference, advantage
):
    logps = torch.tensor([difference], requires_grad=True)
    for clips in ((0.2, 0.2), (math.inf, math.inf)):
        loss = clipped_surrogate_loss(
            logps,
            torch.zeros(1),
            torch.tensor([advantage]),
            clip_low=clips[0],
            clip_high=clips[1],
        )
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), logps)[0].isfinite().all()
    # The ratio is bounded by exp(20) = 4.85e8.
    assert importance_ratio(torch.tensor([100.0]), torch.zeros(1)).item() == pytest.approx(
        math.exp(20), rel=1e-6
    )
    assert MAX_LOGRATIO == 20.0


@settings(max_examples=100, deadline=None)
@given(st.floats(-200, 200), st.floats(-10, 0))
def test_the_dual_clip_bounds_every_bad_action(difference, advantage):
    loss = clipped_surrogate_loss(
        float64([difference]),
        float64([0.0]),
        float64([advantage]),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
    )
    assert 0 <= loss.item() <= 3 * -advantage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.2, math.inf])
def test_the_first_gradient_of_ppo_is_bitwise_that_of_reinforce(dtype, clip):
    logps, advantages = normal(7, 5).to(dtype), normal(7, 5, seed=1).to(dtype)
    ppo, reinforce = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    clipped_surrogate_loss(
        ppo, logps, advantages, clip_low=clip, clip_high=clip, dual_clip=3.0
    ).sum().backward()
    reinforce_loss(reinforce, advantages).sum().backward()
    assert torch.equal(ppo.grad, reinforce.grad)


def test_beyond_the_clip_a_good_action_has_no_gradient():
    logps = float64([math.log(1.5), math.log(0.5)]).requires_grad_()
    loss = clipped_surrogate_loss(
        logps, float64([0.0, 0.0]), float64([1.0, 1.0]), clip_low=0.2, clip_high=0.2
    )
    # Above the range the gradient is 0; below it, that of -ratio: -0.5.
    assert_close(torch.autograd.grad(loss.sum(), logps)[0], float64([0.0, -0.5]))


# --- soft bounds ---


def ratios(values: list[list[float]]) -> tuple[Tensor, Tensor]:
    """New log-probabilities with these ratios to the old ones, which are -1."""
    old = torch.full_like(float64(values), -1.0)
    return (float64(values).log() + old).requires_grad_(), old


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        pytest.param(1.0, +1.0, -2.0, id="-4 * sigmoid(0)"),
        pytest.param(1.0, -2.0, +4.0 / 1.05, id="bad action: 2 * 4 / 1.05 * sigmoid(0)"),
        pytest.param(1 + math.log(3), +1.0, -3.0, id="sigmoid(log 3) = 3/4"),
        pytest.param(1 - math.log(2), +1.0, -4.0 / 3, id="sigmoid(-log 2) = 1/3"),
        pytest.param(1 + math.log(3) / 1.05, -1.0, 3.0 / 1.05, id="bad action, far up"),
        pytest.param(1.7, 0.0, 0.0, id="no advantage"),
    ],
)
def test_sapo_by_hand(ratio, advantage, expected):
    logps, old = ratios([[ratio]])
    loss = sapo_loss(logps, old, float64([[advantage]]))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_sapo_fades_by_the_squared_hyperbolic_secant():
    # 4 * s * (1 - s) = 1 / cosh(t * (r - 1) / 2)^2, where s = sigmoid(t * (r - 1))
    values = [[0.1, 0.5, 1.0, 1.5, 4.0], [0.1, 0.5, 1.0, 1.5, 4.0]]
    logps, old = ratios(values)
    advantages = float64([[2.0] * 5, [-3.0] * 5])
    loss = sapo_loss(logps, old, advantages, temperature=0.7, negative_temperature=1.4)
    gradient = torch.autograd.grad(loss.sum(), logps)[0]
    temperatures, ratio = float64([[0.7], [1.4]]), float64(values)
    kept = 1 / (temperatures * (ratio - 1) / 2).cosh() ** 2
    assert_close(gradient, -advantages * ratio * kept)
    assert_close(gradient[:, 2], -advantages[:, 2])  # at a ratio of 1 that of REINFORCE
    assert kept[1, 4] < kept[0, 4] < 0.5  # the higher temperature bounds more
    assert torch.autograd.gradcheck(lambda x: sapo_loss(x, old, advantages), logps)


GAMMA = [
    pytest.param([2.0, 2.0], +1.0, 16 * math.exp(-9), id="w = 4: 4^2 * e^(3 * (1 - 4))"),
    pytest.param([0.5, 1.0], +1.0, 0.25 * math.exp(1.5), id="w = 1/2: (1/2)^2 * e^(3 / 2)"),
    pytest.param([2.0, 2.0], -1.0, 64 * math.exp(-6), id="bad row, w = 4: 4^3 * e^(2 * -3)"),
    pytest.param([0.5, 1.0], -1.0, 0.125 * math.exp(1), id="bad row, w = 1/2: (1/2)^3 * e"),
    pytest.param([4.0, 0.25], +1.0, 1.0, id="w = 1, though neither token has that ratio"),
]


@pytest.mark.parametrize(("row", "advantage", "weight"), GAMMA)
def test_vespo_by_hand(row, advantage, weight):
    # A third token is padding. Every loss is -A * weight * logp; the weight has no gradient.
    logps, old = ratios([[*row, 7.0]])
    mask = torch.tensor([[True, True, False]])
    loss = vespo_loss(logps, old, torch.full_like(old, advantage), mask)[mask]
    expected = [-advantage * weight * (math.log(ratio) - 1) for ratio in row]
    assert_close(loss, float64(expected), rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(loss.sum(), logps)[0]
    assert_close(gradient, -advantage * weight * mask.double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("sign", "peak"), [(1.0, 2 / 3), (-1.0, 3 / 2)])
def test_vespo_weighs_most_the_rows_that_moved_the_wrong_way(sign, peak):
    products = torch.linspace(0.01, 5, 500, dtype=torch.float64)[:, None]
    logps, old = ratios(products.tolist())
    loss = vespo_loss(logps, old, torch.full_like(old, sign), torch.ones_like(old).bool())
    weights = -sign * torch.autograd.grad(loss.sum(), logps)[0]
    assert products[weights.argmax()].item() == pytest.approx(peak, abs=0.01)
    assert weights.min() >= 0
    assert weights[-1] < 0.05 * weights.max()


@pytest.mark.parametrize("difference", [-100.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_soft_losses_of_a_log_ratio_of_100_are_finite_in_float32(difference, advantage):
    logps, old = torch.full((1, 2), difference, requires_grad=True), torch.zeros(1, 2)
    advantages, mask = torch.full((1, 2), advantage), torch.ones(1, 2).bool()
    for loss in (
        sapo_loss(logps, old, advantages),
        vespo_loss(logps, old, advantages, mask),
    ):
        assert loss.isfinite().all()
        assert (torch.autograd.grad(loss.sum(), logps)[0].abs() < 1e-30).all()


# --- values ---


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        pytest.param(1.1, 1.0, 3.0, 0.5 * 1.9**2, id="inside the range: plain error"),
        pytest.param(2.0, 1.0, 3.0, 0.5 * 1.8**2, id="too far towards the target: as if at 1.2"),
        pytest.param(0.0, 1.0, 3.0, 0.5 * 3.0**2, id="away from the target: plain, it is worse"),
        pytest.param(0.0, 1.0, -3.0, 0.5 * 3.8**2, id="too far down: as if at 0.8"),
    ],
)
def test_value_clip_by_hand(value, old, target, expected):
    loss = clipped_value_loss(float64([value]), float64([old]), float64([target]), clip=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_without_a_clip_the_value_loss_is_half_the_squared_error_and_ignores_the_old_value():
    loss = clipped_value_loss(float64([1.0]), float64([math.nan]), float64([4.0]))
    assert loss.item() == 4.5  # 0.5 * 3^2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_the_clipped_value_loss_is_never_below_the_plain_one_and_equal_inside_the_range(seed):
    old, returns, step = normal(3, 6, seed=seed).unbind()
    near = old + 0.2 * step.tanh()
    plain = clipped_value_loss(near, old, returns)
    assert torch.equal(clipped_value_loss(near, old, returns, clip=0.2), plain)
    far = old + 3 * step
    clipped = clipped_value_loss(far, old, returns, clip=0.2)
    assert (clipped >= clipped_value_loss(far, old, returns)).all()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_gradient_is_the_error(clip):
    values = float64([1.0, 2.0]).requires_grad_()
    returns = float64([4.0, 0.0])
    loss = clipped_value_loss(values, values.detach(), returns, clip=clip)
    # d/dv 0.5 * (v - R)^2 = v - R
    assert_close(torch.autograd.grad(loss.sum(), values)[0], float64([-3.0, 2.0]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([1.0, 2.0, 6.0, 50.0], 1.0, id="perfect"),
        pytest.param([2.0, 3.0, 7.0, 50.0], 1.0, id="perfect up to a constant"),
        pytest.param([4.0, 4.0, 4.0, 50.0], 0.0, id="a constant"),
        # errors 2, 4, 12: twice the returns, so four times their variance
        pytest.param([-1.0, -2.0, -6.0, 50.0], -3.0, id="the opposite: 1 - 4"),
        pytest.param([0.5, 1.0, 3.0, 50.0], 0.75, id="half way: 1 - 1/4"),
    ],
)
def test_explained_variance_by_hand(values, expected):
    mask = torch.tensor([True, True, True, False])
    share = explained_variance(float64(values), float64([1.0, 2.0, 6.0, -9.0]), mask)
    assert share.item() == pytest.approx(expected, abs=1e-12)


def test_the_explained_variance_of_equal_returns_is_nan():
    ones = torch.ones(3)
    assert explained_variance(ones, ones, ones.bool()).isnan()
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0]), ones, ones.bool()).isnan()


# --- entropy and KL ---


def test_entropy_by_hand():
    # uniform over 4: log 4; certain: 0; (1/2, 1/4, 1/4, 0): 1.5 log 2
    logits = float64(
        [
            [3.0, 3.0, 3.0, 3.0],
            [0.0, -math.inf, -math.inf, -math.inf],
            [math.log(2), 0.0, 0.0, -math.inf],
        ]
    )
    expected = float64([math.log(4), 0.0, 1.5 * math.log(2)])
    assert_close(entropy(logits), expected)


def test_entropy_equals_torchs_and_its_gradient_is_finite_with_impossible_actions():
    logits = normal(2, 3, 5).requires_grad_()
    expected = torch.distributions.Categorical(logits=logits)
    assert_close(entropy(logits), expected.entropy())
    masked = float64([0.3, 1.0, -math.inf]).requires_grad_()
    kept = float64([0.3, 1.0]).requires_grad_()
    gradient = torch.autograd.grad(entropy(masked), masked)[0]
    assert_close(gradient[:2], torch.autograd.grad(entropy(kept), kept)[0])
    assert gradient[2] == 0


def test_kl_estimators_by_hand():
    # policy 1/2, reference 1/4: log-ratio log 2, so log 2 and (1/2 - 1) + log 2
    logps, reference = float64([math.log(1 / 2)]), float64([math.log(1 / 4)])
    log_2 = math.log(2)
    assert_close(kl_k1(logps, reference), float64([log_2]))
    assert_close(kl_k3(logps, reference), float64([log_2 - 0.5]))
    # swapped: -log 2 and (2 - 1) - log 2
    assert_close(kl_k1(reference, logps), float64([-log_2]))
    assert_close(kl_k3(reference, logps), float64([1 - log_2]))


def test_k1_and_k3_are_unbiased():
    policy = torch.distributions.Categorical(logits=2 * normal(6))
    reference = torch.distributions.Categorical(logits=2 * normal(6, seed=1))
    exact = torch.distributions.kl_divergence(policy, reference)
    probs = policy.probs
    # the expectation, by enumeration of the actions
    assert_close((probs * kl_k1(policy.logits, reference.logits)).sum(), exact)
    assert_close((probs * kl_k3(policy.logits, reference.logits)).sum(), exact)


def test_where_policy_and_reference_are_close_both_estimate_the_kl():
    logits = normal(6)
    policy = torch.distributions.Categorical(logits=logits)
    reference = torch.distributions.Categorical(logits=logits + 1e-3 * normal(6, seed=1))
    exact = torch.distributions.kl_divergence(policy, reference)
    for estimate in (kl_k1, kl_k3):
        mean = (policy.probs * estimate(policy.logits, reference.logits)).sum()
        assert mean.item() == pytest.approx(exact.item(), rel=2e-3)


@pytest.mark.parametrize("estimate", [kl_k1, kl_k3])
def test_estimates_from_samples_are_within_three_standard_errors(estimate):
    torch.manual_seed(0)
    policy = torch.distributions.Categorical(logits=normal(6))
    reference = torch.distributions.Categorical(logits=normal(6, seed=1))
    actions = policy.sample((20_000,))
    estimates = estimate(policy.log_prob(actions), reference.log_prob(actions))
    exact = torch.distributions.kl_divergence(policy, reference)
    assert abs(estimates.mean() - exact) < 3 * estimates.std() / math.sqrt(20_000)


@settings(max_examples=200, deadline=None)
@given(st.floats(-50, 0, width=32), st.floats(-50, 0, width=32))
def test_k3_is_never_negative(logp, reference):
    assert (kl_k3(torch.full((9,), logp), torch.full((9,), reference)) >= 0).all()


def test_k3_is_never_negative_despite_rounding():
    differences = torch.cat([10.0 ** torch.linspace(-9, 0, 5000), torch.zeros(1)])
    for sign in (-1, 1):
        assert (kl_k3(sign * differences, torch.zeros(5001)) >= 0).all()


def test_k3_is_accurate_in_float32_where_the_policies_are_close():
    # d^2 / 2 + ...: with d = 2^-10, 4.7668e-7 +- a unit in the last place of d, 1.2e-10
    d = 2.0**-10
    estimate = kl_k3(torch.tensor([-d]), torch.zeros(1)).item()
    assert estimate == pytest.approx(d**2 / 2 + d**3 / 6, abs=1.2e-10)


def test_k3_of_a_log_ratio_of_100_is_finite():
    assert kl_k3(torch.tensor([-100.0]), torch.zeros(1)).isfinite().all()


# --- gradients of KL penalties, by enumeration of all completions ---


def gradient(loss: Tensor, *parameters: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def two_tokens(first: Tensor, second: Tensor) -> Tensor:
    """Log-probabilities per token, ``[9, 2]``, of all completions of two tokens out of three."""
    logps = torch.stack([first.log_softmax(0)[:, None].expand(3, 3), second.log_softmax(1)], dim=-1)
    return logps.reshape(9, 2)


def test_the_gradient_of_the_kl_loss_is_that_of_the_kl_of_whole_completions():
    first, second = normal(3).requires_grad_(), normal(3, 3, seed=1).requires_grad_()
    logps = two_tokens(first, second)
    reference = two_tokens(normal(3, seed=2), normal(3, 3, seed=3))
    chances = logps.sum(1).exp()
    exact = gradient((chances * (logps - reference).sum(1)).sum(), first, second)
    old, mask = logps.detach(), torch.ones(9, 2).bool()
    loss = (chances.detach()[:, None] * kl_loss(logps, old, reference, mask)).sum()
    assert_close(gradient(loss, first, second), exact)
    # From samples of an older policy: the ratio corrects the token, not the tokens before it.
    older = (normal(3, seed=4), normal(3, 3, seed=5))
    one, moved = logps[::3, :1], two_tokens(*older)[::3, :1]
    exact = gradient((one.exp() * (one - reference[::3, :1])).sum(), first)
    loss = (moved.exp() * kl_loss(one, moved, reference[::3, :1], mask[:3, :1])).sum()
    assert_close(gradient(loss, first), exact)


def test_the_kl_loss_neither_reads_padding_nor_passes_gradients_to_it():
    logps = float64([[math.nan, -1.0, -2.0, math.nan]]).requires_grad_()
    old, reference = float64([[math.nan, -1.0, -2.0, 0.0]]), float64([[0.0, -1.5, -1.0, math.nan]])
    mask = torch.tensor([[False, True, True, False]])
    loss = kl_loss(logps.masked_fill(~mask, 0), old, reference.masked_fill(~mask, 0), mask)
    assert loss[0, [0, 3]].tolist() == [0, 0]
    alone = kl_loss(logps[:, 1:3], old[:, 1:3], reference[:, 1:3], mask[:, 1:3])
    assert_close(loss[:, 1:3], alone)
    assert torch.autograd.grad(loss.sum(), logps)[0].isfinite().all()


def test_k3_as_a_reward_and_k3_as_a_loss_have_the_gradients_of_other_divergences():
    logits, reference = normal(5).requires_grad_(), normal(5, seed=1).log_softmax(0)
    logps = logits.log_softmax(0)
    chances = logps.exp()
    to_reference = gradient((chances * (logps - reference)).sum(), logits)
    from_reference = gradient((reference.exp() * (reference - logps)).sum(), logits)
    k3 = kl_k3(logps, reference)
    as_reward = gradient((chances.detach() * k3.detach() * logps).sum(), logits)
    assert_close(as_reward, to_reference - from_reference)
    assert_close(gradient((chances.detach() * k3).sum(), logits), from_reference)
    as_k1 = gradient((chances.detach() * kl_k1(logps, reference).detach() * logps).sum(), logits)
    assert_close(as_k1, to_reference)


def test_k1_in_the_reward_and_the_kl_loss_reach_the_optimum_and_k3_in_the_reward_collapses():
    rewards, reference = normal(5, seed=1), normal(5).log_softmax(0)
    optimum = (reference + rewards).log_softmax(0)  # beta is 1

    def distance(penalty: str) -> float:
        logits = reference.clone().requires_grad_()
        for _ in range(250):
            logps = logits.log_softmax(0)
            gains = rewards - {"k1": kl_k1, "k3": kl_k3}.get(penalty, lambda *_: 0)(
                logps.detach(), reference
            )
            loss = -logps * gains
            if penalty == "loss":
                columns = (logps[:, None], logps.detach()[:, None], reference[:, None])
                loss = loss + kl_loss(*columns, torch.ones(5, 1).bool())[:, 0]
            step = gradient((logps.detach().exp() * loss).sum(), logits)
            logits = (logits - 0.5 * step).detach().requires_grad_()
        logps = logits.log_softmax(0).detach()
        return (logps.exp() * (logps - optimum)).sum().item()

    assert distance("k1") < 1e-5
    assert distance("loss") < 1e-5
    assert distance("k3") > distance("none") > 0.2, "one action, sooner than without a penalty"


# --- coefficients and weights ---


@pytest.mark.parametrize(
    ("kl", "n", "factor"),
    [
        pytest.param(12.0, 100, 1.2, id="twice the target, a whole horizon: 20 % more"),
        pytest.param(600.0, 100, 1.2, id="however far above"),
        pytest.param(0.0, 100, 0.8, id="no divergence: 20 % less"),
        pytest.param(6.0, 100, 1.0, id="on target"),
        # 6.6 / 6 - 1 = 0.1; 50 / 100 of it
        pytest.param(6.6, 50, 1.05, id="10 % above, half a horizon: 5 % more"),
        pytest.param(5.4, 50, 0.95, id="10 % below, half a horizon: 5 % less"),
    ],
)
def test_adaptive_kl_by_hand(kl, n, factor):
    coef = adaptive_kl_coef(0.5, kl, target=6.0, horizon=100, n=n)
    assert coef == pytest.approx(0.5 * factor, rel=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_adaptive_kl_at_twice_the_target_is_exactly_a_fifth_higher(coef, target):
    assert adaptive_kl_coef(coef, 2 * target, target=target, horizon=64, n=64) == coef * 1.2


def test_importance_weights_are_exactly_1_for_the_same_engine():
    logps = (10 * normal(4, 9)).float()
    assert torch.equal(importance_weights(logps, logps.clone(), cap=2.0), torch.ones(4, 9))


def test_importance_weights_by_hand_and_bounded_under_noise():
    # e^0.5; e^3 = 20 is capped at 2; e^-3 stays
    weights = importance_weights(float64([-1.0, -1.0, -4.0]), float64([-1.5, -4.0, -1.0]), cap=2.0)
    assert_close(weights, float64([math.exp(0.5), 2.0, math.exp(-3)]))
    logps = normal(100).requires_grad_()
    noisy = importance_weights(logps, logps.detach() + 100 * normal(100, seed=1), cap=2.0)
    assert ((noisy >= 0) & (noisy <= 2)).all()
    assert not noisy.requires_grad
    uncapped = importance_weights(float64([3.0]), float64([0.0]), cap=math.inf)
    assert_close(uncapped, float64([math.exp(3)]))


def test_importance_weights_recover_the_policys_expectation():
    # sum over actions of sampler * (policy / sampler) * r = sum of policy * r, below the cap
    policy, sampler = normal(5).log_softmax(0), normal(5, seed=1).log_softmax(0)
    rewards = normal(5, seed=2)
    weights = importance_weights(policy, sampler, cap=1e6)
    assert_close((sampler.exp() * weights * rewards).sum(), (policy.exp() * rewards).sum())
