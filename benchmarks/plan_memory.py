r"""Compare the memory that ``align plan --gpu-memory`` computes with the tensors of the run.

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py
    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py --stages sft dpo --sizes 5M --tuning lora
    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py --json memory.json

A case is a stage, one of three Llamas with random weights, and full fine-tuning or LoRA with rank
16. It runs two steps on a CPU, by the recipe that it also plans. Rows have nearly the largest
length, since the plan computes memory for those. All prompts but one are short, since it counts
shared ones once per row, and the longest one for all completions of online RL. The model of 28 M
parameters trains with gradient checkpointing.

``sample``, ``label`` and ``evaluate`` load models with full weights. ``evaluate`` has two policies,
a reward model as the judge, drift and implicit rewards. ``label`` has a reward model too, and reads
written completions: random weights hardly ever sample the end of one, without which it is left out.

Measured is the largest sum of the sizes of all tensors in memory, from the allocations that torch's
profiler records. It excludes what the plan leaves out: libraries and fragmentation. DPO is measured
with its reference's log-probabilities computed before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIRST_WORD = 300
"""Number of the first word ``<t300>``; the tokens before are bytes and special tokens."""
TEMPLATE = 21
"""Tokens that the chat template adds to a row."""
PROMPT = 4
"""Words of a prompt, but for the first one."""
LONG_PROMPT = 24
STEPS = 2
ONLINE = ("ppo", "grpo", "rloo", "reinforce")
INFERENCE = ("sample", "label", "evaluate")
STAGES = ("sft", "reward", "dpo", "kto", *ONLINE, *INFERENCE)
BATCH = 16
"""Rows of a batch of the stages without gradients."""
HELD_OUT_TOKENS = 81
"""Tokens of a held-out row of 60 words: one each and the template, as many as 1.35 a word."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and the batches that it trains on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    rows: int
    """Rows of a forward pass: pairs in ``reward`` and ``dpo``, completions in the others."""
    tokens: int
    """Largest length of a row."""
    checkpointing: bool = False

    @property
    def shape(self) -> dict[str, int]:
        """Arguments of transformers' configuration."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
        return {name: getattr(self, name) for name in names}


SIZES = {
    "5M": Size(256, 768, 4, 8192, rows=4, tokens=256),
    "28M": Size(512, 1536, 6, 16384, rows=4, tokens=192, checkpointing=True),
    "104M": Size(768, 2304, 9, 49152, rows=2, tokens=128),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """The planned and the measured bytes of a stage."""

    planned: int
    measured: int
    parts: dict[str, int]
    """The parts of the plan, which are not all in memory at the same time."""

    @property
    def ratio(self) -> float:
        """Planned bytes per measured byte."""
        return self.planned / self.measured


def make_model(folder: Path, size: Size) -> None:
    """Write a model with random weights, and a tokenizer with one token for each ``<t300>``."""
    import torch
    from tokenizers import AddedToken
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.models import tokenization

    tokens = tokenization.new_tokenizer(["a"], vocab_size=264, max_length=1024)
    words = range(FIRST_WORD, FIRST_WORD + size.vocab_size - len(tokens))
    tokens.add_tokens([AddedToken(f"<t{i}>", lstrip=True, normalized=False) for i in words])
    torch.manual_seed(0)
    config = LlamaConfig(
        **size.shape,
        num_attention_heads=size.hidden_size // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


def write_rows(file: Path, vocabulary: int, tokens: int, rows: int) -> None:
    """Write pairs of random words, of which a row has nearly ``tokens`` tokens."""
    generator = random.Random(0)
    last = FIRST_WORD + vocabulary - 300

    def text(length: int) -> str:
        return " ".join(f"<t{generator.randrange(FIRST_WORD, last)}>" for _ in range(length))

    with file.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            prompt = PROMPT if row else LONG_PROMPT
            lengths = {"prompt": prompt}
            lengths |= dict.fromkeys(("chosen", "rejected"), tokens - prompt - TEMPLATE)
            stream.write(json.dumps({key: text(n) for key, n in lengths.items()}) + "\n")


def write_recipe(folder: Path, stage: str, size: Size, tuning: str) -> Path:
    """Write the recipe of a case and its data; its last stage is measured."""
    import yaml

    model = folder / f"{size.hidden_size}"
    if not model.exists():
        make_model(model, size)
    data = folder / f"{stage}-{size.hidden_size}.jsonl"
    if stage == "evaluate":
        write_rows(data, size.vocab_size, HELD_OUT_TOKENS, 4 * BATCH)
    else:
        write_rows(data, size.vocab_size, size.tokens, STEPS * size.rows)
    splits = {"test_fraction": 0.0, "validation_fraction": 0.0}
    common: dict[str, Any] = {"model": str(model)}
    if tuning == "lora":
        common["lora"] = {"r": 16, "alpha": 32}
    trainer = {
        "per_device_train_batch_size": size.rows,
        "max_length": size.tokens,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": size.checkpointing,
    }
    if stage == "evaluate":
        splits["test_fraction"] = 0.5
    stages: dict[str, Any] = {"prepare": {"source": str(data), **splits}}
    if stage in ONLINE:
        rewards: list[Any] = [{"function": "contains", "answer": "t"}]
        if stage == "ppo":
            stages["reward"] = {**common, "trainer": trainer | {"max_steps": 1}}
            rewards = ["reward"]
        common |= {"rewards": rewards, "steps": STEPS, "batch_size": 2 * size.rows}
        common |= {"n_completions": 2, "micro_batch_size": size.rows, "epochs": 1, "minibatches": 1}
        common |= {"max_new_tokens": size.tokens - LONG_PROMPT - TEMPLATE}
        stages[stage] = common | {"gradient_checkpointing": size.checkpointing}
    elif stage in INFERENCE:
        stages |= inference_stages(stage, size, model, trainer | {"max_steps": 1})
    else:
        stages[stage] = common | {"trainer": trainer}
    file = folder / f"{stage}-{size.hidden_size}-{tuning}.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    return file


def inference_stages(
    stage: str, size: Size, model: Path, trainer: dict[str, Any]
) -> dict[str, Any]:
    """A stage without gradients, and those that it needs. Half of the prompts are held out."""
    sampling = {"max_new_tokens": size.tokens // 2, "batch_size": BATCH}
    stages: dict[str, Any] = {}
    if stage != "evaluate":
        stages["sample"] = {"model": str(model), "n_completions": 4, **sampling}
    if stage != "sample":
        stages["reward"] = {"model": str(model), "trainer": trainer}
    if stage == "label":
        stages["label"] = {"judge": "reward", "batch_size": BATCH}
    if stage == "evaluate":
        other = model.with_name(f"{model.name}-other")
        shutil.copytree(model, other, dirs_exist_ok=True)
        models = {"policies": [str(model)], "baseline": str(other), "judge": "reward"}
        stages["evaluate"] = models | sampling | {"implicit_rewards": True}
    return stages


def write_completions(folder: Path, size: Size) -> None:
    """Write completions of the largest length, two of each prompt, as ``sample`` does."""
    from align.data import tables

    prompt = f"<t{FIRST_WORD}> " * (LONG_PROMPT - 1)
    words = range(FIRST_WORD, FIRST_WORD + size.tokens // 2)
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt + f"<t{FIRST_WORD + row // 2}>"}],
            "completion": [
                {"role": "assistant", "content": " ".join(f"<t{word + row}>" for word in words)}
            ],
            "prompt_id": str(row // 2),
            "finished": True,
        }
        for row in range(2 * BATCH)
    ]
    folder.mkdir()
    tables.write(rows, tables.table_file(folder, "completions", "train"))


def measure(stage: str, size: Size, tuning: str, folder: Path) -> Measurement:
    """Plan and run a stage below ``folder``."""
    from align.config.inference_bill import inference_bill
    from align.config.memory_bill import Sharding, bill, trained_weights
    from align.config.recipe import ErrorCollector, read_recipe
    from align.pipeline import estimates
    from align.pipeline.plan import plan_stages
    from align.pipeline.runner import run_recipe
    from align.runtime.progress import NullDisplay

    recipe = read_recipe(write_recipe(folder, stage, size, tuning), [])
    errors = ErrorCollector(recipe)
    stages = plan_stages(errors, folder / "runs")
    errors.raise_any()
    config = stages[-1].config
    estimate = estimates.estimate(stages, world_size=1)[stage]
    planned: Any
    if stage in INFERENCE:
        inference: Any = estimate.inference
        models = inference.policies, inference.judges, inference.work
        planned = inference_bill(*models, dtype="float32", quantization=None)
    else:
        assert estimate.size is not None and estimate.forward is not None
        trained = trained_weights(estimate.size, config, estimate.work, sharded=False)
        planned = bill(estimate.size, trained, estimate.forward, Sharding(device="cpu"))
    run_recipe(recipe, folder / "runs", NullDisplay(), until=stages[-2].name)
    run = partial(run_recipe, recipe, folder / "runs", NullDisplay())
    if stage == "label":
        write_completions(folder / "completions", size)
        run = partial(run_label, stages[-1], folder)
    return Measurement(planned.peak, tensor_peak(run), planned.parts())


def run_label(stage: Any, folder: Path) -> None:
    """Run a stage ``label`` on written completions."""
    from align.runtime.progress import Logger, NullDisplay
    from align.stages import label

    output_dir = folder / "label"
    output_dir.mkdir()
    display = NullDisplay()
    display.start("label", output_dir, "run")
    inputs = stage.inputs | {"completions": folder / "completions"}
    label.run(stage.config, inputs, output_dir, Logger("label", output_dir, display, main=True))


def tensor_peak(function: Callable[[], object]) -> int:
    """The largest number of bytes of the tensors that a function allocates, at one time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    result = profiler.profiler
    assert result is not None
    events = result.kineto_results.experimental_event_tree()
    kind = torch._C._profiler._EventType.Allocation
    allocations = sorted(
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in _all_events(events)
        if event.tag == kind
    )
    held: dict[int, int] = {}  # tensors from before are freed, but were not counted
    total = peak = 0
    for _, address, size in allocations:
        if size > 0:
            held[address] = size
            total += size
        else:
            total -= held.pop(address, 0)
        peak = max(peak, total)
    return peak


def _all_events(roots: list[Any]) -> Iterator[Any]:
    rest = list(roots)
    while rest:
        event = rest.pop()
        yield event
        rest += event.children


def main() -> None:
    """Measure the cases and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tuning", nargs="+", choices=("full", "lora"), default=("full", "lora"))
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    from align.runtime.environment import quiet_libraries

    quiet_libraries()
    print("| stage | model | trained | planned, MB | measured, MB | planned / measured |")
    print("|---|---|---|---|---|---|")
    rows = []
    for stage in options.stages:
        for tuning in options.tuning if stage not in INFERENCE else ["–"]:
            for size in options.sizes:
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(stage, SIZES[size], tuning, Path(folder))
                rows.append({"stage": stage, "model": size, "trained": tuning} | asdict(row))
                numbers = f"{row.planned / 1e6:.0f} | {row.measured / 1e6:.0f} | {row.ratio:.2f}"
                print(f"| `{stage}` | {size} | {tuning} | {numbers} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
