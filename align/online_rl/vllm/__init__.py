"""Completions from vLLM, in a server or in this process; imported only for ``sampler: vllm``.

The calls of a server are those of vLLM 0.31 and 0.33, whose sources and documents agree on them
(``docs/training/weight_transfer``, ``docs/training/async_rl.md``), and those that TRL 1.16 makes;
the calls of an engine in this process those of vLLM 0.32 and 0.33 (``docs/features/sleep_mode.md``,
and ``reload_weights`` of its workers, which takes tensors in place of a folder).
"""
