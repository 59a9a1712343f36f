"""Sample: a policy and prompts in, n completions of each prompt out; :mod:`align.stages.label` makes pairs of them.

``completions-train.parquet`` has prompt, completion and prompt_id as prepared data have them, so a prompt stays in its
split, and ``evaluate`` finds what was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.config.data import Sample
from align.errors import UserError
from align.models import generation, loading, tokenization
from align.runtime import distributed
from align.runtime.progress import Logger


def run(
    settings: Sample, inputs: Mapping[str, Path | str], folder: Path, track: Logger
) -> dict[str, Any]:
    """Draw ``settings.n_completions`` for each prompt of ``settings.split``."""
    from accelerate import PartialState

    data, source = Path(inputs["prompts"]), inputs["model"]
    file = data / f"prompts-{settings.split}.parquet"
    if not file.is_file():
        raise UserError(
            f"{data}: no {file.name}; set `{settings.split}_fraction` of its `prepare` stage above 0"
        )
    rows = pq.read_table(file).to_pylist()[: settings.n_prompts]
    model = loading.load_for_inference(source, dtype=settings.dtype, revision=settings.revision)
    samples = generation.sample_on_all_ranks(
        model.to(PartialState().device),
        tokenization.load_tokenizer(source, revision=settings.revision),
        [row["prompt"] for row in rows],
        n_completions=settings.n_completions,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=lambda at, of: track.step(at, of, what="sampled batch"),
    )
    found = [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": each.text}],
            "prompt_id": row["prompt_id"],
            "n_tokens": each.n_tokens,
            "finished": each.finished,
        }
        for row, some in zip(rows, samples, strict=True)
        for each in some
    ]
    if distributed.is_main():
        table = pa.Table.from_pylist(found)
        pq.write_table(table, folder / f"completions-{settings.split}.parquet", compression="zstd")
    distinct = {(row["prompt_id"], row["completion"][0]["content"]) for row in found}
    return {
        "rows": len(found),
        "completions": {settings.split: len(found)},
        "prompts": {settings.split: len(rows)},
        "mean_tokens": sum(row["n_tokens"] for row in found) / len(found),
        "finished": sum(row["finished"] for row in found) / len(found),
        "distinct": len(distinct) / len(found),
    }
