"""Completions from vLLM, in a server or in this process; imported only for ``sampler: vllm``.

The calls are those of vLLM 0.31 and 0.33, whose sources and documents agree on them
(``docs/training/weight_transfer``, ``docs/training/async_rl.md``, ``docs/features/sleep_mode.md``),
and those that TRL 1.16 makes.
"""
