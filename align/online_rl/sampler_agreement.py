"""How far the sampler's log-probabilities are from those of the update.

An update multiplies the advantage of a token by the ratio of its probability to that at sampling.
This is exact if the sampler draws from the distribution that the update computes. A sampler that
leaves out tokens (``top_p``), has other weights or another temperature does not, and nothing else
in a run shows it. So both are compared on a few tokens before the first step, and the ratios of
policy to sampler are logged in every step, before they are cut.

Left out: the weights themselves, :func:`align.functional.policy_gradient.importance_weights`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from align.config.online_rl import OnlineRL
from align.errors import UserError
from align.functional.masked import max_over_ranks, sum_over_ranks
from align.functional.policy_gradient import importance_ratio
from align.models.decoding.prompts import MIN_ROWS
from align.online_rl.completions import IGNORED
from align.online_rl.experience import Experience, align_sampler_logps
from align.online_rl.models import OnlineRLModels
from align.online_rl.sampling import Sampler
from align.runtime.seeds import derive_seeds

N_TOKENS = 32
"""Tokens that are compared on each process, at most."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
"""Greatest mean difference of log-probabilities, in nats per token, by the type of the products.

Measured on SmolLM2-135M: rounding causes 1e-5 in float32 and 0.02 to 0.04 in bfloat16, a sampler
with ``top_p`` 0.8 causes 0.15, and one at temperature 0.7 in place of 1 causes 0.23.
"""
REPAIRS = {
    "transformers": (
        "the model computes other numbers with a cache of keys and values than without: try "
        "`prefix_sharing: false`, or use another model"
    ),
    "server": (
        "start the server with this model, with `--logprobs-mode processed_logprobs`, and without "
        "options that change probabilities"
    ),
    "colocate": "use another version of vLLM, or `vllm_mode: server`, or remove `sampler`",
}
"""By the value of ``sampler``, or of ``vllm_mode``."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Differences of log-probabilities between sampler and update, over all processes."""

    mean: float
    """Mean absolute difference, in nats per token."""
    n_tokens: int
    token: str
    """The token of this process with the largest difference."""
    sampled: float
    """Its log-probability according to the sampler."""
    trained: float
    """Its log-probability according to the update."""
    seconds: float
    """Time that the comparison took."""

    def check(self, config: OnlineRL) -> None:
        """Check that the mean difference is at most the tolerance of the recipe's data type.

        Raises:
            UserError: It is larger, or no number.
        """
        dtype = computed_type(config)
        if self.mean <= TOLERANCES[dtype]:
            return
        mode = config.vllm_mode if config.sampler == "vllm" else config.sampler
        raise UserError(
            f"sampler: sampling and training compute different probabilities: the logarithms of "
            f"{self.n_tokens} sampled tokens differ by {self.mean:.3g} on average, and rounding in "
            f"{dtype} explains at most {TOLERANCES[dtype]:g}; that of {self.token!r} is "
            f"{self.sampled:.4f} in sampling and {self.trained:.4f} in training; "
            f"{REPAIRS[mode]}"
        )

    def describe(self) -> str:
        """The result on one line."""
        return (
            f"sampling and training agree: log-probabilities of {self.n_tokens} tokens differ by "
            f"{self.mean:.1e} ({self.seconds:.1f} s)"
        )


def computed_type(config: OnlineRL) -> str:
    """The least precise type in which log-probabilities are computed on either side."""
    reduced = "bfloat16" in (config.dtype, config.mixed_precision)
    return "bfloat16" if reduced or config.sampler == "vllm" else "float32"


def compare(
    config: OnlineRL,
    models: OnlineRLModels,
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
) -> Agreement:
    """Sample a few tokens, and compute their log-probabilities as the update does."""
    started = time.monotonic()
    prompts = prompts[:MIN_ROWS]
    n_new = min(
        config.max_new_tokens, N_TOKENS // len(prompts)
    )  # longer rows may exceed the model's positions
    with torch.inference_mode(), models.mixed_precision():
        seeds = derive_seeds(seed, range(len(prompts)))
        completions = sampler.generate(prompts, seeds=seeds, max_new_tokens=n_new)
        inputs = completions.tensors(models.tokenizer.pad_token_id, models.device)
        logps, _ = models.policy.logps(inputs["ids"], inputs["mask"], inputs["labels"])
    sampled = align_sampler_logps(completions, logps)
    assert sampled is not None
    labels = inputs["labels"][:, 1:]
    mask = labels != IGNORED
    differences = (logps - sampled)[mask].abs()
    worst = int(differences.nan_to_num(math.inf).argmax())
    total = sum_over_ranks(torch.stack([differences.sum(), mask.sum()]))
    return Agreement(
        mean=float(total[0] / total[1]),
        n_tokens=int(total[1]),
        token=models.tokenizer.decode([int(labels[mask][worst])]),
        sampled=float(sampled[mask][worst]),
        trained=float(logps[mask][worst]),
        seconds=time.monotonic() - started,
    )


def ratio_metrics(experience: Experience, *, cap: float) -> dict[str, float]:
    """Metrics of the ratios policy / sampler of the tokens of all ranks, before they are cut.

    Their mean is 1 in expectation if every token that the policy may choose can be sampled; a
    sampler that leaves out tokens has the probability of those that it keeps. ``ess`` is the
    effective sample size, as a share of the number of tokens (Kong 1992), and ``above_cap`` the
    share of the tokens whose ratio exceeds ``cap``.
    """
    if experience.sampler_logps is None:
        return {}
    mask = experience.mask
    ratio = importance_ratio(experience.logps, experience.sampler_logps)[mask]
    ones = torch.ones_like(ratio)
    sums = [ones.sum(), ratio.sum(), ratio.square().sum(), (ratio > cap).float().sum()]
    n, total, squares, above = sum_over_ranks(torch.stack(sums)).tolist()
    low, high = max_over_ranks(torch.stack([-ratio.min(), ratio.max()])).tolist()
    metrics = {
        "sampler/ratio_min": -low,
        "sampler/ratio_mean": total / n,
        "sampler/ratio_max": high,
        "sampler/ess": total**2 / (n * squares),
        "sampler/above_cap": above / n,
    }
    return {} if math.isnan(total) else metrics
