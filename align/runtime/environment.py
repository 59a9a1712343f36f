"""Settings of other libraries: no telemetry, progress bars or irrelevant warnings."""

from __future__ import annotations

import logging
import os
import warnings

# Logged at every start on a machine without a GPU.
_IRRELEVANT = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU",
}


def quiet_libraries() -> None:
    """Turn off telemetry, progress bars and advice of other libraries.

    Variables that the user has set keep their values.

    Call it before these libraries are imported: most read the environment at import.
    """
    for variable, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(variable, value)
    # transformers 5.23 renamed gradient checkpointing to activation checkpointing, but TRL 1.16 and
    # transformers itself still use the old name, at every step.
    warnings.filterwarnings(
        "ignore", message=r".*gradient_checkpointing\w*` is deprecated", category=FutureWarning
    )
    # DeepSpeed 0.19 uses the names that torch 2.13 renamed, at every collective call.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    # A check of the recipe prints it once, before training.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    for name, message in _IRRELEVANT.items():
        logging.getLogger(name).addFilter(lambda record, m=message: m not in record.getMessage())  # type: ignore[misc]
