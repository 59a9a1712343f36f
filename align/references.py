"""Log-probabilities of pairs under the reference: computed once, kept beside the runs, and never again in a sweep over beta.

``runs/reference-<digest>/`` holds them, with an ``artifact.json`` of its own. The digest covers the token ids (so data,
template and tokenizer), the model by content, and what else changes a sum: truncation, number types, the adapter. The
policy before its first step is the reference, so no second model is loaded.

Left out: DeepSpeed and FSDP, where the policy is not in one piece before training; TRL's reference then runs in each step.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from align import artifact, processes

if TYPE_CHECKING:
    from datasets import Dataset

    from align.tracking import Track

FILE = "logps.parquet"
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
CODE_VERSION = 1


def attach(
    trainer: Any, *, model: Path | str, pairs: Path, runs: Path, track: Track
) -> dict[str, Any]:
    """Give a built DPO trainer, before its first step, the reference's log-probabilities as columns of its rows.

    ``model`` is where policy and reference come from. What was computed before is read. Returns what was done: pairs, how
    many of them were computed now, and where they lie.
    """
    started = time.monotonic()
    report: dict[str, Any] = {"pairs": 0, "computed": 0, "folders": []}
    for name in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, name)
        if rows is None:
            continue
        settings = _settings(trainer, model)
        digest = artifact.digest({"tokens": _digest(rows), **settings})
        folder = runs / f"reference-{digest[:12]}"
        made = processes.from_main(artifact.read(folder) if processes.is_main() else None)
        if made is None:
            track.say(f"log-probabilities of {len(rows):,} pairs under the reference")
            found = _score(trainer, rows, track)
            if processes.is_main():
                _write(folder, found, digest, settings, {"model": model, "pairs": pairs}, started)
            processes.wait()
            report["computed"] += len(rows)
        else:
            track.say(f"log-probabilities of {len(rows):,} pairs under the reference: {folder}")
        setattr(trainer, name, _with_columns(rows, pq.read_table(folder / FILE)))
        report["pairs"] += len(rows)
        report["folders"].append(folder.name)
    trainer.precompute_ref_logps = True  # what TRL reads in each step
    if trainer.ref_model is not None:
        trainer.ref_model.to("meta")  # accelerate holds on to it: this gives its memory back
        trainer.ref_model = None
    return report | {"seconds": round(time.monotonic() - started, 3)}


def _settings(trainer: Any, model: Path | str) -> dict[str, Any]:
    """What a log-probability depends on, besides the tokens."""
    policy, arguments = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    if isinstance(model, Path):
        source = artifact.digest_folder(model)
    else:
        source = f"hub:{model}@{policy.config._commit_hash}"
    return {
        "code_version": CODE_VERSION,
        "model": source,
        "adapter": "ref" in getattr(policy, "peft_config", {}),
        "dtype": str(policy.dtype),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "max_length": arguments.max_length,
        "truncation_mode": arguments.truncation_mode,
        "ld_alpha": arguments.ld_alpha,
    }


def _digest(rows: Dataset) -> str:
    """SHA-256 of all token ids and of where each list ends, in hex."""
    found = hashlib.sha256()
    table = rows.select_columns(list(TOKENS)).with_format("arrow")[:]
    for column in TOKENS:
        lists = table[column].combine_chunks()
        for part in (lists.value_lengths(), lists.flatten()):
            found.update(part.cast(pa.int64()).to_numpy().tobytes())
    return found.hexdigest()


def _order(rows: Dataset) -> list[int]:
    """Rows of like length together, and those with the same prompt, which sharing then computes once."""
    table = rows.select_columns(list(TOKENS)).with_format("arrow")[:]
    prompts = [bytes(p.values.to_numpy()) for p in table["prompt_ids"]]
    sizes = {c: table[c].combine_chunks().value_lengths().to_pylist() for c in TOKENS}
    whole = [p + max(c, r) for p, c, r in zip(*sizes.values(), strict=True)]
    longest: dict[bytes, int] = {}
    for prompt, size in zip(prompts, whole, strict=True):
        longest[prompt] = max(size, longest.get(prompt, 0))
    # The longest first: a batch that does not fit into memory fails at once.
    return sorted(range(len(whole)), key=lambda i: (-longest[prompts[i]], prompts[i], -whole[i]))


def _score(trainer: Any, rows: Dataset, track: Track) -> torch.Tensor:
    """``[rows, 2]``, float32: of the chosen and of the rejected completion, summed over tokens as TRL sums them."""
    from accelerate.utils import gather_object, send_to_device

    arguments = trainer.args
    size = arguments.precompute_ref_batch_size or arguments.per_device_train_batch_size
    order = _order(rows)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    mine = batches[processes.rank() :: processes.world_size()]
    tokens = rows.select_columns(list(TOKENS))
    model = trainer.ref_model or trainer.model
    model.eval()
    found: list[tuple[list[int], torch.Tensor]] = []
    for done, batch in enumerate(mine):
        inputs = trainer.data_collator([tokens[i] for i in batch])
        logps = trainer.compute_ref_log_probs(
            model, send_to_device(inputs, trainer.accelerator.device)
        )
        found.append((batch, torch.stack(logps, 1).float().cpu()))
        track.step(done + 1, len(mine))
    gathered = gather_object(found)
    result = torch.empty(len(rows), len(LOGPS))
    result[torch.tensor([i for batch, _ in gathered for i in batch])] = torch.cat([logps for _, logps in gathered])  # fmt: skip
    assert sum(len(batch) for batch, _ in gathered) == len(rows)
    return result


def _write(
    folder: Path,
    found: torch.Tensor,
    digest: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | str],
    started: float,
) -> None:
    """Keep them: whole or not at all, and two runs that compute the same at once do not meet."""
    columns = {name: found[:, k].numpy() for k, name in enumerate(LOGPS)}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}"
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(folder / FILE)
    made = artifact.Artifact(
        stage="reference",
        name="reference",
        digest=digest,
        recipe=dict(settings),
        inputs={
            role: {
                "folder": str(target),
                "digest": artifact.digest_folder(target) if isinstance(target, Path) else target,
            }
            for role, target in inputs.items()
        },
        metrics={"pairs": len(found)},
        versions=artifact.versions(),
        commit=artifact.commit(),
        seed=None,
        world_size=processes.world_size(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=processes.peak_memory_bytes(),
    )
    artifact.write(folder, made)


def _with_columns(rows: Dataset, found: pa.Table) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([rows, Dataset(found)], axis=1)
