"""Sample: a policy and prompts in, n completions of each prompt out; :mod:`align.stages.label` makes pairs of them.

``completions-train.parquet`` has prompt, completion and prompt_id as prepared data have them, so a prompt stays in its
split, and ``evaluate`` finds what was trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.config.data import Sample
from align.data import tables
from align.models import generation, loading, tokenization
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.results import StageResult


def run(
    config: Sample, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
) -> StageResult:
    """Draw ``config.n_completions`` for each prompt of ``config.split``."""
    from accelerate import PartialState

    data, source = Path(inputs["prompts"]), inputs["model"]
    rows = tables.read(data, "prompts", config.split)[: config.n_prompts]
    model = loading.load_for_inference(source, dtype=config.dtype, revision=config.revision)
    samples = generation.sample(
        model.to(PartialState().device),
        tokenization.load_tokenizer(source, revision=config.revision),
        [row["prompt"] for row in rows],
        n_completions=config.n_completions,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        map_batches=functools.partial(
            distributed.map_rows,
            progress=lambda done, total: logger.step(done, total, what="sampled batch"),
        ),
    )
    found = [
        {
            "prompt": row["prompt"],
            "completion": tokenization.assistant_turn(each.text),
            "prompt_id": row["prompt_id"],
            "n_tokens": each.n_tokens,
            "finished": each.finished,
        }
        for row, some in zip(rows, samples, strict=True)
        for each in some
    ]
    if distributed.is_main():
        table = pa.Table.from_pylist(found)
        pq.write_table(
            table, output_dir / f"completions-{config.split}.parquet", compression="zstd"
        )
    distinct = {(row["prompt_id"], row["completion"][0]["content"]) for row in found}
    return StageResult(
        {
            "rows": len(found),
            "completions": {config.split: len(found)},
            "prompts": {config.split: len(rows)},
            "mean_tokens": sum(row["n_tokens"] for row in found) / len(found),
            "finished": sum(row["finished"] for row in found) / len(found),
            "distinct": len(distinct) / len(found),
        }
    )
