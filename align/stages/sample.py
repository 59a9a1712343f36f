"""Sample: draw completions of a policy; :mod:`align.stages.label` makes pairs of them.

``completions-<split>.parquet`` has the columns ``prompt``, ``completion`` and ``prompt_id`` of
prepared data. A prompt therefore stays in its split, and ``evaluate`` recognizes prompts that were
trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.completions import Sample
from align.data import tables
from align.models import generation, tokenization
from align.models.policy import load_policy
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult


def run(
    config: Sample, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Draw ``config.n_completions`` completions for each prompt of ``config.split``."""
    from accelerate import PartialState

    data, source = Path(inputs["prompts"]), inputs["model"]
    prompts = tables.read(data, "prompts", config.split, required_by="split")  # 1. data
    prompts = prompts[: config.n_prompts]
    policy = load_policy(  # 2. model
        source,
        dtype=config.dtype,
        revision=config.revision,
        device=PartialState().device,
        quantization=config.quantization,
    )
    samples = generation.sample(  # 3. sample
        policy.model,
        policy.tokenizer,
        [row["prompt"] for row in prompts],
        n_completions=config.n_completions,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        compile_decoding=config.compile_decoding,
        map_batches=functools.partial(
            distributed.map_rows,
            progress=lambda done, total: logger.step(done, total, unit="sampled batch"),
        ),
    )
    rows = [
        {
            "prompt": row["prompt"],
            "completion": tokenization.assistant_turn(completion.text),
            "prompt_id": row["prompt_id"],
            "n_tokens": completion.n_tokens,
            "finished": completion.finished,
        }
        for row, completions in zip(prompts, samples, strict=True)
        for completion in completions
    ]
    if distributed.is_main():  # 4. write
        tables.write(rows, tables.table_file(output_dir, "completions", config.split))
    metrics = _metrics(config.split, len(prompts), rows)
    headline = {key: metrics[key] for key in ("rows", "mean_tokens", "finished")}
    return StageResult(metrics, headline)


def _metrics(split: str, n_prompts: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, the mean length in tokens, and the shares of finished and of distinct completions."""
    distinct = {(row["prompt_id"], row["completion"][0]["content"]) for row in rows}
    return {
        "rows": len(rows),
        "completions": {split: len(rows)},
        "prompts": {split: n_prompts},
        "mean_tokens": sum(row["n_tokens"] for row in rows) / len(rows),
        "finished": sum(row["finished"] for row in rows) / len(rows),
        "distinct": len(distinct) / len(rows),
    }
