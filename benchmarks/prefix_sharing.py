r"""Speed of TRL's trainers with and without prefix sharing, alternating in one run.

    python benchmarks/prefix_sharing.py --quick                      # a check, under a minute
    python benchmarks/prefix_sharing.py                              # one core, about ten minutes
    python benchmarks/prefix_sharing.py --layers 8 --trainers dpo    # 20 M parameters
    python benchmarks/prefix_sharing.py --shapes --hh harmless-base-test.jsonl.gz
    python benchmarks/prefix_sharing.py --quick --steps 20 --learning-rate 1e-3 \
        --trainers dpo dpo-lora sft reward kto
    python benchmarks/prefix_sharing.py --device cuda --dtype bfloat16 \
        --layers 24 --width 1024 --pairs 16

There are three shapes of data, with log-normal lengths around (prompt, completion): TL;DR (300,
30), HH (120, 90) and UltraFeedback (150, 280). Their spread is chosen so that 44, 38 and 37 % of
the positions of eight pairs are distinct on average. Their tokens are random; ``--hh`` reads a file
of HH-RLHF, with a tokenizer trained on it. The models are Llamas with random weights, which is
sufficient to measure speed and memory.

Both variants start from the same weights, receive the same batches and report their losses. The
first to run alternates with each of ``--rounds``. The variant ``shared`` does what Align's stages
do: prefix sharing and, on a CPU, small tiles in TRL's head. The reference runs in each step of both
variants. One warm-up step is not counted. Memory is the maximum resident size during the steps of a
variant (``VmHWM``, reset before each), or CUDA's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PrinterCallback,
    TrainerCallback,
)

from align.config.data import Prepare
from align.data.prepare import prepare
from align.models import logps, tokenization
from align.models.prefix_sharing import wrapper
from align.runtime import distributed

# Mean lengths of prompt and completion, and the spread of their logarithms.
SHAPES = {"TL;DR": (300, 30, 0.16), "HH": (120, 90, 0.57), "UltraFeedback": (150, 280, 0.67)}
KINDS = {"dpo": "DPO", "sft": "SFT", "reward": "Reward", "kto": "KTO"}
TRAINERS = tuple(kind + suffix for kind in KINDS for suffix in ("", "-lora"))


@dataclass
class Variant:
    """Measurements of one of the two variants."""

    trainer: Any
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    computed: int = 0
    memory: int = 0


def rows(
    shape: tuple[int, int, float], pairs: int, seed: int, vocabulary: int
) -> list[dict[str, str]]:
    """Pairs of random tokens, as texts for the tokenizer below."""
    generator = random.Random(seed)
    spread = shape[2]

    def text(mean: int) -> str:
        length = max(2, round(generator.lognormvariate(math.log(mean) - spread**2 / 2, spread)))
        return "".join(f"<t{generator.randrange(300, vocabulary)}>" for _ in range(length))

    return [
        {"prompt": text(shape[0]), "chosen": text(shape[1]), "rejected": text(shape[1])}
        for _ in range(pairs)
    ]


def tokenizer(vocabulary: int) -> Any:
    """A tokenizer with one token for each ``<t123>``."""
    from tokenizers import AddedToken

    new = tokenization.new_tokenizer(["a"], vocab_size=264, max_length=100_000)
    new.add_tokens([AddedToken(f"<t{i}>", normalized=False) for i in range(300, vocabulary)])
    return new


def hh(file: Path, vocabulary: int) -> tuple[list[dict[str, Any]], Any]:
    """Shuffled pairs of a file of HH-RLHF as conversations, and a tokenizer trained on them."""
    prepared = prepare(Prepare(source=str(file), reader="hh", test_fraction=0.0))
    pairs = prepared.tables()["pairs"]["train"]
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs]
    texts = (m["content"] for row in rows for part in row.values() for m in part)
    random.Random(0).shuffle(rows)
    return rows, tokenization.new_tokenizer(texts, vocab_size=vocabulary, max_length=100_000)


class Clock(TrainerCallback):
    """Measures the seconds of each step, including the optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock when the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)


def size_for(device: str, size: int) -> int:
    """A size of a weight: on a GPU, whose kernels need it, the next multiple of 128."""
    return size if device == "cpu" else math.ceil(size / 128) * 128


def build(kind: str, share: bool, texts: list[dict[str, Any]], tokens: Any, args: Any) -> Any:
    """Build a trainer of TRL, with prefix sharing if ``share``."""
    kind, _, lora = kind.partition("-")
    name = KINDS[kind]
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=size_for(args.device, len(tokens)), hidden_size=args.width,
        intermediate_size=size_for(args.device, args.width * 8 // 3), num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, max_position_embeddings=8192, pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    kinds = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    with torch.device(args.device):
        policy = kinds.from_config(config, dtype=getattr(torch, args.dtype))
    options: dict[str, Any] = {}
    if kind in ("dpo", "kto") and not lora:
        with torch.device(args.device):
            options["ref_model"] = kinds.from_config(config, dtype=getattr(torch, args.dtype))
        options["ref_model"].load_state_dict(policy.state_dict())
    if lora:
        task = (
            "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
        )  # the former trains the score head too
        options["peft_config"] = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type=task
        )
    if kind == "sft":
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in texts]
    if kind == "kto":
        texts = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in texts
            for side in ("chosen", "rejected")
        ]
    size = args.pairs * (2 if kind == "kto" else 1)
    arguments = getattr(trl, f"{name}Config")(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, max_steps=args.steps + 1, learning_rate=args.learning_rate,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=args.device == "cpu", seed=args.seed,
        bf16=False, gradient_checkpointing=args.checkpointing, max_length=None, dataloader_pin_memory=args.device != "cpu",
        **({"train_sampling_strategy": "sequential"} if not args.shuffle else {}),
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokens,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    if share:
        wrapper.enable_prefix_sharing(trainer.model, getattr(trainer, "ref_model", None))
    return trainer


def peak(reset: bool, device: str) -> int:
    """Peak memory since the last reset, in bytes."""
    if device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak_bytes
    status = Path("/proc/self/status").read_text().splitlines()
    peak_bytes = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes


def measure(kind: str, data: list[dict[str, Any]], tokens: Any, args: Any) -> dict[str, Any]:
    """Measure both variants ``args.rounds`` times, alternating."""
    variants = {"trl": Variant(None), "shared": Variant(None)}
    for round_ in range(args.rounds):
        for name in list(variants)[:: 1 if round_ % 2 == 0 else -1]:
            variant, clock = variants[name], Clock()
            distributed.reset_process_state(args.seed)
            trainer = build(kind, name == "shared", data, tokens, args)
            trainer.add_callback(clock)
            inner = trainer.model.get_base_model() if "lora" in kind else trainer.model
            seen: list[int] = []
            inner.base_model.layers[0].register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0].shape[:2].numel())
            )
            peak(True, args.device)
            with logps.small_vocabulary_tiles() if name == "shared" else contextlib.nullcontext():
                trainer.train()
            variant.memory = max(variant.memory, peak(True, args.device))
            variant.seconds += clock.seconds[1:]
            variant.losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
            variant.computed = sum(seen)
            del trainer, inner
    plain, shared = variants["trl"], variants["shared"]
    steps = [statistics.median(variant.seconds) for variant in (plain, shared)]
    totals = [sum(variant.seconds) for variant in (plain, shared)]
    return {
        "trainer": kind,
        "tokens": shared.computed / plain.computed,
        "seconds": [total / args.rounds for total in totals],
        "median_step": steps,
        "samples_per_second": [args.pairs * args.steps * args.rounds / total for total in totals],
        "ratio": totals[0] / totals[1],
        "memory_gib": [variant.memory / 2**30 for variant in (plain, shared)],
        "losses": [plain.losses, shared.losses],
        "loss_difference": max(
            abs(a - b) for a, b in zip(plain.losses, shared.losses, strict=True)
        ),
    }


def main() -> None:
    """Read the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small model, two steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=8, help="pairs per batch")
    parser.add_argument("--steps", type=int, help="steps per round, after one warm-up step; 2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trainers", nargs="*", choices=TRAINERS, default=["dpo", "dpo-lora", "sft", "reward", "kto"])  # fmt: skip
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--hh", type=Path, help="a file of HH-RLHF, in addition to the shapes")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument(
        "--shuffle", action="store_true", help="TRL's sampling instead of sequential rows"
    )
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if args.quick:
        args.layers, args.width, args.vocabulary, args.pairs = 4, 128, 2048, 4
    args.steps = args.steps or 2
    n = args.pairs * (args.steps + 1)
    random_sets = [
        (s, rows(SHAPES[s], n, args.seed, args.vocabulary), tokenizer) for s in args.shapes
    ]
    sets = {name: (data, make(args.vocabulary)) for name, data, make in random_sets}
    if args.hh:
        data, tokens = hh(args.hh, args.vocabulary)
        sets[args.hh.name.partition(".")[0]] = data[:n], tokens
    results = []
    print(f"{'shape':18} {'trainer':11} {'tokens':>6} {'TRL s':>8} {'shared s':>8} {'ratio':>6} {'samples/s':>15} {'GiB':>12} {'loss ±':>8}")  # fmt: skip
    for shape, (data, tokens) in sets.items():
        for kind in args.trainers:
            result = measure(kind, data, tokens, args) | {"shape": shape}
            results.append(result)
            a, b = result["seconds"]
            s, t = result["samples_per_second"]
            m, n = result["memory_gib"]
            print(f"{shape:18} {kind:11} {result['tokens']:6.2f} {a:8.2f} {b:8.2f} {result['ratio']:6.2f} {s:6.2f} → {t:6.2f} {m:5.2f} {n:6.2f} {result['loss_difference']:8.1e}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
