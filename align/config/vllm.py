"""The keys of ``sampler: vllm``: a server, or an engine in the training process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.config.base import between_keys
from align.config.decoding import MergingStage


class VLLMStage(MergingStage):
    """A stage that trains a policy, and whose completions vLLM may sample."""

    later_keys: ClassVar = {"vllm_mode": "server"}

    sampler: Literal["transformers", "vllm"] = "transformers"
    """Engine that samples completions."""
    vllm_mode: Literal["server", "colocate"] = "server"
    """Where vLLM runs: in a ``server`` at ``vllm_url``; or in the training process (``colocate``),
    on the same GPU, of which it frees the memory during an update."""
    vllm_url: str = "http://localhost:8000"
    """Address of the vLLM server."""
    vllm_timeout: float = Field(600.0, gt=0.0)
    """Seconds within which the vLLM server must answer a request."""
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0.0, lt=1.0)
    """Share of the memory of the GPU that vLLM uses while it samples, for weights, keys and values,
    with ``vllm_mode: colocate``."""
    max_staleness: int = Field(0, ge=0)
    """Updates between the policy that begins a completion and the one that is trained on it, at
    most. Above 0, a vLLM server samples while the policy is updated."""
    importance_cap: float = Field(2.0, gt=0.0)
    """Upper bound on the importance weights policy / sampler, where another engine samples."""

    @between_keys
    def _check_vllm(self) -> Iterator[str]:
        if self.sampler != "vllm":
            unused, condition = [*_OF_SERVERS, *_OF_ENGINES, "vllm_mode"], "without `sampler: vllm`"
        elif self.vllm_mode == "server":
            unused, condition = _OF_ENGINES, "without `vllm_mode: colocate`"
        else:
            unused, condition = _OF_SERVERS, "with `vllm_mode: colocate`"
        for key in unused:
            if key in self.model_fields_set:
                yield f"`{key}` has no effect {condition}; remove it"
        if self.quantization and self.sampler == "vllm":
            yield "`sampler: vllm` needs unquantized weights; remove `quantization` or `sampler`"

    @property
    def colocates(self) -> bool:
        """Whether vLLM samples in the training process."""
        return self.sampler == "vllm" and self.vllm_mode == "colocate"

    @property
    def servers(self) -> dict[str, str]:
        """The vLLM server, if it samples."""
        return {"vllm_url": self.vllm_url} if self.sampler == "vllm" and not self.colocates else {}

    @property
    def required_packages(self) -> dict[str, tuple[str, str]]:
        """vLLM, where it runs in the training process."""
        engine = {"vllm_mode": ("vllm", "vllm")}
        return super().required_packages | (engine if self.colocates else {})

    @property
    def gpu_keys(self) -> dict[str, str]:
        """The engine sleeps on GPUs only."""
        return {"vllm_mode": "use a server, or remove `sampler`"} if self.colocates else {}

    def digest_settings(self) -> dict[str, Any]:
        """All settings; where a server is and what memory an engine has is not in the digest."""
        settings = super().digest_settings()
        for key in ("vllm_url", "vllm_timeout", "vllm_gpu_memory_utilization"):
            del settings[key]
        return settings


_OF_SERVERS = ["vllm_url", "vllm_timeout", "max_staleness"]
_OF_ENGINES = ["vllm_gpu_memory_utilization"]
