"""The rows of the proof table: a stage with its settings, and the policy that theory names."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from align.config.stages import ONLINE_RL
from benchmarks.proofs import fixed_points, optima
from benchmarks.proofs.training import OFFLINE, ONLINE
from benchmarks.proofs.world import SPREADS, Example, World, random_rewards

PAIRS = 2000
"""Pairs for each prompt. With 500, the exact minimizer on the pairs is up to 0.02 nats away."""
MATCHED_PAIRS = 1000
"""Pairs for each prompt, if their sides are matched. With these, the exact maximum is up to 0.01
nats away, and with 500 up to 0.2."""
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
    matched_pairs: int | None = None
    """Pairs for each prompt, with matched sides; None for :data:`PAIRS` as they are drawn."""
    binary: bool = False
    """Whether rewards are 0 or 1, so that those of a group can be equal."""

    @property
    def is_unbiased(self) -> bool:
        """Whether the named policy is the optimum of reward and KL."""
        return self.named is best

    @property
    def fingerprint(self) -> str:
        """Digest of the training and of the theory that it is compared with.

        The training: all settings, the number of pairs and the defaults of the kind of stage. The
        theory: the named policy and the optimum of reward and KL in an example world, so that
        another formula, beta or correction in the code that computes either changes the digest.
        """
        online = self.stage in ONLINE_RL
        matched = self.matched_pairs
        pairs = {"pairs": PAIRS} if matched is None else {"matched_pairs": matched}
        training = [
            self.stage,
            self.settings,
            self.flipped,
            self.binary,
            ONLINE if online else {**OFFLINE, **pairs},
        ]
        world: World = Example(Path(), random_rewards(random.Random(0), SPREADS))
        world = world.binary() if self.binary else world
        tables = (self.named(world), optima.reward_and_kl(world, self.beta))
        # Four digits: the last ones of a minimum differ between processors.
        policies = [[[round(p, 4) for p in row] for row in t.exp().tolist()] for t in tables]
        theory = [self.beta, self.zeros, policies]
        content = json.dumps([training, theory], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


# Rows --------------------------------------------------------------------------------------------

OPTIMUM = "h = r/β"
GROUP = {"n_completions": 128}
IN_LOSS = {**GROUP, "kl_placement": "loss", "epochs": 1, "steps": 120}
SCALED = {**IN_LOSS, "kl_coef": 2.0, "steps": 200}
DIFFICULTY = "h = r/(βs), s: standard deviation of r under the policy"
BOTH = "h = (r/s − c·length)/β"
TOGETHER = "h = r/(βS), S: standard deviation of r in the batch"
PARTS = "h = (u/s + v/s′)/β for rewards u + v; s, s′: their standard deviations{}"
MIXED = "π·a·h balances (r − p)·(n − 1)/(nβ); a: share of mixed groups, given r"
FILTERED = {
    **IN_LOSS,
    "steps": 200,
    "n_completions": 4,
    "filter": "mixed_groups",
    "max_draws": 20,
}
EXCLUDING = {"learning_rate": 4e-4, "warmup_steps": 24, "num_train_epochs": 30}
"""Training of the losses that exclude completions: 240 steps, eight in an epoch.

The gradient on a completion is a multiple of its probability. The first steps carry completions
that belong to the optimum below 1e-3, because parameters are shared with those that do not. Exact
gradients bring them back; the noise of batches prevents it. That noise, summed over the steps,
grows with the learning rate and falls with the size of a batch and with matched sides.
"""
UNPAIRED = {"per_device_train_batch_size": 500, **EXCLUDING}


def best(world: World) -> Tensor:
    """The optimum of reward and KL with beta = 1."""
    return optima.reward_and_kl(world, 1.0)


def fixed_point(
    *, beta: float, scale: fixed_points.Scale, per_sequence: bool
) -> Callable[[World], Tensor]:
    """The fixed point of a group-relative method."""
    return lambda world: fixed_points.group_relative(
        world, beta, scale=scale, per_sequence=per_sequence
    )[0]


def mean_over_tokens(name: str, **settings: Any) -> Method:
    """GRPO with two epochs and a mean over all tokens: the settings decide where a ratio ends."""
    return Method(
        name=name,
        stage="grpo",
        settings={**SCALED, "aggregate": "token", **settings, "epochs": 2, "steps": 160},
        named=fixed_point(beta=2.0, scale="group", per_sequence=False),
        formula=DIFFICULTY,
        beta=2.0,
    )


def two_rewards(name: str, scale: fixed_points.Scale, where: str) -> Method:
    """RLOO with two rewards, each normalized before they are added."""
    return Method(
        name=name,
        stage="rloo",
        settings={
            **GROUP,
            "kl_coef": 2.0,
            "rewards": ["first", "rest"],
            "normalize_scores": scale,
        },
        named=lambda world: fixed_points.normalized_rewards(world, 2.0, scale=scale),
        formula=PARTS.format(where),
        beta=2.0,
    )


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
    matched_pairs: int | None = None,
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
        matched_pairs=matched_pairs,
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
    dpo(
        "apo_zero",
        optima.water_filling,
        WATER,
        zeros=True,
        matched_pairs=MATCHED_PAIRS,
        per_device_train_batch_size=250,
        **EXCLUDING,
    ),
    Method(
        name="KTO stage, `kto`",
        stage="kto",
        settings={"beta": 1.0, "trainer": UNPAIRED},
        named=optima.water_filling,
        formula=WATER,
        zeros=True,
        matched_pairs=MATCHED_PAIRS,
    ),
    Method(
        name="KTO stage, `apo_zero_unpaired`",
        stage="kto",
        settings={"beta": 1.0, "trainer": {"loss_type": "apo_zero_unpaired", **UNPAIRED}},
        named=optima.water_filling,
        formula=WATER,
        zeros=True,
        matched_pairs=MATCHED_PAIRS,
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
        name="GRPO, KL in the reward, `filter: mixed_groups`",
        stage="grpo",
        settings={**FILTERED, "scale_advantages": "none", "kl_placement": "reward"},
        named=best,
        formula=OPTIMUM,
        binary=True,
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
        named=lambda world: fixed_points.token_credit(world, 1.0),
        formula="last token as h = r/β; first token by mean rewards",
    ),
    Method(
        name="GRPO without deviation",
        stage="grpo",
        settings={**IN_LOSS, "scale_advantages": "none"},
        named=fixed_point(beta=1.0, scale="none", per_sequence=True),
        formula="h = (r − c·length)/β",
    ),
    Method(
        name="GRPO",
        stage="grpo",
        settings=SCALED,
        named=fixed_point(beta=2.0, scale="group", per_sequence=True),
        formula=BOTH,
        beta=2.0,
    ),
    Method(
        name="GRPO, `scale_advantages: batch`",
        stage="grpo",
        settings={**SCALED, "scale_advantages": "batch", "aggregate": "constant"},
        named=fixed_point(beta=2.0, scale="batch", per_sequence=False),
        formula=TOGETHER,
        beta=2.0,
    ),
    Method(
        name="GRPO, `filter: mixed_groups`",
        stage="grpo",
        settings={**FILTERED, "scale_advantages": "none", "aggregate": "constant"},
        named=lambda world: fixed_points.mixed_groups(world, 1.0, n=4),
        formula=MIXED,
        binary=True,
    ),
    two_rewards("RLOO, `normalize_scores: group`", "group", ""),
    two_rewards("RLOO, `normalize_scores: batch`", "batch", " in the batch"),
    mean_over_tokens("DAPO", clip_high=0.28),
    Method(
        name="GSPO",
        stage="grpo",
        settings={**SCALED, "ratio": "sequence", "epochs": 2, "steps": 80},
        named=fixed_point(beta=2.0, scale="group", per_sequence=True),
        formula=BOTH,
        beta=2.0,
    ),
    mean_over_tokens("CISPO", loss="cispo"),
    mean_over_tokens("SAPO", loss="sapo"),
    mean_over_tokens("VESPO", loss="vespo"),
)
WITHOUT_POLICY = {
    ("sft", "chunked_nll"): "the loss `nll`, computed in parts",
    ("sft", "dft"): "names the most frequent token after each prefix, with probability 1",
    ("dpo", "apo_down"): "no minimum: the loss falls as the chosen completions become less likely",
    ("dpo", "aot"): "constrains the sorted differences of a batch, not single completions",
    (
        "dpo",
        "aot_unpaired",
    ): "no minimum: the loss falls as preferred completions rise without bound",
}
"""Stages and losses of TRL that have no row, with the reason."""
