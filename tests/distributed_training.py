"""Trains tiny models with TRL's trainers, each with and without prefix sharing: one process of a launch.

    accelerate launch --config_file … tests/distributed_training.py folder sft dpo lora checkpointing

Leaves what every process saw in ``folder/<rank>.json``, and the weights at the end in ``folder/weights.pt``.
:mod:`test_prefix_sharing_distributed` launches it and judges.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from align import prefix_sharing

STEPS, ROWS = 6, 4  # rows a step in each process
WORDS = [str(n) for n in range(38)]
SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
# Weight decay off and a large epsilon: Adam divides by the size of a gradient, and so makes rounding
# errors of gradients that are zero as large as the learning rate.
ARGUMENTS = {
    "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "adam_epsilon": 1e-4,
    "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0,
    "bf16": False, "activation_checkpointing": False, "disable_tqdm": True, "log_level": "error",
    "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {},
    "lora": {},
    "dpo, checkpointing": {"activation_checkpointing": True},
    "lora, checkpointing": {"activation_checkpointing": True},
}


def texts(seed: int, low: int, high: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def pairs() -> Dataset:
    rows = [
        {"prompt": texts(k, 6, 14), "chosen": texts(1000 + k, 1, 9), "rejected": texts(2000 + k, 1, 9)}
        for k in range(2 * ROWS * STEPS)
    ]  # fmt: skip
    return Dataset.from_list(rows)


def demonstrations() -> Dataset:
    """Batches of process 0 share a long prompt; those of process 1 have neither pads nor prefixes in common."""
    rows = []
    for k in range(2 * ROWS * STEPS):
        batch = k // ROWS
        if batch % 2 == 0:
            rows.append({"prompt": texts(3000 + batch, 8, 8), "completion": texts(k, 1, 9)})
        else:
            rows.append({"prompt": f"{k % ROWS} {texts(k, 5, 5)}", "completion": texts(k, 4, 4)})
    return Dataset.from_list(rows)


def train(kind: str, folder: Path, *, share: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What this process saw of a run, and in the main process the weights at the end."""
    trainer_name = "SFT" if kind == "sft" else "DPO"
    words = {word: n for n, word in enumerate(("<pad>", "<eos>", *WORDS))}
    splitter = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>"
    )
    # The arguments come before a model is loaded: with ZeRO-3 they say that it loads in parts.
    args = getattr(trl, f"{trainer_name}Config")(
        output_dir=str(folder / "out"), use_cpu="FSDP" not in asked(), **ARGUMENTS | RUNS[kind]
    )
    load = AutoModelForCausalLM.from_pretrained
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = {}
    if trainer_name == "DPO":
        full = "lora" not in kind
        reference["ref_model"] = load(folder / "reference", dtype="float32") if full else None
    torch.manual_seed(0)
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=load(folder / "policy", dtype="float32"),
        args=args,
        train_dataset=demonstrations() if kind == "sft" else pairs(),
        processing_class=tokenizer,
        peft_config=adapter if "lora" in kind else None,
        **reference,
    )
    said: list[str] = []
    computed = {"policy": tokens_computed(trainer.model)}
    if reference.get("ref_model") is not None:
        computed["reference"] = tokens_computed(trainer.ref_model)
    if share:
        prefix_sharing.share(trainer.model, *reference and [trainer.ref_model], say=said.append)
    trainer.remove_callback(PrinterCallback)
    padded: list[int] = []
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        padded.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    trainer.train()
    accelerator = trainer.accelerator
    weights = accelerator.get_state_dict(trainer.model_wrapped)
    some = next(p for p in trainer.model.parameters() if p.dim() == 2)
    return {
        "processes": accelerator.num_processes,
        "type": str(accelerator.distributed_type),
        "fsdp2": accelerator.is_fsdp2,
        "wrapper": type(trainer.model_wrapped).__name__,
        "stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        "kept": kept(some),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "margins": [e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e],
        "computed": computed,
        "padded": padded,
        "said": said,
    }, weights  # fmt: skip


def tokens_computed(model: Any) -> list[int]:
    """How many positions each pass of the first layer computed; inside of what checkpointing runs again."""
    seen: list[int] = []
    some = next(
        m for name, m in model.named_modules() if name.endswith("layers.0.self_attn.q_proj")
    )
    some.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    return seen


def kept(weight: Any) -> float:
    """Which share of a weight lies in this process."""
    if hasattr(weight, "to_local"):
        return weight.to_local().numel() / weight.numel()
    return weight.numel() / getattr(weight, "ds_numel", weight.numel())


def asked() -> str:
    return "FSDP" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else os.environ.get("ACCELERATE_USE_DEEPSPEED", "")  # fmt: skip


def fsdp_on_cpu() -> None:
    """Make accelerate believe that gloo is a GPU's backend: else FSDP silently becomes DDP without a GPU."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def main(folder: Path, kinds: list[str]) -> None:
    from align import processes

    rank = os.environ["RANK"]
    own = folder / rank  # and before the process group is joined: in it only rank 0 saves
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(own / name)
    if asked() == "FSDP":
        fsdp_on_cpu()
    elif asked():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    gc.collect()
    gc.freeze()  # accelerate collects garbage whenever a training starts, over imported modules as well
    found: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for kind in kinds:
        for share in (False, True):
            processes.clean_state(0)
            started = time.monotonic()
            name = f"{kind}, {'shared' if share else 'plain'}"
            found[name], weights[name] = train(kind, own, share=share)
            found[name]["seconds"] = time.monotonic() - started
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if rank == "0":
        torch.save(weights, folder / "weights.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
