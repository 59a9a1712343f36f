"""Keys of the stages that sample from a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.config.base import Problem, Stage
from align.config.quantization import QuantizableStage

Temperature = Annotated[
    float, Field(ge=0.0, description="Sampling temperature; 0 selects the most likely token.")
]


class DecodingStage(QuantizableStage):
    """A stage that samples completions."""

    later_keys: ClassVar = {"compile_decoding": None}

    compile_decoding: Literal["inductor", "aot_eager"] | None = None
    """Compile the step of one token with this backend of ``torch.compile``; on a GPU, ``inductor``
    replays it as a CUDA graph. The first batches take a minute. Completions are equal up to
    rounding. ``aot_eager`` generates no code; it is for tests."""

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Settings with which no step can be compiled."""
        yield from super().problems(stages)
        if self.compile_decoding is None:
            return
        if self.quantization:
            message = "steps of a model in 4 bits are not compiled; remove `quantization` or it"
            yield Problem(("compile_decoding",), message)
        if getattr(self, "sampler", None) == "vllm":
            message = "`sampler: vllm` samples with steps of vLLM; remove it"
            yield Problem(("compile_decoding",), message)


class SamplingStage(DecodingStage):
    """A stage that samples completions from policies that it does not train."""

    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling: tokens are drawn from the smallest set with this probability."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest completion in tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights."""


class MergingStage(DecodingStage):
    """A stage that samples completions from the policy that it trains."""

    later_keys: ClassVar = {"merge_adapter": False}

    merge_adapter: bool = False
    """With ``lora``, add the adapter to the weights while completions are sampled; afterwards they
    are restored bit for bit. Saves the time of the adapter for each token, and costs the memory of
    the adapted matrices. Completions are equal up to rounding."""

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Settings with which there is no adapter, or none that can be added exactly."""
        yield from super().problems(stages)
        if not self.merge_adapter:
            return
        settings = {key: getattr(self, key) for key in ("lora", "sampler", "dtype")}
        if settings["lora"] is None:
            yield Problem(("merge_adapter",), "there is no adapter without `lora`; remove it")
        if settings["sampler"] == "vllm":
            message = "`sampler: vllm` samples from merged weights anyway; remove it"
            yield Problem(("merge_adapter",), message)
        if self.quantization:
            message = "4 bits cannot store the sum of weights and adapter; remove it"
            yield Problem(("merge_adapter",), message)
        elif settings["dtype"] == "bfloat16":
            message = (
                "the sum of weights and adapter would lose a small adapter to the rounding of "
                "`dtype: bfloat16`; remove it, or set `dtype: float32` and `mixed_precision: "
                "bfloat16`"
            )
            yield Problem(("merge_adapter",), message)
