"""Our PPO against the last PPOTrainer of TRL, in turns; and the memory of one backbone against SFT with LoRA.

    python benchmarks/ppo.py --peer trl-ppo/bin/python            # that environment: see trl_ppo.py
    python benchmarks/ppo.py --peer trl-ppo/bin/python --prompt 40 --vocabulary 1000 --quick
    python benchmarks/ppo.py                                      # our side and the memory alone

Both sides get the same folders (a Llama of random weights as policy, another as reward model; with LoRA, ours has its reward
model as an adapter on the policy's base, which is what one backbone is, and TRL has it whole, as it only can), the same prompts as token
ids, each as often as it is completed (``--per-prompt``), and the same settings: episodes an update, micro-batches, epochs, one optimizer step an epoch, clips, learning rate,
temperature and length limit; a random policy hardly ever ends by itself, so both write as many tokens. Each run is a process
of its own: one update to warm up, then the timed ones. Who goes first changes with each of ``--rounds``. Seconds are those
of the clock; where the cores are shared, ``cpu`` (processor seconds) is the fairer figure. Memory is the highest resident
size while training (``VmHWM``), libraries included, and in brackets without what was there before the models were loaded.
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
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


def make(folder: Path, args: argparse.Namespace) -> None:
    """Policy, reward model, prompts as rows and as ids, and demonstrations of like length."""
    import torch
    from tokenizers import AddedToken
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from align.data.tables import TableWriter
    from align.models import tokenization
    from align.rewards import reward_model

    tokenizer = tokenization.new_tokenizer(["a"], vocab_size=264, max_length=100_000)
    words = [AddedToken(f"<t{i}>", normalized=False) for i in range(300, args.vocabulary)]
    tokenizer.add_tokens(words)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=max(2, args.width // 64), max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, num_labels=1,
    )  # fmt: skip
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

    def some(mean: int) -> str:
        length = max(2, round(draw.lognormvariate(math.log(mean), 0.16)))
        return "".join(f"<t{draw.randrange(300, args.vocabulary)}>" for _ in range(length))

    rows = []
    for k in range(args.batch * (args.updates + 2)):
        prompt = [{"role": "user", "content": some(args.prompt)}]
        completion = [{"role": "assistant", "content": some(args.response)}]
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
    each = [row for row in ids for _ in range(args.per_prompt)]
    (folder / "prompts.json").write_text(json.dumps(each))


def settings(folder: Path, args: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """What both sides are told, by TRL's names."""
    return {
        "policy": str(folder / "policy"), "reward": str(folder / "reward"), "prompts": str(folder / "prompts.json"),
        "response_length": args.response, "temperature": 0.7, "kl_coef": 0.05, "cliprange": 0.2, "vf_coef": 0.1,
        "gamma": 1.0, "lam": 0.95, "num_ppo_epochs": 4, "num_mini_batches": 1, "batch_size": args.batch,
        "micro_batch_size": args.micro, "rollout_batch_size": args.batch, "updates": args.updates,
        "learning_rate": 3e-6, "seed": 0, "lora": LORA if lora else None, "per_prompt": args.per_prompt,
    }  # fmt: skip


def ours(told: dict[str, Any]) -> dict[str, Any]:
    """Our side, in this process."""
    from align.config.ppo import PPO
    from align.models import logps
    from align.online_rl import trainer
    from align.runtime import distributed, environment
    from align.runtime.progress import Logger, NullDisplay

    environment.quiet_libraries()
    start = _resident("VmRSS")
    distributed.init_process_group()
    distributed.reset_process_state(told["seed"])
    lora = told["lora"]
    chosen = PPO(
        model="policy", rewards=["reward"], steps=told["updates"] + 1, batch_size=told["batch_size"],
        n_completions=told["per_prompt"], temperature=told["temperature"], max_new_tokens=told["response_length"], kl_coef=told["kl_coef"],
        clip=told["cliprange"], value_clip=0.2, value_coef=told["vf_coef"], gamma=told["gamma"], gae_lambda=told["lam"],
        epochs=told["num_ppo_epochs"], minibatches=told["num_mini_batches"], micro_batch_size=told["micro_batch_size"],
        sample_batch_size=told["rollout_batch_size"], learning_rate=told["learning_rate"], schedule="constant",
        lora=lora and {"r": lora["r"], "alpha": lora["alpha"]}, seed=told["seed"], save_steps=10**6,
    )  # fmt: skip
    data = Path(told["prompts"]).parent
    reward = str(data / "adapter") if lora else told["reward"]
    inputs = {"model": told["policy"], "prompts": data, "rewards.0": reward}
    with tempfile.TemporaryDirectory() as folder:
        display = NullDisplay()
        logger = Logger("ppo", Path(folder), display, main=True)
        display.start("ppo", Path(folder), "")
        learner = trainer.build_trainer(chosen, inputs, Path(folder), logger)
        _reset_peak()

        with logps.small_vocabulary_tiles():
            learner.step(0)
            began, cpu = time.perf_counter(), time.process_time()
            parts = []
            tokens = []
            for step in range(1, chosen.steps):
                learner.step(step)
                parts.append(
                    [learner.latest[k] for k in ("seconds_sampling", "seconds_scoring", "seconds")]
                )
                tokens.append(learner.latest["tokens"])
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    sampling, scoring, whole = (sum(column) for column in zip(*parts, strict=True))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parts": {"generation": sampling, "scoring": scoring, "update": whole - sampling - scoring},
        "response_tokens": statistics.mean(tokens),
        "peak_bytes": _resident("VmHWM"),
        "start_bytes": start,
    }


def sft(told: dict[str, Any]) -> dict[str, Any]:
    """SFT with LoRA by TRL's trainer on rows of the same length and as many of them at once, without our sharing."""
    from align.config.training import SFT
    from align.runtime import distributed, environment
    from align.runtime.progress import Logger, NullDisplay
    from align.stages.sft import run

    environment.quiet_libraries()
    start = _resident("VmRSS")
    distributed.init_process_group()
    distributed.reset_process_state(0)
    knobs = {
        "per_device_train_batch_size": told["micro_batch_size"], "max_steps": 4, "bf16": False,
        "gradient_checkpointing": False, "max_length": 4096, "save_strategy": "no",
    }  # fmt: skip
    chosen = SFT(
        model="policy",
        prefix_sharing=False,
        lora={"r": LORA["r"], "alpha": LORA["alpha"]},
        trainer=knobs,
    )
    with tempfile.TemporaryDirectory() as folder:
        display = NullDisplay()
        display.start("sft", Path(folder), "")
        _reset_peak()
        run(
            chosen,
            {"model": told["policy"], "demonstrations": Path(told["prompts"]).parent},
            Path(folder),
            Logger("sft", Path(folder), display, main=True),
        )
    return {"peak_bytes": _resident("VmHWM"), "start_bytes": start}


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def launch(command: list[str]) -> dict[str, Any]:
    """One run in a process of its own: its last line."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Make, run in turns, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", help="the Python of an environment with TRL's last PPOTrainer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-prompt", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--prompt", type=int, default=300, help="mean tokens; TL;DR's by default")
    parser.add_argument("--response", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32, help="episodes an update")
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--quick", action="store_true", help="one round of one update")
    parser.add_argument("--only", choices=["ours", "sft"], help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        told = json.loads(args.settings.read_text())
        print(json.dumps(ours(told) if args.only == "ours" else sft(told)))
        return
    if args.quick:
        args.rounds, args.updates = 1, 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, args)
        for name in ("full", "lora"):
            told = settings(folder, args, lora=name == "lora")
            (folder / f"{name}.json").write_text(json.dumps(told))
            told.pop("per_prompt")  # the peer's prompts stand as often as they are completed
            (folder / f"{name}-peer.json").write_text(json.dumps(told))
        compare(folder, args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Run both sides in turns and print what they took."""
    here = [sys.executable, str(Path(__file__).resolve()), "--only"]
    sides = {
        "ours": lambda name: launch([*here, "ours", "--settings", str(folder / f"{name}.json")])
    }
    if args.peer:
        peer = str(Path(__file__).with_name("trl_ppo.py"))
        sides["TRL"] = lambda name: launch([args.peer, peer, str(folder / f"{name}-peer.json")])
    episodes = args.batch * args.updates
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for k in range(args.rounds):
        order = list(sides)[:: 1 if k % 2 else -1]
        for name in ("full", "lora"):
            for side in order:
                found.setdefault((name, side), []).append(sides[side](name))
    print(
        "| weights | side | episodes/s | rounds | cpu s/episode | sampling, scoring, update (s) | tokens | peak, GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (name, side), runs in sorted(found.items()):
        speeds = sorted(episodes / r["seconds"] for r in runs)
        parts = [
            statistics.median(r["parts"][p] for r in runs)
            for p in ("generation", "scoring", "update")
        ]
        print(
            f"| {name} | {side} | {statistics.median(speeds):.2f} | {', '.join(f'{s:.2f}' for s in speeds)} "
            f"| {statistics.median(r['cpu_seconds'] for r in runs) / episodes:.3f} "
            f"| {', '.join(f'{p:.1f}' for p in parts)} "
            f"| {statistics.mean(r['response_tokens'] for r in runs):.1f} | {_memory(runs)} |"
        )
    runs = [
        launch([*here, "sft", "--settings", str(folder / "lora.json")]) for _ in range(args.rounds)
    ]
    one = found["lora", "ours"]
    print(f"\nSFT with LoRA, as many rows at once: peak {_memory(runs)} GiB")
    whole, net = (
        statistics.median(r["peak_bytes"] - k * r["start_bytes"] for r in one)
        / statistics.median(r["peak_bytes"] - k * r["start_bytes"] for r in runs)
        for k in (0, 1)
    )
    print(
        f"PPO on one backbone / SFT with LoRA: {whole:.2f} (without what was there before: {net:.2f})"
    )
    for name in ("full", "lora"):
        if (name, "TRL") in found:
            ratios = {
                key: statistics.median(r[key] for r in found[name, "TRL"])
                / statistics.median(r[key] for r in found[name, "ours"])
                for key in ("seconds", "cpu_seconds", "peak_bytes")
            }
            print(f"TRL / ours, {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))


def _memory(runs: list[dict[str, Any]]) -> str:
    peak = statistics.median(r["peak_bytes"] for r in runs) / 2**30
    net = statistics.median(r["peak_bytes"] - r["start_bytes"] for r in runs) / 2**30
    return f"{peak:.2f} ({net:.2f})"


if __name__ == "__main__":
    main()
