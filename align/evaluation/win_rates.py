"""evaluation.win_rates"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from align.config.evaluate import Evaluate
from align.evaluation.intervals import interval
from align.functional import winrate
from align.judges.scores import build_judge
from align.models import generation, loading, tokenization
from align.models.generation import Completion
from align.runtime import distributed
from align.runtime.progress import Logger

if TYPE_CHECKING:
    from align.evaluation.held_out import Row

Samples = list[list[Completion]]  # by prompt, then by completion


# Win rates -----------------------------------------------------------------------------------------------------------


def win_rates(
    config: Evaluate,
    rows: Sequence[Row],
    targets: Mapping[str, Path | str],
    folder: Path,
    logger: Logger,
) -> dict[str, Any]:
    prompts = [row["prompt"] for row in rows]
    texts = [prompt[-1]["content"] for prompt in prompts]
    judge = build_judge(str(config.judge), None, dtype=config.dtype, batch_size=config.batch_size)
    judge.check_prompts(prompts, repair="set `implicit_rewards: true` and no `judge`")
    again = f"{config.baseline} again"  # the control: the same policy, other seeds
    seeds = dict.fromkeys(targets, config.seed) | {again: config.seed + 1}
    samples: dict[str, Samples] = {}
    scores: dict[str, torch.Tensor] = {}
    for done, (name, seed) in enumerate(seeds.items()):
        target = targets[config.baseline if name == again else name]
        samples[name] = _sample(config, target, prompts, seed, logger, (done, len(seeds)))
        flat_scores = judge.score(
            [prompt for prompt in prompts for _ in range(config.n_completions)],
            [tokenization.assistant_turn(c.text) for row in samples[name] for c in row],
        )
        scores[name] = torch.tensor(flat_scores, dtype=torch.float64).view(len(prompts), -1)
    compared = [name for name in config.policies if name != config.baseline]
    comparisons = [
        _compare(config, name, config.baseline, samples, scores) for name in [*compared, again]
    ]
    if distributed.is_main():
        _write_comparisons(folder, texts, [*compared, again], config.baseline, samples, scores)
    return {"comparisons": comparisons, "temperature": config.temperature}


def _sample(
    config: Evaluate,
    target: Path | str,
    prompts: Sequence[Sequence[dict[str, str]]],
    seed: int,
    logger: Logger,
    part: tuple[int, int],
) -> Samples:
    from accelerate import PartialState

    done, parts = part
    model = loading.load_for_inference(target, dtype=config.dtype).to(PartialState().device)
    return generation.sample(
        model,
        tokenization.load_tokenizer(target),
        prompts,
        n_completions=config.n_completions,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=seed,
        map_batches=functools.partial(
            distributed.map_rows,
            progress=lambda at, of: logger.step(done * of + at, parts * of, what="sampled batch"),
        ),
    )


def _compare(
    config: Evaluate,
    policy: str,
    baseline: str,
    samples: Mapping[str, Samples],
    scores: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """One row of ``comparisons``, as the interface lists it."""
    outcomes = winrate.outcomes(scores[policy], scores[baseline])
    lengths = {name: _lengths(samples[name]) for name in (policy, baseline)}
    try:
        controlled = winrate.length_controlled_win_rate(
            outcomes, lengths[policy] - lengths[baseline]
        ).item()
    except ValueError:
        controlled = None  # all lengths differ alike: nothing tells length from quality
    gain = (scores[policy] - scores[baseline]).mean(dim=1)
    return {
        "policy": policy,
        "baseline": baseline,
        "judge": config.judge,
        "win_rate": winrate.win_rate(outcomes).item(),
        "ci": interval(winrate.proportion_interval, outcomes, config),
        "ties": (outcomes == 0.5).double().mean().item(),
        "n_prompts": outcomes.shape[0],
        "n_completions": outcomes.shape[1],
        "length_controlled_win_rate": controlled,
        "p_value": winrate.paired_permutation_p_value(
            (outcomes - 0.5).mean(dim=1), seed=config.seed
        ).item(),
        "mean_tokens": {
            "policy": lengths[policy].mean().item(),
            "baseline": lengths[baseline].mean().item(),
        },
        "mean_score": {
            "policy": scores[policy].mean().item(),
            "baseline": scores[baseline].mean().item(),
        },
        "score_difference": gain.mean().item(),
        "score_difference_ci": interval(winrate.bootstrap_interval, gain, config),
        "finished": {
            "policy": _finished(samples[policy]),
            "baseline": _finished(samples[baseline]),
        },
        "consistency": None,  # of a judge that reads both completions; this one reads one at a time
        "invalid": 0,
    }


def _lengths(samples: Samples) -> torch.Tensor:
    return torch.tensor([[c.n_tokens for c in some] for some in samples], dtype=torch.float64)


def _finished(samples: Samples) -> float:
    flat = [c.finished for some in samples for c in some]
    return sum(flat) / len(flat)


def _write_comparisons(
    folder: Path,
    texts: Sequence[str],
    policies: Sequence[str],
    baseline: str,
    samples: Mapping[str, Samples],
    scores: Mapping[str, torch.Tensor],
) -> None:
    rows = [
        {
            "prompt": text,
            "policy": policy,
            "baseline": baseline,
            "policy_completion": ours.text,
            "baseline_completion": theirs.text,
            "policy_score": scores[policy][i, k].item(),
            "baseline_score": scores[baseline][i, k].item(),
            "policy_tokens": ours.n_tokens,
            "baseline_tokens": theirs.n_tokens,
        }
        for policy in policies
        for i, text in enumerate(texts)
        for k, (ours, theirs) in enumerate(
            zip(samples[policy][i], samples[baseline][i], strict=True)
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "comparisons.parquet")
