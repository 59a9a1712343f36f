"""The time of the stages without gradients: ``sample``, ``label`` and ``evaluate``.

Models of one stage are assumed to have one shape, so that the first of each kind is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from align.config import judges
from align.config.completions import Label, Sample
from align.config.evaluate import Evaluate
from align.models import generation, tokenization
from align.models.logps import completion_logps
from align.models.policy import Policy, load_policy
from align.models.prefix_sharing import wrapper
from align.pipeline.probe.data import SampledData, completed_rows
from align.pipeline.probe.sampling import Lengths, SamplingSpeed, measure_sampling
from align.pipeline.probe.timing import LONGEST_FORWARD, Seconds, StageTime, Stopwatch
from align.rewards.reward_model import RewardModel

SERVER = "without the requests to the judge"


def measure_sample(
    config: Sample, inputs: Mapping[str, Path | str], data: SampledData, watch: Stopwatch
) -> StageTime:
    """Measure a stage that samples completions."""
    load, policy = watch.result(
        lambda: load_policy(
            inputs["model"],
            dtype=config.dtype,
            revision=config.revision,
            quantization=config.quantization,
        )
    )
    speed, lengths = sampling_speed(config, policy, data, config.split, watch)
    prompts = data.count("prompts", config.split)
    rows = min(prompts, config.n_prompts or prompts) * config.n_completions
    parts = {"load": Seconds.exactly(load), "sample": speed.seconds(rows, lengths)}
    return StageTime(parts, described(lengths))


def measure_label(
    config: Label, inputs: Mapping[str, Path | str], data: SampledData, watch: Stopwatch
) -> StageTime:
    """Measure a stage that scores completions and makes pairs of them."""
    rows = completed_rows(data)
    n_rows = sum(count for (kind, _), count in data.counts.items() if kind == "completions")
    parts = _judging(config, inputs, rows, n_rows, watch)
    return StageTime(parts, remark=SERVER if config.server_judges else "")


def measure_evaluate(
    config: Evaluate, inputs: Mapping[str, Path | str], data: SampledData, watch: Stopwatch
) -> StageTime:
    """Measure an evaluation; all of its models take the time of its first policy."""
    sources = [source for key, source in inputs.items() if key.startswith(("policies", "baseline"))]
    prompts, pairs = (data.count(kind, config.split) for kind in ("prompts", "pairs"))
    limit = config.n_prompts or prompts
    pairs = round(pairs * min(1.0, limit / max(prompts, 1)))
    rows = min(prompts, limit) * config.n_completions
    parts: dict[str, Seconds] = {}
    measured = ""
    if sources:
        load, policy = watch.result(
            lambda: load_policy(sources[0], dtype=config.dtype, quantization=config.quantization)
        )
        parts["load"] = Seconds.exactly(load * len(dict.fromkeys(sources)))
        forward = 0.0
        sampled = completed_rows(data)
        models = len(dict.fromkeys(sources))
        if config.judge is not None:
            speed, lengths = sampling_speed(config, policy, data, config.split, watch)
            measured = described(lengths)
            control = "baseline" in inputs
            parts["sample"] = speed.seconds(rows * (models + control), lengths)
        if config.measures_drift or config.implicit_rewards:
            forward = _logps_seconds_per_row(config, policy, sampled, watch)
        if config.measures_drift:
            shared = models - 1 if "baseline" in inputs else 0
            drift = forward * rows * (models + shared)
            parts["drift"] = Seconds(drift, drift * _growth(speed, lengths))
        if config.implicit_rewards:
            parts["pairs"] = Seconds.exactly(forward * 2 * pairs * models)
        del policy
        judged = rows * (models + ("baseline" in inputs))
        parts |= _judging(config, inputs, sampled, judged, watch)
    return StageTime(parts, measured, remark=SERVER if config.server_judges else "")


def sampling_speed(
    config: Any, policy: Policy, data: SampledData, split: str, watch: Stopwatch
) -> tuple[SamplingSpeed, Lengths]:
    """The speed of sampling from a policy, and the lengths of its completions."""
    generation.set_sampling(
        policy.model,
        policy.tokenizer,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
    )
    rows = data.sampled("prompts", split) or data.sampled("prompts")
    prompts = tokenization.tokenize_prompts(policy.tokenizer, [row["prompt"] for row in rows])

    prompts = [prompt for prompt in prompts for _ in range(config.n_completions)]

    decoder = generation.compiled_decoder(policy.model, config.compile_decoding)

    def generate(rows: Sequence[Sequence[int]], n_tokens: int) -> None:
        set_length(policy.model, n_tokens)
        generation.generate_tokens(policy.model, rows, stops=(), decoder=decoder)

    speed = measure_sampling(
        watch, generate, prompts, batch=config.batch_size, most=config.max_new_tokens
    )
    return speed, expected_lengths(policy.tokenizer, data, config.max_new_tokens)


def set_length(model: Any, n_tokens: int) -> None:
    """Make a model sample exactly so many tokens, for callers without stop tokens."""
    model.generation_config.max_new_tokens = n_tokens
    model.generation_config.eos_token_id = None


def expected_lengths(tokenizer: Any, data: SampledData, most: int) -> Lengths:
    """The lengths of sampled completions, from those of the data; half of the limit without any."""
    rows = completed_rows(data)
    if not rows:
        return Lengths(most / 2, most)
    tokenized = tokenization.tokenize_rows(
        tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows]
    )
    return Lengths(fmean(min(most, len(row.ids) - row.start) for row in tokenized), most)


def described(lengths: Lengths) -> str:
    """The assumed lengths in words."""
    return f"{lengths.expected:.0f} to {lengths.most} tokens per completion"


def _growth(speed: SamplingSpeed, lengths: Lengths) -> float:
    """Tokens of rows with the longest completions, per token of those of expected length."""
    return (speed.prompt_tokens + lengths.most) / (speed.prompt_tokens + lengths.expected)


def _logps_seconds_per_row(
    config: Evaluate, policy: Policy, rows: Sequence[Mapping[str, Any]], watch: Stopwatch
) -> float:
    """Seconds of the log-probability of one completion."""
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(policy.model)
    pairs = [(row["prompt"], row["completion"]) for row in rows]

    def score(size: int) -> float:
        part = _typical(pairs, size)
        return watch.settled(
            lambda: completion_logps(policy.model, policy.tokenizer, part, batch_size=size)
        )

    return _per_row(score, pairs, config.batch_size, policy.tokenizer, watch)


def _judging(
    config: Label | Evaluate,
    inputs: Mapping[str, Path | str],
    rows: Sequence[Mapping[str, Any]],
    n_rows: int,
    watch: Stopwatch,
) -> dict[str, Seconds]:
    """Seconds of the reward models among the judges; the others take no time, or an unknown one."""
    total = Seconds()
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    for key in judges.by_key(config.judge):
        if key not in inputs or not pairs:
            continue
        load, model = watch.result(partial(_reward_model, inputs[key], config))

        def score(size: int, model: RewardModel = model) -> float:
            prompts, completions = zip(*_typical(pairs, size), strict=True)
            return watch.settled(lambda: model.score(prompts, completions, batch_size=size))

        per_row = _per_row(score, pairs, config.batch_size, model.tokenizer, watch)
        total += Seconds.exactly(load + per_row * n_rows)
    return {"judge": total} if total.most else {}


def _reward_model(source: Path | str, config: Label | Evaluate) -> RewardModel:
    from accelerate import PartialState

    return RewardModel.load(
        source,
        dtype=config.dtype,
        device=PartialState().device,
        quantization=config.quantization,
    )


def _per_row(
    score: Any, pairs: Sequence[tuple[Any, Any]], batch: int, tokenizer: Any, watch: Stopwatch
) -> float:
    """Seconds per row of all ``pairs``, measured on some of them."""
    size, seconds = watch.largest(score, min(batch, len(pairs)), longest=LONGEST_FORWARD)
    measured, all_rows = (
        fmean(
            len(row.ids) for row in tokenization.tokenize_rows(tokenizer, *zip(*part, strict=True))
        )
        for part in (_typical(pairs, size), pairs)
    )
    return seconds / size * all_rows / measured


def _typical(pairs: Sequence[tuple[Any, Any]], size: int) -> list[tuple[Any, Any]]:
    """``size`` rows of median length and around it."""
    ordered = sorted(pairs, key=lambda pair: len(str(pair)))
    first = max(0, (len(ordered) - size) // 2)
    return ordered[first : first + size]
