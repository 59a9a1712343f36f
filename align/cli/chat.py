"""Chat with policies on the terminal, with the chat templates that they were trained with."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError, printable

FULL = "the conversation fills the {limit} positions of the model; an empty line starts a new one"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are sampled."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


def chat(
    sources: Mapping[str, Path | str],
    sampling: Sampling,
    *,
    system: str | None = None,
    quantization: str | None = None,
) -> None:
    """Read lines from standard input and print the policies' answers while they are sampled.

    ``sources`` are model folders or Hub ids by the names that are printed; with several of them
    each policy answers every line, and its answers are its own conversation. ``system`` is the
    system turn at the start of each conversation. An empty line starts a new conversation; the end
    of the input and Ctrl-C end the command.
    """
    chats = [_Chat(source, sampling, system, quantization) for source in sources.values()]
    names = " and ".join(sources)
    print(
        printable(f"{names}: an empty line starts a new conversation, Ctrl-D exits"),
        file=sys.stderr,
    )
    _replace_invalid_bytes()
    try:
        while (line := _read_line()) is not None:
            for name, each in zip(sources, chats, strict=True):
                if not line:
                    each.start()
                    continue
                if len(chats) > 1:
                    print(printable(f"{name}:"))
                each.answer(line)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the prompt of the shell starts a line


class _Chat:
    """A policy and its conversation."""

    def __init__(
        self,
        source: Path | str,
        sampling: Sampling,
        system: str | None,
        quantization: str | None,
    ) -> None:
        import torch

        from align.models import generation
        from align.models.policy import load_policy

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        policy = load_policy(source, dtype=dtype, device=self.device, quantization=quantization)
        self.model: Any = policy.model
        self.tokenizer = policy.tokenizer
        self.sampling, self.system = sampling, system
        self.streamer = _printer(self.tokenizer)
        self.n_answers = 0
        generation.set_sampling(
            self.model,
            self.tokenizer,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
        )
        self.start()
        self._check_system()

    def _check_system(self) -> None:
        """Check before the first line that the chat template writes the system turn."""
        from align.models import tokenization

        if self.system is None:
            return
        prompts = tokenization.conversations(self.tokenizer).prompts
        user = {"role": "user", "content": "User"}
        prompts([[user]])
        try:
            prompts([[*self.messages, user]])
        except UserError as error:
            raise UserError(
                *(f"--system: {line}, or leave it out" for line in error.lines)
            ) from None

    def start(self) -> None:
        """Start a new conversation."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def answer(self, line: str) -> None:
        """Answer one line of the user, and print the answer while it is sampled."""
        import torch

        from align.models import files, tokenization
        from align.runtime.seeds import derive_seed

        self.messages.append({"role": "user", "content": line})
        ids = tokenization.tokenize_prompts(self.tokenizer, [self.messages])
        limit = files.position_limit(self.model.config)
        most = self.sampling.max_new_tokens
        left = most if limit is None else min(most, limit - len(ids[0]))
        if left < 1:
            del self.messages[-1]
            print(FULL.format(limit=limit), file=sys.stderr)
            return
        self.model.generation_config.max_new_tokens = left
        inputs, mask = tokenization.pad_rows(
            ids, pad=self.tokenizer.pad_token_id, side="left", device=self.device
        )
        # A seed for each answer, so that it does not depend on what another policy has sampled.
        torch.manual_seed(derive_seed(self.sampling.seed, "chat", self.n_answers))
        self.n_answers += 1
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs, attention_mask=mask, streamer=self.streamer
            )
        new = output[0, inputs.shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": text})


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
