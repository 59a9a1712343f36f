"""Runs of the methods: training, and what the trained policy is compared with."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from align.config.stages import ONLINE_RL
from benchmarks.proofs import optima
from benchmarks.proofs.methods import METHODS, PAIRS, Method
from benchmarks.proofs.training import reward_scores, train_offline, train_online
from benchmarks.proofs.world import (
    EOS,
    PAD,
    World,
    distribution,
    kl,
    make_world,
    write_demonstrations,
    write_matched_pairs,
    write_pairs,
)


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
    from_named: float | None = None
    """From the named policy to the trained one, where the former excludes completions: KL(named,
    trained), which is finite; None for other methods, and for stored runs without it."""
    seconds: float = 0.0
    """Processor time of the training."""
    fingerprint: str = ""
    """Digest of the method's settings and theory."""


def run_by_name(name: str, seed: int) -> Run:
    """Train the method of a name in a temporary folder, as a task of a pool of processes."""
    torch.set_num_threads(1)
    method = next(method for method in METHODS if method.name == name)
    with tempfile.TemporaryDirectory() as folder:
        return run(method, seed, Path(folder))


def run(method: Method, seed: int, folder: Path) -> Run:
    """Train a method in the world of a seed, below ``folder``."""
    # A reward model needs a pad token other than eos.
    world = make_world(folder, seed, pad=PAD if method.stage == "reward" else EOS)
    world = world.binary() if method.binary else world
    started = time.process_time()
    policy, reference_point = train(method, world, seed)
    seconds = time.process_time() - started
    return compare(method, seed, world, policy, reference_point, seconds)


def compare(
    method: Method,
    seed: int,
    world: World,
    policy: Tensor,
    reference_point: float | None = None,
    seconds: float = 0.0,
) -> Run:
    """Compare the policy that a method reached with those that theory names."""
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
        from_named=kl(named, policy) if method.zeros else None,
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
    elif method.matched_pairs is not None:
        write_matched_pairs(world, method.matched_pairs, seed)
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
