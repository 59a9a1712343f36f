"""runtime.environment"""

from __future__ import annotations

import logging
import os
import warnings

# Said at every start on a CPU, about kernels and devices that are not there.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU",
}


def quiet_libraries() -> None:
    """Leave the terminal to our own display, and send nothing home; what the user has set in the environment stays."""
    for variable, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(variable, value)
    # transformers 5.23 renamed gradient to activation checkpointing, and TRL 1.16 and its own code still use the old
    # name at every step; nobody here can act on that.
    warnings.filterwarnings(
        "ignore", message=r".*gradient_checkpointing\w*` is deprecated", category=FutureWarning
    )
    for name, message in _NOISE.items():
        logging.getLogger(name).addFilter(lambda record, m=message: m not in record.getMessage())  # type: ignore[misc]
