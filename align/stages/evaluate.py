"""Evaluate: policies against a baseline on prompts that no training stage saw. Figures with their intervals.

Left out: judges that read both completions (their orders, verdicts and retries); only the exact gold score judges here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from align import artifact, generation, models, prefix_sharing, processes
from align.errors import UserError
from align.functional import winrate
from align.generation import Completion
from align.judges import gold
from align.settings import Evaluate
from align.tracking import Track

_OURS = re.compile(r"-[0-9a-f]{12}$")  # a stage's folder
_TABLES = ("demonstrations", "pairs", "unpaired")
Row = dict[str, Any]
Samples = list[list[Completion]]  # by prompt, then by completion


def run(
    settings: Evaluate, inputs: Mapping[str, Path | str], folder: Path, track: Track
) -> dict[str, Any]:
    """Sample, judge and compare. ``comparisons`` and ``implicit_rewards`` hold one entry a policy."""
    data = Path(inputs["prompts"])
    targets = {name: inputs[f"policies.{i}"] for i, name in enumerate(settings.policies)}
    targets = {settings.baseline: inputs["baseline"]} | targets
    metrics: dict[str, Any] = {}
    if settings.judge is not None:
        rows = _held_out(data, "prompts", settings)
        _refuse_seen(rows, targets, data)
        metrics |= _win_rates(settings, rows, targets, folder, track)
    if settings.implicit_rewards:
        rows = _held_out(data, "pairs", settings)
        _refuse_seen(rows, targets, data)
        metrics |= _implicit_rewards(settings, rows, targets, track)
    return metrics


# Held out ------------------------------------------------------------------------------------------------------------


def _held_out(data: Path, kind: str, settings: Evaluate) -> list[Row]:
    file = data / f"{kind}-{settings.split}.parquet"
    if not file.is_file():
        raise UserError(
            f"{data}: no {file.name}: this `prepare` stage held no {kind} out; "
            f"set its `{settings.split}_fraction` above 0"
        )
    rows: list[Row] = pq.read_table(file).to_pylist()
    ids = dict.fromkeys(row["prompt_id"] for row in rows)
    kept = set(list(ids)[: settings.n_prompts])
    return [row for row in rows if row["prompt_id"] in kept]


def _refuse_seen(rows: Sequence[Row], targets: Mapping[str, Path | str], data: Path) -> None:
    """Refuse prompts that a policy, or any model it comes from, was trained on."""
    held_out = {row["prompt_id"] for row in rows}
    for name, target in targets.items():
        for file in sorted(_trained_on(Path(target))):
            seen = held_out & set(
                pq.read_table(file, columns=["prompt_id"])["prompt_id"].to_pylist()
            )
            if seen:
                raise UserError(
                    f"{len(seen)} of {len(held_out)} held-out prompts of {data} were trained on by "
                    f"`{name}` ({file}); evaluate on the `prepare` stage that it was trained on"
                )


def _trained_on(folder: Path) -> set[Path]:
    """The files that the training stages in the lineage of a folder read."""
    found: set[Path] = set()
    made = artifact.read(folder) if folder.is_dir() else None
    if made is None:
        return found  # a model from elsewhere: nothing says what it saw
    for role, given in made.inputs.items():
        below = Path(given["folder"])
        if not below.is_dir():
            below = folder.parent / below.name  # the runs were moved together
        if not below.is_dir() and _OURS.search(below.name):
            raise UserError(
                f"{folder} was trained on {given['folder']}, which is gone: it cannot be told what was held "
                "out from it; put it back, or run the whole recipe again with `--force all`"
            )
        if not below.is_dir():
            continue
        if role not in ("prompts", "demonstrations"):
            # A policy comes from the model it began as and the rewards it earned, and labels from the policy and the judge
            # that made them.
            found |= _trained_on(below)
        kinds = {"preferences": ("unpaired", "pairs")}.get(role, (role,))
        taught = (*_TABLES, "prompts") if made.stage == "ppo" else _TABLES
        files = [below / f"{kind}-train.parquet" for kind in kinds if kind in taught]
        found |= {file for file in files if file.is_file()}
    return found


# Win rates -----------------------------------------------------------------------------------------------------------


def _win_rates(
    settings: Evaluate,
    rows: Sequence[Row],
    targets: Mapping[str, Path | str],
    folder: Path,
    track: Track,
) -> dict[str, Any]:
    prompts = [row["prompt"] for row in rows]
    texts = [prompt[-1]["content"] for prompt in prompts]
    try:
        for text in texts:
            gold.parse_prompt(text)
    except ValueError as error:
        raise UserError(f"`judge: gold` scores the embedded task's prompts only: {error}") from None
    again = f"{settings.baseline} again"  # the control: the same policy, other seeds
    seeds = dict.fromkeys(targets, settings.seed) | {again: settings.seed + 1}
    samples: dict[str, Samples] = {}
    scores: dict[str, torch.Tensor] = {}
    for done, (name, seed) in enumerate(seeds.items()):
        target = targets[settings.baseline if name == again else name]
        samples[name] = _sample(settings, target, prompts, seed, track, (done, len(seeds)))
        scores[name] = torch.tensor(
            [
                [gold.gold_score(text, c.text) for c in some]
                for text, some in zip(texts, samples[name], strict=True)
            ],
            dtype=torch.float64,
        )
    compared = [name for name in settings.policies if name != settings.baseline]
    comparisons = [
        _compare(settings, name, settings.baseline, samples, scores) for name in [*compared, again]
    ]
    if processes.is_main():
        _write_comparisons(folder, texts, [*compared, again], settings.baseline, samples, scores)
    return {"comparisons": comparisons, "temperature": settings.temperature}


def _sample(
    settings: Evaluate,
    target: Path | str,
    prompts: Sequence[Sequence[dict[str, str]]],
    seed: int,
    track: Track,
    part: tuple[int, int],
) -> Samples:
    from accelerate import PartialState

    done, parts = part
    model = models.load_to_infer(target, dtype=settings.dtype).to(PartialState().device)
    return generation.sample_together(
        model,
        models.load_tokenizer(target),
        prompts,
        n_completions=settings.n_completions,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=seed,
        progress=lambda at, of: track.step(done * of + at, parts * of, what="sampled batch"),
    )


def _compare(
    settings: Evaluate,
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
        "judge": settings.judge,
        "win_rate": winrate.win_rate(outcomes).item(),
        "ci": _interval(winrate.proportion_interval, outcomes, settings),
        "ties": (outcomes == 0.5).double().mean().item(),
        "n_prompts": outcomes.shape[0],
        "n_completions": outcomes.shape[1],
        "length_controlled_win_rate": controlled,
        "p_value": winrate.paired_permutation_p_value(
            (outcomes - 0.5).mean(dim=1), seed=settings.seed
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
        "score_difference_ci": _interval(winrate.bootstrap_interval, gain, settings),
        "finished": {
            "policy": _finished(samples[policy]),
            "baseline": _finished(samples[baseline]),
        },
        "consistency": None,  # of a judge that reads both completions; this one reads one at a time
        "invalid": 0,
    }


def _interval(
    of: Callable[..., winrate.Interval], values: torch.Tensor, settings: Evaluate
) -> list[float]:
    return list(of(values, level=settings.level, resamples=settings.resamples, seed=settings.seed))


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


# Implicit rewards ----------------------------------------------------------------------------------------------------


def _implicit_rewards(
    settings: Evaluate, rows: Sequence[Row], targets: Mapping[str, Path | str], track: Track
) -> dict[str, Any]:
    """How often ``log pi(y|x) - log pi_ref(y|x)`` is higher for the chosen completion; the baseline is the reference.

    A tie counts one half. The interval resamples prompts; each prompt counts once, however many pairs it has. Pairs whose
    prompt alone fills the model's length are ``invalid``: they are counted, and left out.
    """
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    logps = {}
    for done, (name, target) in enumerate(targets.items()):
        logps[name] = _logps(settings, target, sides, track, (done, len(targets)))
    found = []
    for name in settings.policies:
        if name == settings.baseline:
            continue
        chosen, rejected = (logps[name] - logps[settings.baseline]).chunk(2)
        right = winrate.outcomes(chosen[:, None], rejected[:, None])[:, 0].tolist()
        by_prompt: dict[str, list[float]] = {}
        for row, value in zip(rows, right, strict=True):
            if not math.isnan(value):
                by_prompt.setdefault(row["prompt_id"], []).append(value)
        if not by_prompt:
            raise UserError(
                "every held-out prompt is longer than the model's length; nothing to measure"
            )
        values = torch.tensor([sum(v) / len(v) for v in by_prompt.values()], dtype=torch.float64)
        found.append(
            {
                "policy": name,
                "reference": settings.baseline,
                "accuracy": values.mean().item(),
                "ci": _interval(winrate.proportion_interval, values, settings),
                "mean_margin": (chosen - rejected).nanmean().item(),
                "n_pairs": sum(map(len, by_prompt.values())),
                "n_prompts": len(values),
                "invalid": sum(map(math.isnan, right)),
            }
        )
    return {"implicit_rewards": found}


def _logps(
    settings: Evaluate,
    target: Path | str,
    sides: Sequence[tuple[Any, Any]],
    track: Track,
    part: tuple[int, int],
) -> torch.Tensor:
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    done, parts = part
    tokenizer = models.load_tokenizer(target)
    model = models.load_to_infer(target, dtype=settings.dtype).to(state.device)
    if settings.prefix_sharing:
        prefix_sharing.share(model, say=track.say)
    mine = range(state.process_index, len(sides), state.num_processes)
    logps = generation.completion_logps(
        model,
        tokenizer,
        [sides[i] for i in mine],
        batch_size=settings.batch_size,
        max_length=getattr(model.config, "max_position_embeddings", None),
        progress=lambda at, of: track.step(done * of + at, parts * of, what="scored completion"),
    )
    merged = dict(gather_object(list(zip(mine, logps.tolist(), strict=True))))
    return torch.tensor([merged[i] for i in range(len(sides))], dtype=torch.float64)
