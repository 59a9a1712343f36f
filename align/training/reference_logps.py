"""Log-probabilities of pairs under the reference: computed once, kept beside the runs, and never again in a sweep over beta.

``runs/reference-<digest>/`` holds them, with an ``artifact.json`` of its own. The digest covers the token ids (so data,
template and tokenizer), the reference's weights and shape as they are in memory, and what else changes a sum: truncation
and number types. While it trains, the trainer then holds no second model. Values kept were found in other batches than
those of training: up to rounding they are what the reference says in each step.

Left out: DeepSpeed and FSDP, where the policy is not in one piece before training; TRL's reference then runs in each step.
A run that is stopped while it scores scores anew.
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

from align.errors import UserError
from align.runtime import artifacts, distributed
from align.runtime.locks import folder_lock

if TYPE_CHECKING:
    from datasets import Dataset

    from align.runtime.progress import Logger


FILE = "logps.parquet"
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
CODE_VERSION = 1
UNREAD = ("_name_or_path", "architectures", "transformers_version", "use_cache")


def can_precompute(trainer: Any) -> bool:
    """Whether the reference is the same in every step, can be asked before the first, and is asked for all rows."""
    arguments = trainer.args
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    seen = arguments.max_steps * batch * distributed.world_size()
    return not (sharded or arguments.sync_ref_model or 0 < seen < len(trainer.train_dataset))


def add_reference_logps(
    trainer: Any, *, model: Path | str, pairs: Path, runs: Path, logger: Logger
) -> dict[str, Any]:
    """Give a built DPO trainer, before its first step, the reference's log-probabilities as columns of its rows.

    ``model`` is where policy and reference come from. What was computed before is read. Returns what was done: pairs, how
    many of them were computed now, and where they lie.
    """
    started = time.monotonic()
    report: dict[str, Any] = {"pairs": 0, "computed": 0, "folders": []}
    config = distributed.broadcast_from_main(_settings(trainer))
    evaluates = trainer.args.eval_strategy != "no" or trainer.args.eval_on_start
    for name in ("train_dataset", "eval_dataset") if evaluates else ("train_dataset",):
        rows = getattr(trainer, name)
        if rows is None:
            continue
        digest = distributed.broadcast_from_main(
            artifacts.digest({"tokens": _digest(rows), **config})
        )
        folder = runs / f"reference-{digest[:12]}"
        with folder_lock(folder, logger.info):
            if distributed.broadcast_from_main(is_cached(folder, len(rows))):
                logger.info(f"reference log-probabilities of {len(rows):,} pairs: reused, {folder}")
            else:
                logger.info(
                    f"reference log-probabilities of {len(rows):,} pairs: computed now, kept for other runs"
                )
                found = _score(trainer, rows, logger)
                if distributed.is_main():
                    _write(folder, found, digest, config, {"model": model, "pairs": pairs}, started)
                distributed.barrier()
                report["computed"] += len(rows)
        setattr(trainer, name, _with_columns(rows, pq.read_table(folder / FILE)))
        report["pairs"] += len(rows)
        report["folders"].append(folder.name)
    trainer.precompute_ref_logps = True  # what TRL reads in each step
    if trainer.ref_model is not None:
        trainer.ref_model.to("meta")  # accelerate holds on to it: this gives its memory back
        trainer.ref_model = None
    return report | {"seconds": round(time.monotonic() - started, 3)}


def is_cached(folder: Path, pairs: int) -> bool:
    """Whether the log-probabilities of so many pairs are there, whole."""
    try:
        rows = pq.read_metadata(folder / FILE).num_rows
        return artifacts.read_artifact(folder) is not None and rows == pairs
    except (OSError, pa.ArrowInvalid, UserError):
        return False  # damaged: what it held is found again


def _settings(trainer: Any) -> dict[str, Any]:
    """What a log-probability depends on, besides the tokens."""
    policy, arguments = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    adapter = getattr(policy, "peft_config", {}).get("ref")
    shape = policy.config.to_dict()
    return {
        "code_version": CODE_VERSION,
        "weights": _digest_weights(trainer.ref_model or policy),
        "config": {k: v for k, v in shape.items() if k not in UNREAD},
        "adapter": adapter
        and [adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.use_dora],
        "mixed_precision": trainer.accelerator.mixed_precision,
        "max_length": arguments.max_length,
        "truncation_mode": arguments.truncation_mode,
        "ld_alpha": arguments.ld_alpha,
    }


def _digest_weights(model: torch.nn.Module) -> str:
    """SHA-256 of names, types and numbers of what the reference computes with, in hex.

    A stage's own digest names its config, and these may give other weights on another number of processes. The policy's
    adapter is not the reference's, and peft's way to name what stands under one tells nothing.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".default." not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


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


def _score(trainer: Any, rows: Dataset, logger: Logger) -> torch.Tensor:
    """``[rows, 2]``, float32: of the chosen and of the rejected completion, summed over tokens as TRL sums them."""
    from accelerate.utils import send_to_device

    arguments = trainer.args
    size = arguments.precompute_ref_batch_size or arguments.per_device_train_batch_size
    order = _order(rows)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    tokens = rows.select_columns(list(TOKENS))
    model = trainer.ref_model or trainer.model
    model.eval()

    def score(batch: list[int]) -> torch.Tensor:
        inputs = trainer.data_collator([tokens[i] for i in batch])
        logps = trainer.compute_ref_log_probs(
            model, send_to_device(inputs, trainer.accelerator.device)
        )
        return torch.stack(logps, 1).float().cpu()

    logps = distributed.map_rows(
        batches,
        lambda part: [score(batch) for batch in part],
        progress=lambda done, total: logger.step(done, total, what="reference"),
    )
    result = torch.empty(len(rows), len(LOGPS))
    result[torch.tensor(order)] = torch.cat(logps)
    return result


def _write(
    folder: Path,
    found: torch.Tensor,
    digest: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path | str],
    started: float,
) -> None:
    """Keep them, whole or not at all."""
    columns = {name: found[:, k].numpy() for k, name in enumerate(LOGPS)}
    temporary = folder / f".{FILE}"
    with temporary.open("wb") as file:
        pq.write_table(pa.table(columns), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)
    made = artifacts.Artifact(
        stage="reference",
        name="reference",
        digest=digest,
        recipe=dict(config),
        inputs={
            role: {
                "folder": str(target),
                "digest": artifacts.digest_folder(target) if isinstance(target, Path) else target,
            }
            for role, target in inputs.items()
        },
        metrics={"pairs": len(found)},
        versions=artifacts.versions(),
        commit=artifacts.commit(),
        seed=None,
        world_size=distributed.world_size(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=distributed.peak_memory_bytes(),
    )
    artifacts.write_artifact(folder, made)


def _with_columns(rows: Dataset, found: pa.Table) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([rows, Dataset(found)], axis=1)
