"""Log-probabilities of pairs under DPO's reference: computed once, cached and reused.

They are stored in ``runs/reference-<digest>/`` with an ``artifact.json``. The digest covers the
token ids (and with them data, template and tokenizer), the weights and the config of the reference
in memory, and all other settings that change a sum: truncation and number types. While DPO trains,
its trainer then holds no second model. The cached values come from other batches than those of
training, so they equal the values of each step up to rounding.

Left out: DeepSpeed and FSDP, which shard the policy before training; there TRL's reference runs in
every step. A run that is interrupted while it computes the values computes all of them again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from align.errors import ArtifactError, UserError
from align.runtime import artifacts, distributed
from align.runtime.locks import folder_lock

if TYPE_CHECKING:
    from datasets import Dataset

    from align.runtime.progress import Logger


FILE = "logps.parquet"
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
CODE_VERSION = 1
IRRELEVANT_CONFIG = ("_name_or_path", "architectures", "transformers_version", "use_cache")


def can_precompute(trainer: Any) -> bool:
    """Whether the reference never changes, is available before training and needed for all rows."""
    arguments = trainer.args
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    rows_seen = arguments.max_steps * batch * distributed.world_size()
    limited = 0 < rows_seen < len(trainer.train_dataset)
    return not (sharded or arguments.sync_ref_model or limited)


def add_reference_logps(
    trainer: Any, *, inputs: Mapping[str, Path | str], runs: Path, logger: Logger
) -> dict[str, Any]:
    """Add the reference's log-probabilities to the rows of a DPO trainer, before its first step.

    Values that an earlier run has computed are read from ``runs``. ``inputs`` are the folders of
    the model and the pairs, for the artifact. Returns the number of ``pairs``, how many of them
    were ``computed`` now, the ``folders`` of the values and the ``seconds`` taken.

    Raises:
        UserError: A value is not finite.
    """
    started = time.monotonic()
    report: dict[str, Any] = {"pairs": 0, "computed": 0, "folders": []}
    settings = distributed.broadcast_from_main(_settings(trainer))
    evaluates = trainer.args.eval_strategy != "no" or trainer.args.eval_on_start
    for name in ("train_dataset", "eval_dataset") if evaluates else ("train_dataset",):
        rows = getattr(trainer, name)
        if rows is None:
            continue
        digest = distributed.broadcast_from_main(
            artifacts.digest({"tokens": digest_tokens(rows), **settings})
        )
        folder = runs / f"reference-{digest[:12]}"
        with folder_lock(folder, logger.info):
            if distributed.broadcast_from_main(is_cached(folder, digest, logger)):
                logger.info(f"reference log-probabilities of {len(rows):,} pairs: reused, {folder}")
            else:
                logger.info(
                    f"reference log-probabilities of {len(rows):,} pairs: computed and cached"
                )
                values = compute_logps(trainer, rows, logger)
                if not bool(values.isfinite().all()):
                    raise UserError(
                        "the reference gives log-probabilities that are not finite numbers, so "
                        "the weights of `model` are damaged; train or download it again"
                    )
                if distributed.is_main():
                    _write(folder, values, digest, settings, inputs, started)
                distributed.barrier()
                report["computed"] += len(rows)
        setattr(trainer, name, _with_columns(rows, pq.read_table(folder / FILE)))
        report["pairs"] += len(rows)
        report["folders"].append(folder.name)
    trainer.precompute_ref_logps = True  # TRL then reads the columns in each step
    if trainer.ref_model is not None:
        trainer.ref_model.to("meta")  # frees the memory although accelerate keeps a reference
        trainer.ref_model = None
    return report | {"seconds": round(time.monotonic() - started, 3)}


def is_cached(folder: Path, digest: str, logger: Logger) -> bool:
    """Whether the folder has the intact log-probabilities of this digest; damage is logged."""
    if not distributed.is_main():
        return False
    try:
        artifact = artifacts.read_artifact(folder)
        if artifact is None:
            return False
        artifacts.check_identity(folder, artifact, "reference", digest)
        artifacts.check_contents(folder, artifact)
    except ArtifactError as error:
        damage = error.lines[0].partition(";")[0]
        logger.info(f"{damage}; the reference log-probabilities are computed again")
        for path in folder.iterdir():
            if path.name == artifacts.WORKING:
                continue  # held by this run
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return False
    return True


def _settings(trainer: Any) -> dict[str, Any]:
    """Everything besides the tokens that a log-probability depends on."""
    policy, arguments = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    adapter = getattr(policy, "peft_config", {}).get("ref")
    config = policy.config.to_dict()
    return {
        "code_version": CODE_VERSION,
        "weights": _digest_weights(trainer.ref_model or policy),
        "config": {key: value for key, value in config.items() if key not in IRRELEVANT_CONFIG},
        "adapter": adapter
        and [adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.use_dora],
        "mixed_precision": trainer.accelerator.mixed_precision,
        "max_length": arguments.max_length,
        "truncation_mode": arguments.truncation_mode,
        "ld_alpha": arguments.ld_alpha,
    }


def _digest_weights(model: nn.Module) -> str:
    """SHA-256 of the names, types and values of the reference's weights, in hex.

    The digest of the stage that wrote the model is not enough: the same settings give other weights
    on another number of ranks. The adapter of the policy is skipped, and the names that peft gives
    to the layers below an adapter are undone.
    """
    sha256 = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".default." not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            sha256.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def digest_tokens(rows: Dataset) -> str:
    """SHA-256 of all token ids and of the length of each list, in hex."""
    sha256 = hashlib.sha256()
    table = rows.select_columns(list(TOKENS)).with_format("arrow")[:]
    for column in TOKENS:
        lists = table[column].combine_chunks()
        for part in (lists.value_lengths(), lists.flatten()):
            sha256.update(part.cast(pa.int64()).to_numpy().tobytes())
    return sha256.hexdigest()


def computation_order(rows: Dataset) -> list[int]:
    """Order of computation: rows of a prompt together, prompts with the longest row first.

    Prefix sharing then computes each prompt once, and a batch that does not fit into memory fails
    first.
    """
    table = rows.select_columns(list(TOKENS)).with_format("arrow")[:]
    prompts = [bytes(p.values.to_numpy()) for p in table["prompt_ids"]]
    lengths = {c: table[c].combine_chunks().value_lengths().to_pylist() for c in TOKENS}
    totals = [p + max(c, r) for p, c, r in zip(*lengths.values(), strict=True)]
    longest: dict[bytes, int] = {}
    for prompt, total in zip(prompts, totals, strict=True):
        longest[prompt] = max(total, longest.get(prompt, 0))
    return sorted(range(len(totals)), key=lambda i: (-longest[prompts[i]], prompts[i], -totals[i]))


def compute_logps(trainer: Any, rows: Dataset, logger: Logger) -> Tensor:
    """Summed log-probabilities of chosen and rejected completions, float32 ``[rows, 2]``."""
    from accelerate.utils import send_to_device

    arguments = trainer.args
    size = arguments.precompute_ref_batch_size or arguments.per_device_train_batch_size
    tokens = rows.select_columns(list(TOKENS))
    model = trainer.ref_model or trainer.model
    model.eval()

    def compute_batch(batch: list[int]) -> list[Tensor]:
        inputs = trainer.data_collator([tokens[i] for i in batch])
        logps = trainer.compute_ref_log_probs(
            model, send_to_device(inputs, trainer.accelerator.device)
        )
        return list(torch.stack(logps, 1).float().cpu())

    order = computation_order(rows)
    values = distributed.map_rows(
        order,
        compute_batch,
        size=size,
        progress=lambda done, total: logger.step(done, total, unit="reference"),
    )
    result = torch.empty(len(rows), len(LOGPS))
    result[torch.tensor(order)] = torch.stack(values)
    return result


def _write(
    folder: Path,
    values: Tensor,
    digest: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | str],
    started: float,
) -> None:
    """Write the values atomically, then the artifact."""
    columns = {name: values[:, k].numpy() for k, name in enumerate(LOGPS)}
    temporary = folder / f".{FILE}"
    with temporary.open("wb") as file:
        pq.write_table(pa.table(columns), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)
    artifact = artifacts.Artifact(
        stage="reference",
        name="reference",
        digest=digest,
        recipe=dict(settings),
        inputs={
            name: {
                "folder": str(target),
                "digest": artifacts.digest_folder(target) if isinstance(target, Path) else target,
            }
            for name, target in inputs.items()
        },
        metrics={"pairs": len(values)},
        versions=artifacts.versions(),
        commit=artifacts.commit(),
        seed=None,
        world_size=distributed.world_size(),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=distributed.peak_memory_bytes(),
    )
    artifacts.write_artifact(folder, artifact)


def _with_columns(rows: Dataset, columns: pa.Table) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([rows, Dataset(columns)], axis=1)
