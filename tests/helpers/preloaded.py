"""Modules that the server of :mod:`helpers.forks` imports, once for all its processes."""

import contextlib
import gc

from align.runtime import environment

environment.quiet_libraries()

import datasets.io.parquet  # noqa: E402, F401
import matplotlib.figure  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from align.cli import run  # noqa: E402, F401
from align.models.decoding import eager  # noqa: E402, F401
from align.pipeline import runner, summary  # noqa: E402, F401
from align.stages import dpo, evaluate, kto, label, ppo, prepare, reward, sample, sft  # noqa: E402, F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401 (accelerate imports it where it is installed)

# accelerate collects garbage at the start of each training: half a second for imported modules
gc.collect()
gc.freeze()
