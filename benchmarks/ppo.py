r"""Benchmark of PPO against the last PPOTrainer of TRL, and of its memory against SFT with LoRA.

    python benchmarks/ppo.py --peer trl-ppo/bin/python            # the environment: see trl_ppo.py
    python benchmarks/ppo.py --peer trl-ppo/bin/python --prompt 40 --vocabulary 1000 --quick
    python benchmarks/ppo.py                                      # Align and the memory only
    python benchmarks/ppo.py --device cuda --precision bfloat16 --layers 24 --width 1024 \
        --batch 64 --micro 16 --response 128 --updates 4

Both sides get the same folders: a random Llama as policy, and another as reward model. With LoRA,
Align's reward model is an adapter on the policy's base (one backbone); TRL's is a separate model,
the only kind that it supports. Both get the same prompts as token ids, each repeated
``--per-prompt`` times, and the same settings: episodes per update, micro-batches, epochs, one
optimizer step per epoch, clips, learning rate, temperature and length limit. A random policy hardly
ever samples eos, so both generate equally many tokens.

Each run is a separate process: one update to warm up, then the timed ones. The order of the sides
alternates between ``--rounds``. Seconds are wall-clock time; on shared cores, ``cpu`` (processor
seconds) is the fairer number. Memory is the peak resident size during training (``VmHWM``) with
libraries, and in brackets without the size before the models were loaded; with ``--device cuda`` it
is what torch allocated on the GPU. Every part of an update ends with a copy to the host, so the
parts are apart on a GPU too. On a GPU, sizes are multiples of 128, and ``--precision bfloat16`` is
mixed precision with float32 weights on both sides. The GPU path was not run yet.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write policy, reward model, prompts as rows and ids, and demonstrations of similar length."""
    import torch
    from tokenizers import AddedToken
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from align.data.tables import TableWriter
    from align.models import tokenization
    from align.rewards import reward_model

    tokenizer = tokenization.new_tokenizer(["a"], vocab_size=264, max_length=100_000)
    tokens = [AddedToken(f"<t{i}>", normalized=False) for i in range(300, args.vocabulary)]
    tokenizer.add_tokens(tokens)
    torch.manual_seed(0)
    multiple = 1 if args.device == "cpu" else 128
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / multiple) * multiple,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // multiple * multiple,
        num_hidden_layers=args.layers,
        num_attention_heads=max(2, args.width // 64),
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
    for name, kind in (
        ("policy", LlamaForCausalLM),
        ("reward", LlamaForSequenceClassification),
    ):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(str(folder / name))
    adapter = reward_model.new_reward_model(
        folder / "policy", lora=LORA | {"dropout": 0.0}, dtype="float32"
    )
    adapter.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(str(folder / "adapter"))
    draw = random.Random(0)

    def random_words(mean: int) -> str:
        length = max(2, round(draw.lognormvariate(math.log(mean), 0.16)))
        return "".join(f"<t{draw.randrange(300, args.vocabulary)}>" for _ in range(length))

    rows = []
    for k in range(args.batch * (args.updates + 2)):
        prompt = [{"role": "user", "content": random_words(args.prompt)}]
        completion = [{"role": "assistant", "content": random_words(args.response)}]
        rows.append({"prompt": prompt, "completion": completion, "prompt_id": str(k)})
    for name, keys in (
        ("demonstrations", ("prompt", "completion", "prompt_id")),
        ("prompts", ("prompt", "prompt_id")),
    ):
        writer = TableWriter(folder / f"{name}-train.parquet")
        for row in rows:
            writer.add({key: row[key] for key in keys})
        writer.close()
    ids = tokenization.tokenize_prompts(tokenizer, [row["prompt"] for row in rows])
    repeated = [row for row in ids for _ in range(args.per_prompt)]
    (folder / "prompts.json").write_text(json.dumps(repeated))


def peer_settings(folder: Path, args: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """Settings of both sides, by TRL's names."""
    return {
        "policy": str(folder / "policy"),
        "reward": str(folder / "reward"),
        "prompts": str(folder / "prompts.json"),
        "response_length": args.response,
        "temperature": 0.7,
        "kl_coef": 0.05,
        "cliprange": 0.2,
        "vf_coef": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "batch_size": args.batch,
        "micro_batch_size": args.micro,
        "rollout_batch_size": args.batch,
        "updates": args.updates,
        "learning_rate": 3e-6,
        "seed": 0,
        "lora": LORA if lora else None,
        "per_prompt": args.per_prompt,
        "device": args.device,
        "precision": args.precision,
    }


def run_align(settings: dict[str, Any]) -> dict[str, Any]:
    """Run Align in this process."""
    from align.config.online_rl_stages import PPO
    from align.models import logps
    from align.online_rl.trainer import OnlineRLTrainer
    from align.runtime import distributed, environment
    from align.runtime.progress import Logger, NullDisplay

    environment.quiet_libraries()
    start = _used(settings["device"])
    distributed.init_process_group()
    distributed.reset_process_state(settings["seed"])
    lora = settings["lora"]
    config = PPO(
        model="policy",
        rewards=["reward"],
        steps=settings["updates"] + 1,
        batch_size=settings["batch_size"],
        n_completions=settings["per_prompt"],
        temperature=settings["temperature"],
        max_new_tokens=settings["response_length"],
        kl_coef=settings["kl_coef"],
        clip=settings["cliprange"],
        value_clip=0.2,
        value_coef=settings["vf_coef"],
        gamma=settings["gamma"],
        gae_lambda=settings["lam"],
        epochs=settings["num_ppo_epochs"],
        minibatches=settings["num_mini_batches"],
        micro_batch_size=settings["micro_batch_size"],
        sample_batch_size=settings["rollout_batch_size"],
        learning_rate=settings["learning_rate"],
        schedule="constant",
        mixed_precision=settings["precision"],
        lora=lora and {"r": lora["r"], "alpha": lora["alpha"]},
        seed=settings["seed"],
        save_steps=10**6,
    )
    data = Path(settings["prompts"]).parent
    reward = str(data / "adapter") if lora else settings["reward"]
    inputs = {"model": settings["policy"], "prompts": data, "rewards.0": reward}
    with tempfile.TemporaryDirectory() as folder:
        display = NullDisplay()
        logger = Logger("ppo", Path(folder), display, main=True)
        display.start("ppo", Path(folder), "")
        trainer = OnlineRLTrainer(config, inputs, Path(folder), logger)
        _reset_peak(settings["device"])

        with logps.small_vocabulary_tiles():
            trainer.step(0)
            started, cpu = time.perf_counter(), time.process_time()
            steps = []
            for step in range(1, config.steps):
                trainer.step(step)
                steps.append(trainer.metrics)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    sampling, scoring, whole = (
        sum(step[key] for step in steps)
        for key in ("seconds_sampling", "seconds_scoring", "seconds")
    )
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parts": {"generation": sampling, "scoring": scoring, "update": whole - sampling - scoring},
        "response_tokens": statistics.mean(step["tokens"] for step in steps),
        "peak_bytes": _peak(settings["device"]),
        "start_bytes": start,
    }


def run_sft(settings: dict[str, Any]) -> dict[str, Any]:
    """Run SFT with LoRA on rows of the same length and batch size, without prefix sharing."""
    from align.config.training import SFT
    from align.runtime import distributed, environment
    from align.runtime.progress import Logger, NullDisplay
    from align.stages import sft

    environment.quiet_libraries()
    start = _used(settings["device"])
    distributed.init_process_group()
    distributed.reset_process_state(0)
    config = SFT(
        model="policy",
        prefix_sharing=False,
        lora={"r": LORA["r"], "alpha": LORA["alpha"]},
        trainer={
            "per_device_train_batch_size": settings["micro_batch_size"],
            "max_steps": 4,
            "bf16": settings["precision"] is not None,
            "gradient_checkpointing": False,
            "max_length": 4096,
            "save_strategy": "no",
        },
    )
    inputs = {"model": settings["policy"], "demonstrations": Path(settings["prompts"]).parent}
    with tempfile.TemporaryDirectory() as folder:
        display = NullDisplay()
        display.start("sft", Path(folder), "")
        _reset_peak(settings["device"])
        sft.run(config, inputs, Path(folder), Logger("sft", Path(folder), display, main=True))
    return {"peak_bytes": _peak(settings["device"]), "start_bytes": start}


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _used(device: str) -> int:
    """Memory that is used before the models are loaded, in bytes."""
    return _resident("VmRSS") if device == "cpu" else 0


def _peak(device: str) -> int:
    """Highest memory since the last reset, in bytes."""
    import torch

    return _resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _reset_peak(device: str) -> None:
    import torch

    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def launch(command: list[str]) -> dict[str, Any]:
    """Run a command in a separate process; returns the JSON of its last line."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Write the inputs, run all sides, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", help="the Python of an environment with TRL's last PPOTrainer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-prompt", type=int, default=4, help="completions per prompt")
    parser.add_argument("--prompt", type=int, default=300, help="mean tokens; TL;DR's by default")
    parser.add_argument("--response", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32, help="episodes per update")
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bfloat16",), help="mixed precision; float32")
    parser.add_argument("--quick", action="store_true", help="one round of one update")
    parser.add_argument("--only", choices=["align", "sft"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        settings = json.loads(args.settings.read_text())
        if settings["device"] == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        run = run_align if args.only == "align" else run_sft
        print(json.dumps(run(settings)))
        return
    if args.quick:
        args.rounds, args.updates = 1, 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, args)
        for name in ("full", "lora"):
            settings = peer_settings(folder, args, lora=name == "lora")
            (folder / f"{name}.json").write_text(json.dumps(settings))
            settings.pop("per_prompt")  # the file of prompts repeats each prompt as often
            (folder / f"{name}-peer.json").write_text(json.dumps(settings))
        compare(folder, args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Run both sides in alternating order, and print their speed and memory."""
    here = [sys.executable, str(Path(__file__).resolve()), "--only"]
    sides = {
        "Align": lambda name: launch([*here, "align", "--settings", str(folder / f"{name}.json")])
    }
    if args.peer:
        peer = str(Path(__file__).with_name("trl_ppo.py"))
        sides["TRL"] = lambda name: launch([args.peer, peer, str(folder / f"{name}-peer.json")])
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for k in range(args.rounds):
        for name in ("full", "lora"):
            for side in list(sides)[:: 1 if k % 2 else -1]:
                results.setdefault((name, side), []).append(sides[side](name))
    print_table(results, n_episodes=args.batch * args.updates)
    sft = [
        launch([*here, "sft", "--settings", str(folder / "lora.json")]) for _ in range(args.rounds)
    ]
    print_ratios(results, sft)


def print_table(results: dict[tuple[str, str], list[dict[str, Any]]], n_episodes: int) -> None:
    """Print medians over the rounds as a Markdown table."""
    print(
        "| weights | side | episodes/s | rounds | cpu s/episode | sampling, scoring, update (s) "
        "| tokens | peak, GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (name, side), runs in sorted(results.items()):
        speeds = sorted(n_episodes / r["seconds"] for r in runs)
        parts = [
            statistics.median(r["parts"][p] for r in runs)
            for p in ("generation", "scoring", "update")
        ]
        print(
            f"| {name} | {side} | {statistics.median(speeds):.2f} "
            f"| {', '.join(f'{s:.2f}' for s in speeds)} "
            f"| {statistics.median(r['cpu_seconds'] for r in runs) / n_episodes:.3f} "
            f"| {', '.join(f'{p:.1f}' for p in parts)} "
            f"| {statistics.mean(r['response_tokens'] for r in runs):.1f} | {_memory(runs)} |"
        )


def print_ratios(
    results: dict[tuple[str, str], list[dict[str, Any]]], sft: list[dict[str, Any]]
) -> None:
    """Print the memory of PPO on one backbone relative to SFT, and TRL relative to Align."""
    print(f"\nSFT with LoRA, the same micro-batch: peak {_memory(sft)} GiB")
    whole, net = (
        statistics.median(r["peak_bytes"] - k * r["start_bytes"] for r in results["lora", "Align"])
        / statistics.median(r["peak_bytes"] - k * r["start_bytes"] for r in sft)
        for k in (0, 1)
    )
    print(f"PPO on one backbone / SFT with LoRA: {whole:.2f} (without libraries: {net:.2f})")
    for name in ("full", "lora"):
        if (name, "TRL") in results:
            ratios = {
                key: statistics.median(r[key] for r in results[name, "TRL"])
                / statistics.median(r[key] for r in results[name, "Align"])
                for key in ("seconds", "cpu_seconds", "peak_bytes")
            }
            print(f"TRL / Align, {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))


def _memory(runs: list[dict[str, Any]]) -> str:
    peak = statistics.median(r["peak_bytes"] for r in runs) / 2**30
    net = statistics.median(r["peak_bytes"] - r["start_bytes"] for r in runs) / 2**30
    return f"{peak:.2f} ({net:.2f})"


if __name__ == "__main__":
    main()
