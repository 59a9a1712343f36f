"""Sampling by Align and by two methods of transformers: equal models, prompts and settings.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --models embedded --rounds 5
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --models embedded --copies 8 --batch 16
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --models 135m --lora 16 --prompts 16

Align and ``model.generate`` sample the same completions, which the script checks. The continuous
batching of ``model.generate_batch`` draws others, except greedy ones, so its seconds are given for
the number of tokens that Align sampled.

With ``--lora 16`` the model has an adapter of that rank on all of its linear layers. Then Align
alone samples: with the adapter as it is, and merged into the weights (``merge_adapter``). Merging
and restoring the weights count, once per round; the script checks that both sides sample equal
completions and that no bit of the weights changes.

With ``--compile-decoding inductor`` the side of Align is that key's; the time of compilation is
left out.

All rows are sampled at once, or ``--batch`` at a time: in batches one after another, and by
continuous batching with a new row for each that has ended.

The models have random weights; a bias on the logit of the stop token ends completions after
``--mean`` tokens on average, where the length limit does not cut them. The sides take turns, and
the side that starts changes between rounds. Time is processor time of one thread, the median of the
rounds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
)

from align.models import generation
from align.models.adapters import active_adapter
from align.models.decoding.choice import SampledTokens
from align.models.decoding.merged import merged_adapter

STOP, PAD = 2, 0
# width, layers, heads, heads of keys, intermediate width, vocabulary, tied; prompts, their lengths
MODELS: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "embedded": (
        {"vocab_size": 900, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 256},
        32,
        (15, 60),
    ),
    "135m": (
        {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "max_position_embeddings": 2048, "tie_word_embeddings": True},
        8,
        (60, 200),
    ),
}  # fmt: skip
COLUMNS = {
    False: "generate (s) | generate_batch (s) | Align (s) | generate / Align | "
    "generate_batch / Align",
    True: "rows | new tokens | adapter (tokens/s) | merged (tokens/s) | merged / adapter",
}
"""Columns of the table without and with ``--lora``."""
SAMPLING = {
    "temperature 1": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "temperature 0.7, top_p 0.9": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
    "greedy": {"do_sample": False},
}


def build(shape: dict[str, Any], mean: int) -> Any:
    """A Llama with random weights whose completions have about ``mean`` tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=STOP, pad_token_id=PAD)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    bias = torch.zeros(config.vocab_size)
    bias[STOP] = math.log(config.vocab_size / mean)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + bias)
    return model


def prompts(n: int, lengths: tuple[int, int], vocabulary: int) -> list[list[int]]:
    """Random prompts with lengths between two bounds."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(*lengths, (n,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (k,), generator=generator).tolist() for k in sizes]


def timed(
    sample: Callable[[], list[SampledTokens]], seed: int
) -> tuple[float, list[SampledTokens]]:
    """Processor seconds of a call, and its completions."""
    torch.manual_seed(seed)
    start = time.process_time()
    completions = sample()
    return time.process_time() - start, completions


def continuous(model: Any, rows: list[list[int]], size: int) -> list[SampledTokens]:
    """Sample by continuous batching, ``size`` rows at once; pages of the cache have 32 tokens."""
    longest = max(map(len, rows)) + model.generation_config.max_new_tokens
    config = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=size * (longest // 32 + 2),
        max_batch_tokens=max(size, 512),
        max_requests_per_batch=size,
        use_cuda_graph=False,
    )
    outputs = model.generate_batch(rows, continuous_batching_config=config, warmup=False)
    return [SampledTokens(output.generated_tokens, []) for output in outputs.values()]


def compare(model: Any, rows: list[list[int]], size: int, rounds: int, backend: str | None) -> str:
    """The median times of all sides as cells of a table."""
    paged = copy.deepcopy(model)  # it changes the attention of its model
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]

    def one_after_another(sample: Callable[..., list[SampledTokens]]) -> list[SampledTokens]:
        return [row for batch in batches for row in sample(model, batch, {STOP})]

    decoder = generation.compiled_decoder(model, backend)

    def ours_sampled(model: Any, batch: list[list[int]], stops: set[int]) -> list[SampledTokens]:
        return generation.generate_tokens(model, batch, stops, decoder)

    if decoder is not None:
        one_after_another(ours_sampled)
    sides = (
        lambda: one_after_another(generation.generate_with_transformers),
        lambda: one_after_another(ours_sampled),
        lambda: continuous(paged, rows, size),
    )
    seconds: list[list[float]] = [[], [], []]
    for number in range(rounds):
        results = {}
        for side in (0, 1, 2) if number % 2 else (2, 1, 0):
            elapsed, results[side] = timed(sides[side], number)
            seconds[side].append(elapsed)
        tokens = [[row.tokens for row in results[side]] for side in (0, 1)]
        assert tokens[0] == tokens[1], "the sides sampled other completions"
        sampled = [sum(len(row.tokens) for row in results[side]) for side in (1, 2)]
        seconds[2][-1] *= sampled[0] / sampled[1]
    generate, ours, batched = map(statistics.median, seconds)
    cells = (f"{generate:.2f}", f"{batched:.2f}", f"{ours:.2f}")
    ratios = (f"{generate / ours:.1f}", f"{batched / ours:.1f}")
    return " | ".join((*cells, *ratios))


def add_adapter(model: Any, rank: int) -> None:
    """Adapt all linear layers by random matrices that change few of the most likely tokens."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False
    )
    get_peft_model(model, config).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.1)


def compare_merged(model: Any, rows: list[list[int]], size: int, rounds: int) -> str:
    """Tokens per second with an adapter, merged and not, as cells of a table."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    def sample(activate: Callable[..., Any]) -> list[SampledTokens]:
        with activate(model, "default"):
            sampled = [generation.generate_tokens(model, batch, {STOP}) for batch in batches]
        return [row for batch in sampled for row in batch]

    sides = (active_adapter, merged_adapter)
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        results = {}
        for side in (0, 1) if number % 2 else (1, 0):
            elapsed, results[side] = timed(functools.partial(sample, sides[side]), number)
            seconds[side].append(elapsed)
        assert [r.tokens for r in results[0]] == [r.tokens for r in results[1]]
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    n_tokens = sum(len(row.tokens) for row in results[0])
    apart, merged = map(statistics.median, seconds)
    cells = (str(len(rows)), str(n_tokens), f"{n_tokens / apart:.1f}", f"{n_tokens / merged:.1f}")
    return " | ".join((*cells, f"{apart / merged:.2f}"))


def main() -> None:
    """Print one row per model and setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--copies", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--prompts", type=int, help="prompts; default: 32 and 8")
    parser.add_argument("--lora", type=int, metavar="R", help="compare with a merged adapter")
    parser.add_argument("--batch", type=int, help="rows at once; default: all")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--mean", type=int, default=30, help="mean tokens of a completion")
    parser.add_argument("--sampling", nargs="+", choices=list(SAMPLING), default=list(SAMPLING))
    parser.add_argument("--compile-decoding", choices=["inductor", "aot_eager"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.lora and arguments.compile_decoding:
        parser.error("--lora compares steps that are not compiled; remove --compile-decoding")
    torch.set_num_threads(1)
    print(f"| model | sampling | {COLUMNS[bool(arguments.lora)]} |")
    print("|" + "---|" * 7)
    for name in arguments.models:
        shape, n_prompts, lengths = MODELS[name]
        model = build(shape, arguments.mean)
        if arguments.lora:
            add_adapter(model, arguments.lora)
        distinct = prompts(arguments.prompts or n_prompts, lengths, shape["vocab_size"])
        distinct.sort(key=len)  # as Align's stages do
        rows = [row for row in distinct for _ in range(arguments.copies)]
        size = arguments.batch or len(rows)
        for label in arguments.sampling:
            model.generation_config = GenerationConfig(
                eos_token_id=[STOP],
                pad_token_id=PAD,
                max_new_tokens=arguments.new_tokens,
                **SAMPLING[label],
            )
            if arguments.lora:
                cells = compare_merged(model, rows, size, arguments.rounds)
            else:
                cells = compare(model, rows, size, arguments.rounds, arguments.compile_decoding)
            print(f"| {name} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
