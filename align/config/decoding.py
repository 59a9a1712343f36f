"""The key ``compile_decoding`` of the stages that sample from a language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from align.config.base import Problem, Stage
from align.config.quantization import QuantizableStage


class DecodingStage(QuantizableStage):
    """A stage that samples completions."""

    compile_decoding: Literal["inductor", "aot_eager"] | None = None
    """Compile the step of one token with this backend of ``torch.compile``; on a GPU, ``inductor``
    replays it as a CUDA graph. The first batches take a minute. Completions are equal up to
    rounding. ``aot_eager`` generates no code; it is for tests."""

    def digest_settings(self) -> dict[str, Any]:
        """All settings; an unused key does not change the digest."""
        settings = super().digest_settings()
        if self.compile_decoding is None:
            del settings["compile_decoding"]
        return settings

    def problems(self, stages: Mapping[str, Stage]) -> Iterator[Problem]:
        """Settings with which no step can be compiled."""
        yield from super().problems(stages)
        if self.compile_decoding is None:
            return
        if self.quantization:
            message = "steps of a model in 4 bits are not compiled; remove `quantization` or it"
            yield Problem(("compile_decoding",), message)
        if getattr(self, "sampler", None) == "vllm":
            message = "`sampler: vllm` samples on a server; remove it"
            yield Problem(("compile_decoding",), message)
