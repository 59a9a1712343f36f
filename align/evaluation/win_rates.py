"""Held-out win rates: sample completions, score them, compare policies with a baseline.

Every policy is sampled from its own random stream. From equal random states the completions of two
policies are coupled: both follow the same draws, and the better policy wins more often than with
independent samples, which is what a win rate means.

The judge scores one completion at a time. Every evaluation includes a control, the baseline against
itself in another stream, whose interval must contain one half. Left out: judges that compare two
completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from align.config.evaluate import Evaluate
from align.evaluation.intervals import Bootstrap
from align.evaluation.results import Comparison, PerSide
from align.evaluation.scores import win_rate
from align.functional import winrate
from align.judges.scores import Judge, score_rows
from align.models import generation, tokenization
from align.models.generation import Completion
from align.models.policy import Policy
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from align.data.rows import Row

COMPARISONS = "comparisons.parquet"


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of one policy for the held-out prompts, with their scores."""

    completions: list[list[Completion]]
    """The completions of each prompt."""
    scores: Float[Tensor, "prompts completions"]

    @property
    def lengths(self) -> Float[Tensor, "prompts completions"]:
        """Lengths in tokens, without the stop token."""
        lengths = [[c.n_tokens for c in row] for row in self.completions]
        return torch.tensor(lengths, dtype=torch.float64)

    @property
    def finished(self) -> float:
        """Share of the completions that end in a stop token."""
        finished = [c.finished for row in self.completions for c in row]
        return sum(finished) / len(finished)


def control_name(config: Evaluate) -> str:
    """Name of the control: the baseline, sampled from another random stream."""
    return f"{config.baseline} again"


def compared_names(config: Evaluate) -> list[str]:
    """Names of the policies that are compared with the baseline, the control last."""
    policies = [name for name in config.policies if name != config.baseline]
    return [*policies, control_name(config)]


def stream_seed(config: Evaluate, name: str) -> int:
    """Seed of the random stream that the policy called ``name`` is sampled from.

    It depends on the recipe's seed and on the place of the policy in the recipe. Each batch of
    prompts has its own seed, derived from this one.
    """
    places = {control_name(config): "control", config.baseline: "baseline"}
    place = places[name] if name in places else config.policies.index(name)
    return derive_seed(config.seed, "evaluate", place) % 2**32


def sample_policy(
    name: str,
    policy: Policy,
    prompts: Sequence[Row],
    judge: Judge,
    config: Evaluate,
    logger: Logger,
) -> dict[str, Samples]:
    """Samples of the policy called ``name``; for the baseline, those of the control as well.

    The ranks share the work. The completions depend on the seed, not on the number of ranks.
    """
    names = [name, control_name(config)] if name == config.baseline else [name]
    samples = {}
    for sampled_name in names:
        completions = generation.sample(
            policy.model,
            policy.tokenizer,
            [row["prompt"] for row in prompts],
            n_completions=config.n_completions,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            seed=stream_seed(config, sampled_name),
            map_batches=partial(
                distributed.map_rows,
                progress=partial(logger.step, unit=f"{sampled_name}: sampled batch"),
            ),
        )
        rows = [
            {"prompt": row["prompt"], "completion": tokenization.assistant_turn(completion.text)}
            for row, sampled in zip(prompts, completions, strict=True)
            for completion in sampled
        ]
        scores = score_rows(judge, rows, batch_size=config.batch_size, logger=logger)
        by_prompt = torch.tensor(scores, dtype=torch.float64).view(len(prompts), -1)
        samples[sampled_name] = Samples(completions, by_prompt)
    return samples


def compare_all(config: Evaluate, samples: Mapping[str, Samples]) -> tuple[Comparison, ...]:
    """Compare every policy, and the control last, with the baseline."""
    return tuple(compare(config, name, samples) for name in compared_names(config))


def compare(config: Evaluate, policy: str, samples: Mapping[str, Samples]) -> Comparison:
    """Compare completion k of the policy with completion k of the baseline, for each prompt.

    ``consistency`` and ``invalid`` describe judges that read two completions. For a judge that
    scores one completion at a time, they are None and 0.
    """
    own, baseline = samples[policy], samples[config.baseline]
    result = win_rate(
        own.scores,
        baseline.scores,
        lengths=own.lengths,
        baseline_lengths=baseline.lengths,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )
    ties = winrate.outcomes(own.scores, baseline.scores) == 0.5
    differences = (own.scores - baseline.scores).mean(dim=1)
    bootstrap = Bootstrap(config.confidence, config.resamples, config.seed)
    return Comparison(
        policy=policy,
        baseline=config.baseline,
        judge=str(config.judge),
        win_rate=result.rate,
        ci=result.interval,
        ties=ties.double().mean().item(),
        n_prompts=result.n_prompts,
        n_completions=ties.shape[1],
        length_controlled_win_rate=result.length_controlled,
        p_value=result.p_value,
        mean_tokens=PerSide(own.lengths.mean().item(), baseline.lengths.mean().item()),
        mean_score=PerSide(own.scores.mean().item(), baseline.scores.mean().item()),
        score_difference=differences.mean().item(),
        score_difference_ci=bootstrap.mean(differences),
        finished=PerSide(own.finished, baseline.finished),
        consistency=None,
        invalid=0,
    )


def write_comparisons(
    output_dir: Path, config: Evaluate, prompts: Sequence[Row], samples: Mapping[str, Samples]
) -> None:
    """Write every compared pair of completions, with scores and lengths, to a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    baseline = samples[config.baseline]
    rows = []
    for policy in compared_names(config):
        own = samples[policy]
        for i, prompt in enumerate(prompts):
            sides = zip(own.completions[i], baseline.completions[i], strict=True)
            for k, (completion, baseline_completion) in enumerate(sides):
                rows.append(
                    {
                        "prompt": prompt["prompt"][-1]["content"],
                        "policy": policy,
                        "baseline": config.baseline,
                        "policy_completion": completion.text,
                        "baseline_completion": baseline_completion.text,
                        "policy_score": own.scores[i, k].item(),
                        "baseline_score": baseline.scores[i, k].item(),
                        "policy_tokens": completion.n_tokens,
                        "baseline_tokens": baseline_completion.n_tokens,
                    }
                )
    pq.write_table(pa.Table.from_pylist(rows), output_dir / COMPARISONS)
