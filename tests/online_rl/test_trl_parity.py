"""Advantages, loss and gradient equal those of TRL's ``GRPOTrainer`` on the same batch.

TRL's own trainer samples the completions, scores them and computes the loss. Old and reference
log-probabilities are moved away from those of the policy, so that ratios are clipped and the KL
term has a gradient. In float64 both sides agree to rounding; the tests ask for 1e-6.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch import Tensor
from torch.testing import assert_close

from align.config.stages import STAGES
from align.functional.token_rewards import group_relative
from align.online_rl.optimization import build_objective
from align.rl.rollout import Rollout
from align.rl.update import Evaluated, update

pytestmark = pytest.mark.slow
N, GROUPS, LONGEST, BETA = 4, 3, 12, 0.3
CLIP = {"clip": 0.2, "clip_high": 0.28}
UNCLIPPED: dict[str, Any] = {"clip": None, "clip_high": None}
# TRL's settings → the recipe's
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregate": "constant"}),
    "dapo": ({"loss_type": "dapo"}, {"aggregate": "token"}),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregate": "token"}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.28},
        {"loss": "cispo", "aggregate": "token", "clip": None},
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"ratio": "sequence"},
    ),
    "two-sided": ({"loss_type": "grpo", "delta": 1.5}, {"dual_clip": 1.5}),
    "sapo": ({"loss_type": "sapo"}, UNCLIPPED | {"loss": "sapo"}),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"ratio": "sequence", "aggregate": "constant"},
    ),
    "vespo": ({"loss_type": "vespo"}, UNCLIPPED | {"loss": "vespo", "aggregate": "token"}),
}
FACTORS = {"luspo": LONGEST}
"""TRL's losses in multiples of the recipe's; its LUSPO is not divided by ``max_new_tokens``."""


class Batch:
    """What TRL's trainer made of one batch, and the trainer itself."""

    def __init__(self, trainer: Any, rewards: Tensor, scales: dict[str, dict[str, Any]]) -> None:
        self.trainer, self.rewards, self.scales = trainer, rewards, scales
        self.tensors = scales["group"]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    world = tiny_models.world(tmp_path_factory.getbasetemp())
    model: Any = AutoModelForCausalLM.from_pretrained(world.sft, dtype=torch.float64)
    tokenizer: Any = AutoTokenizer.from_pretrained(world.sft)
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(N * GROUPS, generator=draw)

    def score(completions: list[Any], **_: Any) -> list[float]:
        scores: list[float] = rewards[: len(completions)].tolist()
        return scores

    rows = tiny_models.rows(world.data, "prompts-train")[:GROUPS]
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=score,  # type: ignore[arg-type]
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=N * GROUPS,
            num_generations=N,
            max_completion_length=LONGEST,
            num_iterations=2,
            beta=BETA,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    examples = [{"prompt": row["prompt"]} for row in rows for _ in range(N)]
    scales = {}
    for scale in ("group", "batch", "none"):
        trainer.scale_rewards = scale
        torch.manual_seed(0)
        scales[scale] = trainer._generate_and_score_completions(copy.deepcopy(examples))
    made = Batch(trainer, rewards, scales)
    tensors = made.tensors
    policy = logps_of(trainer.model, tensors).detach()
    mask = tensors["completion_mask"].bool()
    assert len(set(mask.sum(1).tolist())) > 1  # otherwise all aggregations would be the same

    def moved(scale: float) -> Tensor:
        noise = torch.randn(policy.shape, generator=draw, dtype=policy.dtype)
        return policy + scale * noise

    tensors["old_per_token_logps"] = moved(0.4)
    tensors["ref_per_token_logps"] = moved(0.7)
    return made


def logps_of(model: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the completions, by a plain forward pass."""
    ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
    attended = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1)
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attended, position_ids=positions).logits
    length = tensors["completion_ids"].shape[1]
    logps = logits[:, -length - 1 : -1].log_softmax(-1)
    return logps.gather(-1, tensors["completion_ids"][..., None])[..., 0]


def flat_gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_trl(batch: Batch, settings: dict[str, Any], *, kl: bool) -> tuple[float, Tensor]:
    """TRL's loss on the batch, and its gradient."""
    trainer = batch.trainer
    trainer.loss_type = settings["loss_type"]
    trainer.importance_sampling_level = settings.get("importance_sampling_level", "token")
    trainer.args.delta = settings.get("delta")
    trainer.epsilon_low, trainer.epsilon_high = CLIP["clip"], CLIP["clip_high"]
    trainer.epsilon_high = settings.get("epsilon_high", trainer.epsilon_high)
    trainer.beta = BETA if kl else 0.0
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch.tensors)
    loss.backward()
    return float(loss.detach()), flat_gradient(trainer.model)


def by_align(
    batch: Batch,
    settings: dict[str, Any],
    advantages: Tensor,
    *,
    kl: bool,
    weights: Tensor | None = None,
) -> tuple[float, Tensor]:
    """The loss of an update with these settings of a recipe, and its gradient."""
    keys = {
        "model": "m",
        "rewards": ["r"],
        "steps": 1,
        "batch_size": N * GROUPS,
        "n_completions": N,
        "max_new_tokens": LONGEST,
        "kl_placement": "token_loss",
        "epochs": 1,
        **CLIP,
        **settings,
    }
    config: Any = STAGES["grpo"].model_validate({k: v for k, v in keys.items() if v is not None})
    model = batch.trainer.model
    tensors = batch.tensors
    mask = tensors["completion_mask"].bool()
    rows = len(mask)
    rollout = Rollout(
        {"row": torch.arange(rows)},
        logps=tensors["old_per_token_logps"],
        advantages=advantages.double()[:, None].expand(mask.shape),
        mask=mask,
        weights=weights,
        ref_logps=tensors["ref_per_token_logps"] if kl else None,
    )

    def evaluate(inputs: dict[str, Tensor]) -> Evaluated:
        part = {
            k: v[inputs["row"]]
            for k, v in tensors.items()
            if k.startswith(("prompt_", "completion_"))
        }
        return Evaluated(logps_of(model, part))

    gradients: list[Tensor] = []

    def record(parameters: list[Tensor], max_norm: float) -> Tensor:
        gradients.append(flat_gradient(model))
        return gradients[-1].norm()

    diagnostics = update(
        evaluate,
        rollout,
        build_objective(config, rows, kl_coef=BETA),
        torch.optim.SGD(model.parameters(), lr=0.0),
        generator=torch.Generator().manual_seed(0),
        clip_gradients=record,
    )
    (gradient,) = gradients
    return diagnostics.policy_loss, gradient


@pytest.mark.parametrize("kl", [False, True], ids=["without KL", "with KL"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_trl(batch: Batch, method: str, kl: bool):
    theirs, ours = METHODS[method]
    loss, gradient = by_trl(batch, theirs, kl=kl)
    advantages = batch.tensors["advantages"]
    own_loss, own_gradient = by_align(batch, ours, advantages, kl=kl)
    factor = FACTORS.get(method, 1)
    loss, gradient = loss / factor, gradient / factor
    assert own_loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
    assert gradient.abs().max() > 1e-3
    assert_close(own_gradient, gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


def test_the_methods_have_every_loss_type_that_trl_documents():
    from trl import GRPOConfig

    text = inspect.getdoc(GRPOConfig) or ""
    (entry,) = re.findall(r"^ *loss_type \(.*?(?=^ *\w+ \()", text, re.MULTILINE | re.DOTALL)
    documented = re.findall(r'^ *- `"(\w+)"`', entry, re.MULTILINE)
    assert len(documented) == len(set(documented)) >= 8
    assert {theirs["loss_type"] for theirs, _ in METHODS.values()} == set(documented)


def test_vespo_with_another_sampler_is_that_of_trl(batch: Batch):
    """Its weights are part of the weight of the completion."""
    theirs, ours = METHODS["vespo"]
    mask = batch.tensors["completion_mask"].bool()
    draw = torch.Generator().manual_seed(3)
    weights = (0.3 * torch.randn(mask.shape, generator=draw, dtype=torch.float64)).exp()
    weights = weights.clamp(max=2.0).masked_fill(~mask, 1)  # TRL adds up padding too
    advantages = batch.tensors["advantages"]
    plain, _ = by_trl(batch, theirs, kl=False)
    batch.tensors["importance_sampling_ratio"] = weights
    try:
        loss, gradient = by_trl(batch, theirs, kl=False)
    finally:
        del batch.tensors["importance_sampling_ratio"]
    own_loss, own_gradient = by_align(batch, ours, advantages, kl=False, weights=weights)
    assert abs(loss - plain) > 1e-2
    assert own_loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
    assert_close(own_gradient, gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(batch: Batch, scale: Any):
    own = group_relative(batch.rewards, n=N, scale=scale)
    assert_close(own, batch.scales[scale]["advantages"], rtol=0, atol=1e-6)
    for other in {"group", "batch", "none"} - {scale}:
        assert not torch.allclose(own, batch.scales[other]["advantages"], atol=1e-2)


def test_the_batch_clips_ratios_on_both_sides(batch: Batch):
    """Otherwise the comparison would not see the clipping."""
    tensors = batch.tensors
    mask = tensors["completion_mask"].bool()
    with torch.no_grad():
        difference = logps_of(batch.trainer.model, tensors) - tensors["old_per_token_logps"]
    signs = tensors["advantages"].sign()[:, None].expand(mask.shape)
    for sign, outside in ((1, difference > math.log(1.28)), (-1, difference < math.log(0.8))):
        assert (outside & mask & (signs == sign)).sum() > 3
    assert (difference[mask] > math.log(1.5)).any()


def test_the_batch_reaches_the_soft_bounds_on_both_sides(batch: Batch):
    """Ratios at which SAPO's gradient has faded, and products far from VESPO's weight of 1."""
    tensors = batch.tensors
    mask = tensors["completion_mask"].bool()
    with torch.no_grad():
        difference = logps_of(batch.trainer.model, tensors) - tensors["old_per_token_logps"]
    difference = difference.masked_fill(~mask, 0)
    signs = tensors["advantages"].sign()
    by_token = signs[:, None].expand(mask.shape)
    kept = 1 / ((difference.exp() - 1) / 2).cosh() ** 2
    for sign in (1, -1):
        for side in (1, -1):
            outside = (kept < 0.97) & (difference.sign() == side) & (by_token == sign)
            assert (outside & mask).sum() > 3
    product = difference.sum(1).exp()
    for sign, power, decay in ((1, 2, 3), (-1, 3, 2)):
        weights = (product**power * (decay * (1 - product)).exp())[signs == sign]
        assert (weights < 0.5).any()
        assert weights.max() > 0.1
        assert weights.max() > 3 * weights.min()
