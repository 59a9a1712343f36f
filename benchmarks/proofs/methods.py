"""The rows of the proof table: a stage with its settings, and the policy that theory names."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from align.config.stages import ONLINE_RL
from benchmarks.proofs import optima
from benchmarks.proofs.training import (
    OFFLINE,
    ONLINE,
    reward_scores,
    train_offline,
    train_online,
)
from benchmarks.proofs.world import (
    EOS,
    PAD,
    World,
    distribution,
    kl,
    make_world,
    write_demonstrations,
    write_pairs,
)

PAIRS = 2000
"""Pairs for each prompt. With 500, the exact minimizer on the pairs is up to 0.02 nats away."""
BOUND = 0.02
"""Largest KL divergence, in nats per completion, from the named policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A training method, and what theory says about it."""

    name: str
    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the stage; ``trainer`` has fields of TRL."""
    named: Callable[[World], Tensor]
    """The policy that theory names, as log-probabilities."""
    formula: str
    """The same in symbols: ``h`` is the log-ratio to the reference."""
    beta: float = 1.0
    """Strength of the KL penalty in the optimum of reward and KL that the row is compared with."""
    flipped: float = 0.0
    """Share of the labels that are reversed."""
    zeros: bool = False
    """Whether the named policy excludes completions; their probability is measured instead."""

    @property
    def is_unbiased(self) -> bool:
        """Whether the named policy is the optimum of reward and KL."""
        return self.named is best

    @property
    def fingerprint(self) -> str:
        """Digest of the settings, the number of pairs and the defaults of its kind of stage."""
        online = self.stage in ONLINE_RL
        shared = ONLINE if online else {**OFFLINE, "pairs": PAIRS}
        return hashlib.sha256(
            json.dumps([self.stage, self.settings, self.flipped, shared], sort_keys=True).encode()
        ).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run reached; divergences in nats per completion."""

    method: str
    seed: int
    start: float
    """From the reference to the named policy; or the probability that the latter excludes."""
    reached: float
    """The same from the trained policy."""
    bias: float
    """From the named policy to the optimum of reward and KL."""
    measured_bias: float
    """From the trained policy to that optimum."""
    moved: float
    """From the trained policy to the reference."""
    reference_point: float | None = None
    """The reference point that the loss of KTO used at the end; None for other methods."""
    seconds: float = 0.0
    """Processor time of the training."""
    fingerprint: str = ""
    """Digest of the settings of the method."""


def run_by_name(name: str, seed: int) -> Run:
    """Train the method of a name in a temporary folder, as a task of a pool of processes."""
    import torch

    torch.set_num_threads(1)
    method = next(method for method in METHODS if method.name == name)
    with tempfile.TemporaryDirectory() as folder:
        return run(method, seed, Path(folder))


def run(method: Method, seed: int, folder: Path) -> Run:
    """Train a method in the world of a seed, below ``folder``."""
    # A reward model needs a pad token other than eos.
    world = make_world(folder, seed, pad=PAD if method.stage == "reward" else EOS)
    started = time.process_time()
    policy, reference_point = train(method, world, seed)
    seconds = time.process_time() - started
    named, best = method.named(world), optima.reward_and_kl(world, method.beta)
    reference = world.reference

    def distance(policy: Tensor) -> float:
        return excluded(policy, named) if method.zeros else kl(policy, named)

    return Run(
        method.name,
        seed,
        start=distance(reference),
        reached=distance(policy),
        bias=kl(named, best),
        measured_bias=kl(policy, best),
        moved=kl(policy, reference),
        reference_point=reference_point,
        seconds=seconds,
        fingerprint=method.fingerprint,
    )


def excluded(policy: Tensor, named: Tensor) -> float:
    """Probability of the completions that the named policy excludes, averaged over the prompts."""
    return (policy.exp() * (named.exp() == 0)).sum(1).mean().item()


def train(method: Method, world: World, seed: int) -> tuple[Tensor, float | None]:
    """The policy that a method reaches, and the last reference point of KTO."""
    if method.stage in ONLINE_RL:
        return train_online(method.stage, world, seed, method.settings), None
    settings = {k: v for k, v in method.settings.items() if k != "trainer"}
    if method.stage == "sft":
        write_demonstrations(world, optima.reward_and_kl(world, method.beta).exp(), 1000, seed)
    else:
        write_pairs(world, PAIRS, seed, flipped=method.flipped)
    folder, _ = train_offline(
        method.stage, world, seed, settings, method.settings.get("trainer", {})
    )
    if method.stage == "reward":
        return optima.tilted(world.reference, reward_scores(folder) / method.beta), None
    return distribution(folder), last_reference_point(folder) if method.stage == "kto" else None


def last_reference_point(folder: Path) -> float | None:
    """The last value of ``kl`` in the log of a stage."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line).get("kl") for line in lines]
    return next((value for value in reversed(values) if value is not None), None)


# Rows --------------------------------------------------------------------------------------------

OPTIMUM = "h = r/β"
GROUP = {"n_completions": 128}
IN_LOSS = {**GROUP, "kl_placement": "loss", "epochs": 1, "steps": 120}
SCALED = {**IN_LOSS, "kl_coef": 2.0, "steps": 200}
DIFFICULTY = "h = r/(βs), s: standard deviation of r under the policy"
BOTH = "h = (r/s − c·length)/β"


def best(world: World) -> Tensor:
    """The optimum of reward and KL with beta = 1."""
    return optima.reward_and_kl(world, 1.0)


def fixed_point(*, beta: float, scaled: bool, per_sequence: bool) -> Callable[[World], Tensor]:
    """The fixed point of a group-relative method."""
    return lambda world: optima.group_relative(
        world, beta, scaled=scaled, per_sequence=per_sequence
    )[0]


def minimizer(loss: str, beta: float, *, starts: int = 1) -> Callable[[World], Tensor]:
    """The minimizer of the expected loss over tables."""
    return lambda world: optima.minimizer(world, loss, beta, starts=starts)


def ipo(world: World) -> Tensor:
    """IPO with mean log-ratios per token and beta = 0.4."""
    return optima.length_scaled(world, (optima.win_probabilities(world) - 0.5) / 0.4)


def dpo(
    loss: str,
    named: Callable[[World], Tensor],
    formula: str,
    *,
    beta: float = 1.0,
    flipped: float = 0.0,
    zeros: bool = False,
    **trainer: Any,
) -> Method:
    """A loss of the stage ``dpo``."""
    return Method(
        name=f"DPO stage, `{loss}`",
        stage="dpo",
        settings={"beta": beta, "trainer": {"loss_type": [loss], **trainer}},
        named=named,
        formula=formula,
        beta=beta,
        flipped=flipped,
        zeros=zeros,
    )


TABLE = "minimizer of the expected loss over all tables"
WATER = "0 where w < 1/2; else π = ref·(√((2w−1)/λ) − 1)₊"

METHODS: tuple[Method, ...] = (
    Method(name="SFT", stage="sft", named=best, formula="the distribution of the data"),
    Method(name="Reward model", stage="reward", named=best, formula=OPTIMUM),
    dpo("sigmoid", best, OPTIMUM, num_train_epochs=12),
    dpo("robust", best, OPTIMUM, flipped=0.05, label_smoothing=0.05, num_train_epochs=12),
    dpo("ipo", ipo, "h = length·((w − 1/2)/β + a)", beta=0.4),
    dpo(
        "sigmoid_norm",
        lambda world: optima.length_scaled(world, world.rewards / 2),
        "h = length·(r/β + a)",
        beta=2.0,
        num_train_epochs=12,
    ),
    dpo("nca_pair", optima.best_of_two, "π = ref·2w: the best of two"),
    dpo("sft", optima.best_of_two, "π = ref·2w: the best of two"),
    dpo("exo_pair", minimizer("exo_pair", 1.0), TABLE, label_smoothing=optima.SMOOTHING),
    dpo("bco_pair", minimizer("bco_pair", 1.0), TABLE),
    dpo("sppo_hard", minimizer("sppo_hard", 0.5), TABLE, beta=0.5),
    dpo("hinge", minimizer("hinge", 1.0), TABLE),
    dpo("discopop", minimizer("discopop", 1.0, starts=20), f"{TABLE}, the lowest of 20"),
    dpo("apo_zero", optima.water_filling, WATER, zeros=True),
    Method(
        name="KTO stage, `kto`",
        stage="kto",
        settings={"beta": 1.0},
        named=optima.water_filling,
        formula=WATER,
        zeros=True,
    ),
    Method(
        name="KTO stage, `apo_zero_unpaired`",
        stage="kto",
        settings={"beta": 1.0, "trainer": {"loss_type": "apo_zero_unpaired"}},
        named=optima.water_filling,
        formula=WATER,
        zeros=True,
    ),
    Method(
        name="PPO",
        stage="ppo",
        settings={
            "critic_learning_rate": 1e-2,
            "value_clip": None,
            "value_coef": 0.5,
            "normalize_advantages": False,
        },
        named=best,
        formula=OPTIMUM,
    ),
    Method(name="RLOO", stage="rloo", settings=GROUP, named=best, formula=OPTIMUM),
    Method(
        name="RLOO, KL in the loss", stage="rloo", settings=IN_LOSS, named=best, formula=OPTIMUM
    ),
    Method(
        name="REINFORCE",
        stage="reinforce",
        settings={"epochs": 1, "steps": 150, "normalize_advantages": True},
        named=best,
        formula=OPTIMUM,
    ),
    Method(
        name="GRPO, KL in the reward",
        stage="grpo",
        settings={**GROUP, "kl_placement": "reward"},
        named=best,
        formula=OPTIMUM,
    ),
    Method(
        name="Dr. GRPO",
        stage="grpo",
        settings={**IN_LOSS, "scale_advantages": "none", "aggregate": "constant"},
        named=best,
        formula=OPTIMUM,
    ),
    Method(
        name="Dr. GRPO, `token_loss`",
        stage="grpo",
        settings={
            **IN_LOSS,
            "scale_advantages": "none",
            "aggregate": "constant",
            "kl_placement": "token_loss",
        },
        named=lambda world: optima.token_credit(world, 1.0),
        formula="last token as h = r/β; first token by mean rewards",
    ),
    Method(
        name="GRPO without deviation",
        stage="grpo",
        settings={**IN_LOSS, "scale_advantages": "none"},
        named=fixed_point(beta=1.0, scaled=False, per_sequence=True),
        formula="h = (r − c·length)/β",
    ),
    Method(
        name="GRPO",
        stage="grpo",
        settings=SCALED,
        named=fixed_point(beta=2.0, scaled=True, per_sequence=True),
        formula=BOTH,
        beta=2.0,
    ),
    Method(
        name="DAPO",
        stage="grpo",
        settings={**SCALED, "aggregate": "token", "clip_high": 0.28, "epochs": 2, "steps": 160},
        named=fixed_point(beta=2.0, scaled=True, per_sequence=False),
        formula=DIFFICULTY,
        beta=2.0,
    ),
    Method(
        name="GSPO",
        stage="grpo",
        settings={**SCALED, "ratio": "sequence", "epochs": 2, "steps": 80},
        named=fixed_point(beta=2.0, scaled=True, per_sequence=True),
        formula=BOTH,
        beta=2.0,
    ),
    Method(
        name="CISPO",
        stage="grpo",
        settings={**SCALED, "aggregate": "token", "loss": "cispo", "epochs": 2, "steps": 160},
        named=fixed_point(beta=2.0, scaled=True, per_sequence=False),
        formula=DIFFICULTY,
        beta=2.0,
    ),
)
WITHOUT_POLICY = {
    "apo_down": "no minimum: the loss falls as the chosen completions become less likely",
    "aot": "constrains the sorted differences of a batch, not single completions",
    "aot_unpaired": "no minimum: the loss falls as preferred completions rise without bound",
}
"""Losses of the stage ``dpo`` that name no policy, with the reason."""
