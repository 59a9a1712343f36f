"""One rank of a launch: trains tiny models with TRL, each with and without prefix sharing.

    accelerate launch --config_file … tests/helpers/distributed_training.py FOLDER

Each rank writes its observations to ``FOLDER/<rank>.json``, and rank 0 the final weights to
``FOLDER/weights.pt``. :mod:`test_prefix_sharing_distributed` launches this script and compares the
files.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

STEPS, ROWS = 6, 4  # rows per step and rank
WORDS = [str(n) for n in range(38)]
SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
# Adam divides a gradient by its size: with the default epsilon of 1e-8, the rounding error of a
# gradient of zero changes a weight as much as any other gradient.
ARGUMENTS = {
    "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "adam_epsilon": 1e-4,
    "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0,
    "bf16": False, "disable_tqdm": True, "log_level": "error", "dataloader_pin_memory": False,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
KINDS = ("sft", "dpo", "lora", "dpo checkpointing", "lora checkpointing")


class Recorder(logging.Handler):
    """Collects the reasons for which prefix sharing fell back to the padded forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage())


def text(seed: int, low: int, high: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def pairs() -> list[dict[str, str]]:
    return [
        {
            "prompt": text(k, 6, 14),
            "chosen": " " + text(1000 + k, 1, 9),
            "rejected": " " + text(2000 + k, 1, 9),
        }
        for k in range(2 * ROWS * STEPS)
    ]


def demonstrations() -> list[dict[str, str]]:
    """Rows with a shared prompt in rank 0's batches, and nothing to share in rank 1's batches."""
    shared = [
        {"prompt": text(3000 + k // ROWS, 8, 8), "completion": " " + text(k, 1, 9)}
        for k in range(ROWS * STEPS)
    ]
    single = [
        {"prompt": f"{k % ROWS} {text(4000 + k, 5, 5)}", "completion": " " + text(5000 + k, 4, 4)}
        for k in range(ROWS * STEPS)
    ]
    return [
        row
        for k in range(0, ROWS * STEPS, ROWS)
        for row in (*shared[k : k + ROWS], *single[k : k + ROWS])
    ]


def train(kind: str, folder: Path, *, share: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Train one model; return observations and, on the main rank, the final weights."""
    import trl
    from datasets import Dataset

    from align.models.prefix_sharing import wrapper

    sft, lora = kind == "sft", "lora" in kind
    name = "SFT" if sft else "DPO"
    # Built before a model is loaded, because ZeRO-3 then loads it in parts.
    args = getattr(trl, f"{name}Config")(
        output_dir=str(folder / "trainer"),
        use_cpu=not is_enabled("FSDP"),
        activation_checkpointing="checkpointing" in kind,
        **ARGUMENTS,
    )
    load = AutoModelForCausalLM.from_pretrained
    policy = load(folder / "policy", dtype="float32")
    reference = None if sft or lora else load(folder / "reference", dtype="float32")
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = getattr(trl, f"{name}Trainer")(
        model=policy,
        args=args,
        train_dataset=Dataset.from_list(demonstrations() if sft else pairs()),
        processing_class=word_tokenizer(),
        peft_config=adapter if lora else None,
        **({} if sft else {"ref_model": reference}),
    )
    reference = getattr(trainer, "ref_model", None)
    recorder = Recorder()
    wrapper.LOGGER.addHandler(recorder)
    if share:
        wrapper.enable_prefix_sharing(trainer.model, reference)
    batches = sizes_of_batches(trainer)
    computed = [tokens_computed(each) for each in (trainer.model, reference) if each is not None]
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "processes": accelerator.num_processes,
        "type": str(accelerator.distributed_type),
        "wrapper": type(wrapped).__name__,
        "stage": getattr(wrapped, "zero_optimization_stage", lambda: None)(),
        "layer": type(first_layer(trainer.model)).__name__,
        "held": held_share(trainer.model),
        "held of the reference": None if reference is None else held_share(reference),
        "losses": [entry["loss"] for entry in log],
        "margins": [] if sft else [entry["rewards/margins"] for entry in log],
        "computed": computed,
        "padded": [padded for padded, _ in batches],
        "distinct": [distinct for _, distinct in batches],
        "fallbacks": recorder.reasons,
    }, accelerator.get_state_dict(wrapped)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: n for n, word in enumerate(("<pad>", "<eos>", *WORDS))}
    splitter = Tokenizer(models.WordLevel(words))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>")


def first_layer(model: Any) -> Any:
    return next(m for name, m in model.named_modules() if name.endswith("layers.0"))


def tokens_computed(model: Any) -> list[int]:
    """Positions in each pass of the first layer, recomputed passes included."""
    seen: list[int] = []
    first_layer(model).self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[:2].numel())
    )
    return seen


def sizes_of_batches(trainer: Any) -> list[tuple[int, int]]:
    """Numbers of positions and of distinct prefixes of each collated batch."""
    sizes: list[tuple[int, int]] = []
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        unpadded = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        distinct = {tuple(row[:k]) for row in unpadded for k in range(1, len(row) + 1)}
        sizes.append((ids.numel(), len(distinct)))
        return batch

    trainer.data_collator = counted
    return sizes


def held_share(model: Any) -> float:
    """Share of the weights that this rank holds."""
    held = total = 0
    for weight in model.parameters():
        if hasattr(weight, "to_local"):  # FSDP2
            held, total = held + weight.to_local().numel(), total + weight.numel()
        elif hasattr(weight, "ds_numel"):  # ZeRO-3; empty unless it is gathered
            held += weight.numel() or weight.ds_tensor.numel()
            total += weight.ds_numel
        else:
            held, total = held + weight.numel(), total + weight.numel()
    return held / total


def is_enabled(plugin: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true"


def fsdp_without_gpus() -> None:
    """Make accelerate use gloo as a GPU backend: without one, it silently replaces FSDP by DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def main(folder: Path) -> None:
    import trl  # noqa: F401 (so that it is frozen below)

    from align.runtime import distributed

    rank = int(os.environ["RANK"])
    rank_folder = folder / str(rank)
    for seed, name in enumerate(("policy", "reference")):  # in a process group only rank 0 saves
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(rank_folder / name)
    if is_enabled("FSDP"):
        fsdp_without_gpus()
    elif is_enabled("DEEPSPEED"):
        import deepspeed

        # Communication in shared memory is compiled at the first use, for half a minute.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    gc.collect()
    gc.freeze()  # accelerate collects garbage at the start of each training, imported modules included
    observations: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for kind in KINDS:
        for share in (False, True):
            distributed.reset_process_state(0)
            run = f"{kind}, {'shared' if share else 'padded'}"
            observations[run], weights[run] = train(kind, rank_folder, share=share)
    (folder / f"{rank}.json").write_text(json.dumps(observations))
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort a process whose interpreter is taken down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
