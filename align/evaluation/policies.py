"""A policy that is loaded for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.config.evaluate import Evaluate
from align.models import loading, tokenization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Policy:
    """A model on the device of this process, with its tokenizer and its name in the recipe."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_policy(name: str, source: Path | str, config: Evaluate) -> Policy:
    """Load a policy from a stage's folder, another folder or the Hub, adapters merged."""
    from accelerate import PartialState

    model = loading.load_for_inference(source, dtype=config.dtype).to(PartialState().device)
    return Policy(name, model, tokenization.load_tokenizer(source))
