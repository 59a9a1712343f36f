"""The key ``quantization`` of the stages that load language models."""

from __future__ import annotations

from typing import ClassVar, Literal

from align.config.base import Stage


class QuantizableStage(Stage):
    """A stage whose models may be stored in 4 bits."""

    later_keys: ClassVar = {"quantization": None}

    quantization: Literal["nf4"] | None = None
    """Store the linear layers of the models in 4 bits (Dettmers et al. 2023, arXiv:2305.14314).
    Training requires ``lora``. Default: ``dtype``."""

    @property
    def required_packages(self) -> dict[str, tuple[str, str]]:
        """bitsandbytes, if the models are quantized."""
        quantized = {"quantization": ("bitsandbytes", "-e '.[quantization]'")}
        return super().required_packages | (quantized if self.quantization else {})
