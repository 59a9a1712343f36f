r"""Speed of TRL's trainers with and without prefix sharing, all at their best, alternating.

    python benchmarks/prefix_sharing.py --quick                      # a check, under a minute
    python benchmarks/prefix_sharing.py                              # one core, about ten minutes
    python benchmarks/prefix_sharing.py --layers 8 --trainers dpo    # 20 M parameters
    python benchmarks/prefix_sharing.py --shapes --hh harmless-base-test.jsonl.gz
    python benchmarks/prefix_sharing.py --quick --steps 20 --learning-rate 1e-3 \
        --trainers dpo dpo-lora sft reward kto
    python benchmarks/prefix_sharing.py --device cuda --dtype bfloat16 --layers 24 --width 1024 \
        --pairs 16 --steps 8 --sides trl trl+liger shared shared+liger shared+compile --largest

There are three shapes of data, with log-normal lengths around (prompt, completion): TL;DR (300,
30), HH (120, 90) and UltraFeedback (150, 280). Their spread is chosen so that 44, 38 and 37 % of
the positions of eight pairs are distinct on average. Their tokens are random; ``--hh`` reads a file
of HH-RLHF, with a tokenizer trained on it. The models are Llamas with random weights, which is
sufficient to measure speed and memory; on a GPU their sizes are multiples of 128.

All sides start from the same weights, receive the same batches and report their losses. The first
to run alternates with each of ``--rounds``. A side is ``trl`` (TRL without changes) or ``shared``
(what Align's stages do: prefix sharing, adapter inputs left to autocast and, on a CPU, small tiles
in TRL's head), with ``+liger`` for Liger's kernels, which need a GPU, and ``+compile`` for compiled
layers. The reference runs in each step of all sides. The first step of a round, which compiles, is
not counted and has its own column. ``seconds`` is wall-clock time, the median of a step; ``cpu`` is
processor time, which other programs on the machine disturb less. Memory is the maximum resident
size during the steps of a side (``VmHWM``, reset before each), or CUDA's.

``--largest`` doubles the pairs of each side until its memory is full, on a GPU only. MFU counts the
matrix products of the layers over distinct tokens, the same for all sides: 6 operations per weight
and token with gradients (4 with LoRA) and 2 without, divided by ``--peak-tflops``. Products of
attention and of the head are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
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
from align.models import adapters, logps, tokenization
from align.models.prefix_sharing import wrapper
from align.runtime import distributed
from align.training import speed

# Mean lengths of prompt and completion, and the spread of their logarithms.
SHAPES = {"TL;DR": (300, 30, 0.16), "HH": (120, 90, 0.57), "UltraFeedback": (150, 280, 0.67)}
KINDS = {"dpo": "DPO", "sft": "SFT", "reward": "Reward", "kto": "KTO"}
TRAINERS = tuple(kind + suffix for kind in KINDS for suffix in ("", "-lora"))
SIDES = ("trl", "trl+liger", "trl+compile", "shared", "shared+liger", "shared+compile")


@dataclass
class Side:
    """Measurements of one of the sides."""

    first: list[float] = field(default_factory=list)
    """Seconds of the first step of each round, which compiles."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of the other steps."""
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    trained: int = 0
    """Token positions that the layers of the policy computed with gradients."""
    forward_only: int = 0
    """Token positions computed without gradients, in the reference too."""
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
        self.cpu: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock when the device has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin[0])
        self.cpu.append(time.process_time() - self.begin[1])


def size_for(device: str, size: int) -> int:
    """A size of a weight: on a GPU, whose kernels need it, the next multiple of 128."""
    return size if device == "cpu" else math.ceil(size / 128) * 128


def build(kind: str, side: str, texts: list[dict[str, Any]], tokens: Any, args: Any) -> Any:
    """Build a trainer of TRL, with what the side adds to it."""
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
        bf16=False, use_liger_kernel="liger" in side, gradient_checkpointing=args.checkpointing, max_length=None, dataloader_pin_memory=args.device != "cpu",
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
    models = (trainer.model, getattr(trainer, "ref_model", None))
    if "shared" in side:
        wrapper.enable_prefix_sharing(*models)
        if trainer.accelerator.mixed_precision != "no":
            adapters.leave_casts_to_autocast(trainer.model)
    for model in filter(None, models if "compile" in side else ()):
        speed.compile_layers(model, backend=args.backend)
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


def count_tokens(trainer: Any, side: Side) -> None:
    """Count the token positions that the layers compute, once per forward pass."""

    def count(_: Any, inputs: Any) -> None:
        positions = inputs[0].shape[:2].numel()
        if torch.is_grad_enabled():
            side.trained += positions
        else:
            side.forward_only += positions

    for model in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        # It is called once per pass, is not compiled, and its hooks do not prevent sharing.
        inner.base_model.rotary_emb.register_forward_pre_hook(count)


def run(kind: str, name: str, side: Side, sets: tuple[Any, Any], args: Any) -> None:
    """Train a side for one round, and add what was measured."""
    clock = Clock()
    distributed.reset_process_state(args.seed)
    torch._dynamo.reset()
    trainer = build(kind, name, *sets, args)
    trainer.add_callback(clock)
    side.trained = side.forward_only = 0
    count_tokens(trainer, side)
    peak(True, args.device)
    with logps.small_vocabulary_tiles() if "shared" in name else contextlib.nullcontext():
        trainer.train()
    side.memory = max(side.memory, peak(True, args.device))
    side.first += clock.seconds[:1]
    side.seconds += clock.seconds[1:]
    side.cpu += clock.cpu[1:]
    side.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure(kind: str, data: list[dict[str, Any]], tokens: Any, args: Any) -> dict[str, Side]:
    """Measure all sides ``args.rounds`` times, alternating."""
    sides = {name: Side() for name in args.sides}
    for round_ in range(args.rounds):
        for name in args.sides[:: 1 if round_ % 2 == 0 else -1]:
            run(kind, name, sides[name], (data, tokens), args)
            gc.collect()
    return sides


def largest(kind: str, name: str, sets: tuple[Any, Any], args: Any) -> tuple[int, Side]:
    """The largest number of pairs that fits into memory, by doubling, and its measurement."""
    data, tokens = sets
    best = (0, Side())
    for factor in (2**k for k in range(1, 20)):
        more = argparse.Namespace(**vars(args) | {"pairs": factor * args.pairs, "rounds": 1})
        side = Side()
        try:
            run(kind, name, side, (data * factor, tokens), more)
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        best = (more.pairs, side)
    return best


def layer_weights(args: Any) -> int:
    """Weights of the matrix products of all layers."""
    width = args.width
    return args.layers * (4 * width**2 + 3 * width * size_for(args.device, width * 8 // 3))


def summarize(
    kind: str, name: str, pairs: int, side: Side, sides: dict[str, Side], args: Any
) -> dict[str, Any]:
    """The numbers of a row; ``sides`` are those at ``args.pairs``, the first one for comparison."""
    plain = next(iter(sides.values()))
    shared = next((each for key, each in sides.items() if "shared" in key), plain)
    step, plain_step = (statistics.median(each.seconds) for each in (side, plain))
    cpu, plain_cpu = (statistics.median(each.cpu) for each in (side, plain))
    factor = 4 if "lora" in kind else 6
    tokens = (factor * shared.trained + 2 * shared.forward_only) / (args.steps + 1) / args.pairs
    operations = tokens * pairs * layer_weights(args)
    computed, plain_computed = (each.trained + each.forward_only for each in (side, plain))
    assert "shared" not in name or pairs != args.pairs or computed < plain_computed, "not shared"
    differences = [abs(a - b) for a, b in zip(plain.losses, side.losses, strict=True)]
    return {
        "trainer": kind,
        "side": name,
        "pairs": pairs,
        "tokens": computed / pairs * args.pairs / plain_computed,
        "first_step": statistics.median(side.first),
        "seconds": step,
        "cpu": cpu,
        "pairs_per_second": pairs / step,
        "ratio": pairs / step / (args.pairs / plain_step),
        "cpu_ratio": pairs / cpu / (args.pairs / plain_cpu),
        "memory_gib": side.memory / 2**30,
        "mfu": operations / step / (args.peak_tflops * 1e12) if args.peak_tflops else None,
        "losses": side.losses,
        "loss_difference": max(differences) if pairs == args.pairs else None,
    }


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
    loss = "–" if row["loss_difference"] is None else f"{row['loss_difference']:.0e}"
    print(
        f"| {row['shape']} | {row['trainer']} | {row['side']} | {row['pairs']} | {row['tokens']:.2f} "
        f"| {row['first_step']:.2f} | {row['seconds']:.3f} | {row['cpu']:.3f} "
        f"| {row['pairs_per_second']:.2f} | {row['ratio']:.2f} | {row['cpu_ratio']:.2f} "
        f"| {row['memory_gib']:.2f} | {mfu} | {loss} |",
        flush=True,
    )


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
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=["trl", "shared"])
    parser.add_argument("--backend", default="inductor", help="of compiled layers")
    parser.add_argument(
        "--largest", action="store_true", help="each side's largest batch, on a GPU"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the card, such as 989 for an H100")
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
        if args.largest or any("liger" in side for side in args.sides):
            parser.error("--largest and Liger's kernels need --device cuda")
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
    results: list[dict[str, Any]] = []
    print("| shape | trainer | side | pairs | tokens | first step, s | step, s | step, cpu s | pairs/s | ratio | cpu ratio | GiB | MFU | loss ± |")  # fmt: skip
    print("|" + "---|" * 14)
    for shape, (data, tokens) in sets.items():
        for kind in args.trainers:
            sides = measure(kind, data, tokens, args)
            sizes = [(name, args.pairs, side) for name, side in sides.items()]
            for name in args.sides if args.largest else ():
                sizes.append((name, *largest(kind, name, (data, tokens), args)))
            for name, pairs, side in sizes:
                if pairs:
                    row = summarize(kind, name, pairs, side, sides, args) | {"shape": shape}
                    results.append(row)
                    print_row(row)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
