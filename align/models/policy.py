"""A loaded policy for the Python API: prompts in, texts out.

Left out: training, and several processes; a recipe's ``sample`` stage shares prompts over ranks.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ArtifactError
from align.models import gguf_files
from align.models.files import position_limit
from align.models.generation import sample
from align.models.loading import check_vocabulary, load_for_inference
from align.models.tokenization import load_tokenizer, tokenize_prompts
from align.runtime import artifacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from align.models.tokenization import Message


NEW_TOKENS = 256
"""Largest number of tokens of a completion, by default."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        n: int = 1,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        seed: int | None = None,
    ) -> list[list[str]]:
        """Sample ``n`` completions for each prompt, in the order of the prompts.

        A prompt is the text of a user's turn, or a list of messages. ``temperature=0`` takes the
        most likely token. ``max_new_tokens`` is by default 256, or what the longest prompt leaves
        of the model's positions. Without ``seed`` every call draws other completions. The same seed
        gives the same completions; two policies that are compared need different seeds, because
        equal ones couple their completions and raise the win rate of the better one. torch's random
        state is restored afterwards.

        Raises:
            UserError: The tokenizer has no chat template, or a prompt with its completion exceeds
                the model's positions.
        """
        import torch

        messages = [as_messages(prompt) for prompt in prompts]
        if max_new_tokens is None:
            longest = max(map(len, tokenize_prompts(self.tokenizer, messages)), default=0)
            limit = position_limit(self.model.config)
            left = NEW_TOKENS if limit is None else limit - longest
            max_new_tokens = max(1, min(NEW_TOKENS, left))
        with torch.random.fork_rng():
            completions = sample(
                self.model,
                self.tokenizer,
                messages,
                n_completions=n,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                seed=secrets.randbits(32) if seed is None else seed,
            )
        return [[completion.text for completion in row] for row in completions]


def load_policy(
    source: Path | str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    device: Any = None,
    quantization: str | None = None,
) -> Policy:
    """Load a policy from a stage's folder, any folder in Hugging Face layout, or the Hub.

    An adapter is loaded on its base model. ``device`` is the accelerator if there is one, else the
    CPU. With ``quantization="nf4"`` the linear layers are stored in 4 bits.

    Raises:
        UserError: The model or its tokenizer cannot be loaded, or a file of its stage is damaged.
    """
    if gguf_files.is_gguf(source):
        command = f"align export {shlex.quote(str(source))} FOLDER"
        raise ArtifactError(
            f"{source}: a GGUF file; `{command}` writes its model folder, name that"
        )
    source = as_source(source)
    if isinstance(source, Path):
        artifacts.check_folder(source)
    model: Any = load_for_inference(
        source, dtype=dtype, revision=revision, quantization=quantization
    )
    tokenizer = load_tokenizer(source, revision=revision)
    check_vocabulary(source, model, tokenizer)
    return Policy(model.to(device or default_device()).eval(), tokenizer)


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """A prompt as a list of messages; text becomes a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def as_source(source: Path | str) -> Path | str:
    """An existing folder as a path; anything else is a Hub id."""
    return Path(source) if Path(source).is_dir() else source


def default_device() -> Any:
    """The accelerator of this process, or the CPU."""
    import torch

    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return accelerator or torch.device("cpu")
