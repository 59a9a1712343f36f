"""config.base"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

POLICY_STAGES = ("sft", "dpo", "kto", "ppo")
TAGS = ("«text»", "«new model»")  # of unions; they are not part of a key's address


@dataclass(frozen=True, slots=True)
class Input:
    """A field that names what a stage reads: an earlier stage of these kinds, or a folder.

    Where ``models`` holds, the name may also be that of a model: any folder in Hugging Face layout, or a Hub id. Where
    ``functions`` holds, it may be a Python function as well: ``module:function``. A value in ``words`` names nothing, and
    means what it says.
    """

    stages: tuple[str, ...]
    models: bool = False
    functions: bool = False
    words: tuple[str, ...] = ()


class Config(BaseModel):
    """Strict and frozen: a typo is an error, and a text is no number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Stage(Config):
    """What all stages have.

    ``code_version`` rises when a stage's results change for the same settings; ``trainer_config`` is the class of TRL
    that ``trainer`` is checked against; ``inputs`` are the fields that name what the stage reads.
    """

    code_version: ClassVar[int] = 1
    trainer_config: ClassVar[str | None] = None
    main_process_only: ClassVar[bool] = False
    inputs: ClassVar[dict[str, Input]] = {}

    stage: str = ""
    """The kind of stage, where the key in the recipe is a name of your own."""


class NewModel(Config):
    """A Llama-architecture model with random weights, and a byte-level BPE tokenizer trained on the demonstrations."""

    vocab_size: int = Field(512, ge=264)
    """Tokens, the 256 bytes and the special ones included; the tokenizer may end up with fewer."""
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(384, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    max_position_embeddings: int = Field(512, ge=16)
    tie_word_embeddings: bool = True
    initializer_range: float = Field(0.02, gt=0.0)
    """Standard deviation of the random weights; narrow models learn to copy sooner with more."""

    @model_validator(mode="after")
    def _divisible(self) -> NewModel:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` {self.hidden_size} must be a multiple of twice `num_attention_heads` "
                f"{self.num_attention_heads} (rotary embeddings turn pairs)"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` {self.num_attention_heads} must be a multiple of "
                f"`num_key_value_heads` {self.num_key_value_heads}"
            )
        return self


class Lora(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through peft."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by ``alpha / r``."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: Annotated[
        Annotated[str, Tag(TAGS[0])] | Annotated[list[str], Tag(TAGS[1])],
        Discriminator(lambda v: TAGS[1] if isinstance(v, list) else TAGS[0]),
    ] = "all-linear"
    """Names of the adapted layers, or ``all-linear``: every linear layer but the output head."""


ModelOrNew = Annotated[
    Annotated[str, Tag(TAGS[0])] | Annotated[NewModel, Tag(TAGS[1])],
    Discriminator(lambda v: TAGS[1] if isinstance(v, (dict, NewModel)) else TAGS[0]),
]
