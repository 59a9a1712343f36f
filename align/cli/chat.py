"""Chat with a policy on the terminal, with the chat template that it was trained with."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from align.errors import printable

FULL = "the conversation fills the {limit} positions of the model; an empty line starts a new one"


def chat(
    source: Path | str,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    quantization: str | None = None,
) -> None:
    """Read lines from standard input and print the policy's answers while they are sampled.

    An empty line starts a new conversation; the end of the input ends the command. ``source`` is a
    model folder or a Hub id.
    """
    import torch

    from align.models import files, generation, tokenization
    from align.models.policy import load_policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    policy = load_policy(source, dtype=dtype, device=device, quantization=quantization)
    model: Any = policy.model
    tokenizer = policy.tokenizer
    torch.manual_seed(seed)
    print(
        printable(f"{source}: an empty line starts a new conversation, Ctrl-D exits"),
        file=sys.stderr,
    )

    streamer = _printer(tokenizer)
    generation.set_sampling(
        model, tokenizer, temperature=temperature, top_p=1.0, max_new_tokens=max_new_tokens
    )
    _replace_invalid_bytes()
    messages: list[dict[str, str]] = []
    while True:
        line = _read_line()
        if line is None:
            return
        if not line:
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        ids = tokenization.tokenize_prompts(tokenizer, [messages])
        limit = files.position_limit(model.config)
        left = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids[0]))
        if left < 1:
            del messages[-1]
            print(FULL.format(limit=limit), file=sys.stderr)
            continue
        model.generation_config.max_new_tokens = left
        inputs, mask = tokenization.pad_rows(
            ids, pad=tokenizer.pad_token_id, side="left", device=device
        )
        with torch.inference_mode():
            output = model.generate(input_ids=inputs, attention_mask=mask, streamer=streamer)
        answer = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})


def _printer(tokenizer: Any) -> Any:
    """Prints tokens while they are sampled, without control characters."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _replace_invalid_bytes() -> None:
    """Read bytes of standard input that are no text as replacement characters."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _read_line() -> str | None:
    """A line of standard input; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
