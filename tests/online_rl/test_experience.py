"""Experience and rollouts: log-probabilities, KL, token rewards and advantages of completions.

Rows are those of the checklist in the design notes on PPO. Expected values come from loops over the
tokens of each completion, and from plain models that read one row alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ppo_fixtures, tiny_models
from helpers.ppo_fixtures import Folders, ppo_config
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from align.functional.token_rewards import (
    completion_gae,
    group_relative,
    leave_one_out,
    overlong_share,
)
from align.models import generation, tokenization
from align.models.logps import small_vocabulary_tiles
from align.online_rl import trainer
from align.online_rl.completions import Completions
from align.online_rl.experience import Experience, compute_experience, make_rollout
from align.online_rl.metrics import compute_metrics
from align.online_rl.models import ModelView
from align.online_rl.sampling import LocalSampler

OWN_REWARDS: dict[str, Any] = {"kind": "reinforce", "gamma": 0.0}
"""With a discount of 0, the advantages of REINFORCE are each token's own reward."""


@dataclasses.dataclass(frozen=True, slots=True)
class WiderCompletions(Completions):
    """Completions that are padded to more columns than the longest row has."""

    n_more: int = 0

    def tensors(self, pad: int, device: Any) -> dict[str, Tensor]:
        inputs = Completions.tensors(self, pad, device)
        fill = {"ids": pad, "mask": 0, "labels": -100}
        return {
            key: torch.nn.functional.pad(value, (0, self.n_more), value=fill[key])
            for key, value in inputs.items()
        }


class PerturbedRun:
    """A trainer whose policy differs from its reference, and the experience of 8 completions."""

    def __init__(self, folders: Folders, folder: Path) -> None:
        self.trainer = ppo_fixtures.build_trainer(folders, folder, lora=True, max_new_tokens=40)
        ppo_fixtures.perturb(self.trainer.models)
        self.completions = ppo_fixtures.sample(self.trainer)
        self.scores = torch.linspace(-1.0, 2.0, 8)
        self.experience = compute_experience(self.trainer.models, self.completions, batch_size=8)

    def with_padding(self, n_columns: int) -> Experience:
        """The experience of the same completions in a batch with more columns of padding."""
        rows = self.completions
        wider = WiderCompletions(rows.prompts, rows.completions, rows.finished, n_more=n_columns)
        return compute_experience(self.trainer.models, wider, batch_size=3)

    def with_junk(self) -> Experience:
        """The experience with other numbers in all columns outside the completions."""
        e = self.experience
        junk = {
            name: torch.where(e.mask, getattr(e, name), 1e3)
            for name in ("logps", "entropy", "values")
        }
        junk["ref_logps"] = torch.where(e.mask, e.ref_logps, -1e3)
        return Experience(inputs=e.inputs, **junk)

    def metrics(self, experience: Experience) -> dict[str, float]:
        """Metrics of the completions with an experience."""
        scores = self.trainer.scorer.score(self.completions, self.trainer.prompts.rows[:8])
        return compute_metrics(self.completions, experience, scores)


@pytest.fixture(scope="module")
def run(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> PerturbedRun:
    return PerturbedRun(folders, tmp_path_factory.mktemp("perturbed"))


# Padding


@pytest.mark.parametrize("share", [False, True], ids=["padded", "prefixes shared"])
@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_row_04_a_completion_has_the_same_log_probabilities_alone_and_in_a_padded_batch(
    folders: Folders, positions: str, share: bool
):
    source = folders.world.sft if positions == "rotary" else folders.gpt2
    models = ppo_fixtures.build_models(source, [], lora=False, share=share, temperature=0.7)
    tokenizer = models.tokenizer
    rows = tiny_models.rows(folders.world.data, "prompts-train")[:5]
    prompts = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    stops = generation.set_sampling(
        models.policy.model, tokenizer, temperature=0.7, top_p=1.0, max_new_tokens=20
    )
    # The same prompt twice, and one much shorter: shared prefixes, and padding of 30 columns.
    prompts = [*prompts, prompts[0], prompts[1][-20:]]
    completions = LocalSampler(models.policy, stops, batch_size=16).generate(
        prompts, seeds=range(len(prompts))
    )
    assert len({len(row) for row in completions.rows}) > 3
    together = completions.tensors(tokenizer.pad_token_id, "cpu")
    whole = ppo_fixtures.columns(models.policy.logps(*together.values())[0], completions)
    values = ppo_fixtures.columns(
        models.critic.values(together["ids"], together["mask"]), completions
    )
    plain = ppo_fixtures.load_plain_policy(source)
    expected = ppo_fixtures.plain_logps(plain, completions, 0.7)
    for i in range(len(prompts)):
        one = Completions(
            [completions.prompts[i]], [completions.completions[i]], [completions.finished[i]]
        )
        alone = one.tensors(tokenizer.pad_token_id, "cpu")
        assert alone["mask"].all()
        logps = ppo_fixtures.columns(models.policy.logps(*alone.values())[0], one)[0]
        assert_close(whole[i], logps, rtol=0, atol=1e-5)
        assert_close(whole[i].double(), expected[i], rtol=0, atol=1e-5)
        value = ppo_fixtures.columns(models.critic.values(alone["ids"], alone["mask"]), one)[0]
        assert_close(values[i], value, rtol=0, atol=1e-5)


# Token rewards


def test_row_08_the_score_is_on_the_last_token_and_rewards_sum_to_the_score_minus_kl(
    folders: Folders, tmp_path: Path
):
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, lora=True, max_new_tokens=48)
    ppo_fixtures.perturb(ppo.models)
    completions = ppo_fixtures.sample(ppo)
    assert 0 < sum(completions.finished) < len(completions.finished)
    experience = compute_experience(ppo.models, completions, batch_size=4)
    scores = torch.arange(10.0, 18.0)
    # Discounted by 0, a return is the token's own reward; by 1, the sum from that token on.
    own, sums = (
        make_rollout(
            experience,
            scores,
            ppo_config(kind="reinforce", gamma=gamma),
            kl_coef=0.5,
        ).advantages
        for gamma in (0.0, 1.0)
    )
    ppo.models.savable.save_pretrained(str(tmp_path / "moved"), selected_adapters=["default"])
    policy, reference = (
        ppo_fixtures.plain_logps(ppo_fixtures.load_plain_policy(folder), completions, 0.7)
        for folder in (tmp_path / "moved", folders.world.sft)
    )
    eos, distance = ppo.models.tokenizer.eos_token_id, 0.0
    for i, (ours, theirs) in enumerate(zip(policy, reference, strict=True)):
        kl = ours - theirs
        distance += kl.abs().sum().item()
        expected = -0.5 * kl
        expected[-1] += scores[i]
        tokens = completions.completions[i]
        rewards = ppo_fixtures.columns(own, completions)[i]
        assert_close(rewards.double(), expected, rtol=0, atol=1e-3)
        assert rewards.argmax() == len(tokens) - 1
        assert (tokens[-1] == eos) == completions.finished[i]
        start = len(completions.prompts[i]) - 1
        assert own[i].count_nonzero() <= len(tokens)  # nothing on a prompt or a pad
        assert sums[i, start].item() == pytest.approx((scores[i] - 0.5 * kl.sum()).item(), abs=2e-3)
    assert distance > 1
    # As a term of the loss, the penalty leaves the rewards alone and needs the reference.
    config = ppo_config(kind="reinforce", gamma=0.0, kl_placement="loss")
    in_loss = make_rollout(experience, scores, config, kl_coef=0.5)
    assert_close(in_loss.advantages.sum(1), scores)
    assert in_loss.ref_logps is experience.ref_logps


@pytest.mark.parametrize("share", [True, False])
def test_forward_passes_without_gradients_have_at_most_the_tokens_of_the_recipe(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: bool
):
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, tokens_per_batch=120, prefix_sharing=share)
    prompts = ppo.prompts.tokens[:4]
    answers = [[7, 8, 9][: k % 4] + [5] * k for k in range(1, 9)]
    completions = Completions([p for p in prompts for _ in range(2)], answers, [True] * 8)
    expected = compute_experience(ppo.models, completions, batch_size=8)
    seen, logps = [], ModelView.logps

    def recorded(view: ModelView, ids: Tensor, mask: Tensor, labels: Tensor) -> Any:
        if view is ppo.models.policy:
            seen.append([row[:n] for row, n in zip(ids.tolist(), mask.sum(1), strict=True)])
        return logps(view, ids, mask, labels)

    monkeypatch.setattr(ModelView, "logps", recorded)
    actual = ppo.experience(completions)
    assert [row for batch in seen for row in batch] == completions.rows
    assert 1 < len(seen) < 8
    for batch in seen:
        prefixes = {tuple(row[: k + 1]) for row in batch for k in range(len(row))}
        tokens = len(prefixes) if share else len(batch) * max(map(len, batch))
        assert len(batch) == 1 or tokens <= 120
    for name in ("logps", "ref_logps", "entropy", "values"):
        one, other = (getattr(e, name)[e.mask] for e in (actual, expected))
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_row_13_the_kl_in_the_reward_is_unbiased(folders: Folders, tmp_path: Path):
    ppo = ppo_fixtures.build_trainer(
        folders, tmp_path, lora=True, max_new_tokens=1, temperature=1.0
    )
    ppo_fixtures.perturb(ppo.models, scale=0.2)
    ppo.models.savable.save_pretrained(str(tmp_path / "moved"), selected_adapters=["default"])
    n, prompt = 1024, ppo.prompts.tokens[0]
    policy, reference = (
        ppo_fixtures.distribution(ppo_fixtures.load_plain_policy(folder), [*prompt, 0], 1.0)[-1]
        for folder in (tmp_path / "moved", folders.world.sft)
    )
    exact = (policy.exp() * (policy - reference)).sum()
    assert exact > 0.02
    # One token each, drawn here: generate takes seconds for as many.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(policy.exp(), n, replacement=True, generator=generator).tolist()
    completions = Completions([prompt] * n, [[token] for token in tokens], [False] * n)
    experience = compute_experience(ppo.models, completions, batch_size=n)
    config = ppo_config(**OWN_REWARDS)
    rewards = make_rollout(experience, torch.zeros(n), config, kl_coef=1.0).advantages[:, -1]
    error = rewards.std() / math.sqrt(n)
    assert abs(-rewards.mean() - exact) < 3 * error
    assert error < exact / 3


@pytest.mark.parametrize(
    ("target", "horizon", "factor"),
    [
        pytest.param(1 / 2, 8, 1.2, id="kl is twice the target: 1 + 0.2 * 8 / 8"),
        pytest.param(1 / 2, 32, 1.05, id="a longer horizon: 1 + 0.2 * 8 / 32"),
        pytest.param(1 / 1.1, 8, 1.1, id="kl is 1.1 times the target: 1 + 0.1"),
        pytest.param(2.0, 8, 0.8, id="kl is half the target: 1 - 0.2"),
    ],
)
def test_row_14_the_kl_coefficient_adapts_to_the_kl_per_completion(
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: PerturbedRun,
    target: float,
    horizon: int,
    factor: float,
):
    # 0.05 nats per token: a completion's KL is 0.05 times its length, averaged over completions.
    far = dataclasses.replace(run.experience, ref_logps=run.experience.logps - 0.05)
    kl = 0.05 * sum(map(len, run.completions.completions)) / 8
    settings = {"kl_target": kl * target, "kl_horizon": horizon, "kl_coef": 0.3}
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, lora=True, max_new_tokens=40, **settings)
    ppo_fixtures.set_learning_rates_to_0(ppo)
    monkeypatch.setattr(LocalSampler, "generate", lambda *_, **__: run.completions)
    monkeypatch.setattr(trainer, "compute_experience", lambda *_, **__: far)
    coefficients = []

    def recording(*args: Any, kl_coef: float) -> Any:
        coefficients.append(kl_coef)
        return make_rollout(*args, kl_coef=kl_coef)

    monkeypatch.setattr(trainer, "make_rollout", recording)
    ppo.step(0)
    ppo.step(1)
    assert coefficients[0] == 0.3
    assert coefficients[1] == pytest.approx(0.3 * factor, rel=1e-5)
    assert ppo.metrics["kl_coef"] == coefficients[1]  # the coefficient of the step that is logged
    assert ppo.kl_coef == pytest.approx(0.3 * factor**2, rel=1e-5)


def test_row_14_without_a_target_the_kl_coefficient_is_fixed(folders: Folders, tmp_path: Path):
    ppo = ppo_fixtures.build_trainer(folders, tmp_path, kl_coef=0.3)
    ppo.step(0)
    ppo.step(1)
    assert ppo.metrics["kl"] != 0
    assert ppo.kl_coef == 0.3


# Advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_row_15_advantages_of_completions_are_the_double_sum_over_their_tokens(
    run: PerturbedRun, gamma: float, lam: float
):
    config = ppo_config(gamma=gamma, gae_lambda=lam)
    rollout = make_rollout(run.experience, run.scores, config, kl_coef=0.05)
    experience, completions = run.experience, run.completions
    kl = ppo_fixtures.columns(experience.logps - experience.ref_logps, completions)
    values = ppo_fixtures.columns(experience.values, completions)
    advantages = ppo_fixtures.columns(rollout.advantages, completions)
    returns = ppo_fixtures.columns(rollout.returns, completions)
    for i, tokens in enumerate(completions.completions):
        rewards = (-0.05 * kl[i].double()).tolist()
        rewards[-1] += run.scores[i].item()
        v = [*values[i].double().tolist(), 0.0]  # nothing follows the last token
        deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
        expected = torch.tensor(
            [
                sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(tokens)))
                for t in range(len(tokens))
            ]
        )
        assert_close(advantages[i], expected, rtol=1e-4, atol=1e-5)
        assert_close(returns[i], expected + values[i], rtol=1e-4, atol=1e-5)
    assert (rollout.advantages[~rollout.mask] == 0).all()
    assert rollout.mask.sum() == sum(map(len, completions.completions))


@pytest.mark.parametrize("kind", ["ppo", "grpo", "reinforce", "rloo"])
def test_row_15_padding_changes_no_advantage(run: PerturbedRun, kind: str):
    config = ppo_config(kind, n_completions=2, normalize_rewards=kind == "ppo")
    before, junk, wide = (
        make_rollout(experience, run.scores, config, kl_coef=0.05)
        for experience in (run.experience, run.with_junk(), run.with_padding(9))
    )
    for name in ("advantages", "mask") + (("values", "returns") if kind == "ppo" else ()):
        expected, padded = getattr(before, name), getattr(wide, name)
        assert torch.equal(getattr(junk, name)[before.mask], expected[before.mask])
        assert padded[:, -9:].count_nonzero() == 0
        close = {"rtol": 1e-4, "atol": 1e-5} if name != "mask" else {}
        assert_close(padded[:, :-9], expected, **close)


def test_row_15_no_advantage_comes_from_columns_after_the_last_token():
    # 1 + 3 - 2 = 2 and, with nothing after it, 5 - 3 = 2; gamma and lambda are 1: 2 + 2 and 2
    rewards, values = torch.tensor([[9.0, 1.0, 5.0, 7.0]]), torch.tensor([[8.0, 2.0, 3.0, 9.0]])
    mask = torch.tensor([[False, True, True, False]])
    advantages = completion_gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert_close(advantages, torch.tensor([[0.0, 4.0, 2.0, 0.0]]))


def test_row_17_whitened_rewards_have_variance_1_and_keep_their_mean(run: PerturbedRun):
    plain, scaled = (
        make_rollout(
            run.experience, run.scores, ppo_config(normalize_rewards=w, **OWN_REWARDS), kl_coef=0.05
        )
        for w in (False, True)
    )
    mask = plain.mask
    before, after = (rollout.advantages[mask].double() for rollout in (plain, scaled))
    assert abs(before.mean()) > 1e-3 and abs(before.std() - 1) > 0.1
    assert_close(after.mean(), before.mean(), rtol=0, atol=1e-6)
    assert after.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (scaled.advantages[~mask] == 0).all()


# Metrics


def test_row_27_metrics_count_only_tokens_of_completions(
    folders: Folders, tmp_path: Path, run: PerturbedRun
):
    completions = run.completions
    metrics = run.metrics(run.experience)
    run.trainer.models.savable.save_pretrained(
        str(tmp_path / "moved"), selected_adapters=["default"]
    )
    policy = ppo_fixtures.load_plain_policy(tmp_path / "moved")
    reference = ppo_fixtures.load_plain_policy(folders.world.sft)
    kl = entropy = n = 0.0
    for prompt, row in zip(completions.prompts, completions.rows, strict=True):
        ours, theirs = (ppo_fixtures.distribution(m, row, 0.7) for m in (policy, reference))
        for t in range(len(prompt) - 1, len(row) - 1):
            kl += (ours[t, row[t + 1]] - theirs[t, row[t + 1]]).item()
            entropy -= (ours[t].exp() * ours[t]).sum().item()
            n += 1
    assert metrics["tokens"] == n / 8
    assert metrics["kl"] == pytest.approx(kl / 8, abs=1e-4)
    assert metrics["kl_per_token"] == pytest.approx(kl / n, abs=1e-5)
    assert metrics["entropy"] == pytest.approx(entropy / n, rel=1e-4)
    assert metrics["entropy"] >= 0
    assert metrics["missing_eos"] == sum(not f for f in completions.finished) / 8
    assert metrics["score"] == pytest.approx(metrics["reward"] - metrics["missing_eos"], abs=1e-6)

    assert run.metrics(run.with_junk()) == pytest.approx(metrics, rel=1e-6)
    assert run.metrics(run.with_padding(17)) == pytest.approx(metrics, rel=1e-4)


# Memory


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_row_28_logits_of_all_tokens_are_never_created_at_once_and_none_are_stored(
    folders: Folders, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, LlamaConfig

    vocabulary, n_rows, length, width = 20_000, 32, 40, 8
    source = tmp_path / "wide"
    config = json.loads((folders.world.sft / "config.json").read_text())
    shape = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": 1}
    shape |= {"intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 64}
    AutoModelForCausalLM.from_config(LlamaConfig(**config | shape)).save_pretrained(source)
    tokenization.load_tokenizer(folders.world.sft).save_pretrained(source)
    models = ppo_fixtures.build_models(source, [], lora=False, share=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (n_rows, length), generator=generator).tolist()
    completions = Completions([row[:4] for row in ids], [row[4:] for row in ids], [False] * n_rows)
    inputs = ppo_fixtures.inputs_of(models, completions)
    all_logits = n_rows * (length - 4) * vocabulary  # 23 million numbers
    stored: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.numel())
        return tensor

    with small_vocabulary_tiles(), LargestTensor() as largest:
        compute_experience(models, completions, batch_size=n_rows)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            now = ppo_fixtures.evaluate(models, inputs)
        (now.logps.sum() + now.entropy.sum() + now.values.sum()).backward()
    head = models.policy.model.lm_head.weight
    assert head.grad.abs().max() > 0
    assert max(stored) == head.numel()  # the head's own weight, 160,000
    assert largest.numel <= 256 * 32_768 < all_logits / 2  # one tile of TRL's: 256 tokens on a CPU


# Advantages of groups


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_advantages_by_hand(scale: Any):
    groups = [[1.0, 2.0, 6.0], [0.0, 0.0, 0.5], [3.0, 3.0, 3.0]]
    everything = [x for group in groups for x in group]
    own = group_relative(torch.tensor(everything), n=3, scale=scale).tolist()
    expected = []
    for group in groups:
        deviation = {
            "group": statistics.stdev(group) + 1e-4,
            "batch": statistics.stdev(everything) + 1e-4,
            "none": 1.0,
        }[scale]
        expected += [(x - statistics.mean(group)) / deviation for x in group]
    assert own == pytest.approx(expected, abs=1e-6)
    assert own[6:] == [0, 0, 0]


def test_leave_one_out_is_a_multiple_of_the_group_relative_advantage():
    """By algebra: r - (sum - r) / (n - 1) = n / (n - 1) * (r - mean)."""
    returns = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centered = group_relative(returns, n=4, scale="none")
    assert_close(leave_one_out(returns, n=4), centered * 4 / 3)


def test_the_share_of_the_penalty_for_length_by_hand():
    lengths = torch.arange(0.0, 14.0)
    share = overlong_share(lengths, longest=10, buffer=4)
    assert share.tolist() == [0] * 7 + [0.25, 0.5, 0.75] + [1] * 4
