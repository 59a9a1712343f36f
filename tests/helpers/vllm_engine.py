"""A module in place of ``vllm`` whose ``LLM`` samples from the weights that it is given.

Names, signatures and the order of calls are those of vLLM 0.32 and 0.33, as far as a run uses them:
``vllm/entrypoints/llm.py``, ``vllm/v1/executor/abstract.py``, ``vllm/v1/worker/gpu_worker.py``,
``vllm/model_executor/model_loader/reload/inplace.py``. What vLLM would refuse, or would only warn
of, is a violation. Sleep at level 2 overwrites all weights with NaN.
"""

from __future__ import annotations

import gc
import importlib.machinery
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

UPDATE = [
    "wake_up(['weights'])",
    "reload_weights",
    "reset_prefix_cache",
    "wake_up(['kv_cache'])",
    "generate",
    "sleep(2)",
]
"""The calls of one sampling, in order."""
TAGS = {"weights", "kv_cache"}
ENGINE_ARGS = {
    "distributed_executor_backend": ("mp", "uni", "ray", "external_launcher"),
    "enable_sleep_mode": (True, False),
    "load_format": ("auto", "safetensors", "dummy"),
    "logprobs_mode": ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
    "max_model_len": None,
    "max_num_seqs": None,
}
"""Fields of ``vllm.EngineArgs`` with their values; None is any whole number."""


@dataclass
class Record:
    """What happened, in all engines of a process."""

    calls: list[str] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    """Arguments of each engine."""
    parameters: list[SamplingParams] = field(default_factory=list)
    """Of each completion."""
    violations: list[str] = field(default_factory=list)
    faults: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Replaces the result of a call: of the result, or by raising an error."""
    engines: weakref.WeakSet[LLM] = field(default_factory=weakref.WeakSet)
    """Those that have memory of the GPU."""
    torch_has_memory: bool = True
    """Whether torch may hold memory that it does not use."""


RECORD = Record()
"""Of the present test."""


@dataclass(kw_only=True)
class SamplingParams:
    """Fields of ``vllm.SamplingParams`` with its defaults."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    """Of one token at one place."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """A completion."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None


@dataclass
class RequestOutput:
    """The completions of a prompt."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """An engine, with the arguments of ``vllm.LLM`` that a run uses."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        **kwargs: Any,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        RECORD.calls.append("LLM")
        RECORD.settings.append({"dtype": dtype, "share": gpu_memory_utilization, **kwargs})
        for name, value in kwargs.items():
            allowed = ENGINE_ARGS[name]  # as of a dataclass, an unknown name is an error
            _check(isinstance(value, int) if allowed is None else value in allowed, name)
        _check(0 < gpu_memory_utilization <= 1 and tensor_parallel_size == 1, "sizes")
        backend = kwargs["distributed_executor_backend"]
        if backend == "external_launcher":
            _check({"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys(), "no launcher")
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0"
        _check(in_process, "an engine in another process, which cannot receive an iterator")
        _check(kwargs.get("enable_sleep_mode", False), "without sleep mode")
        _check(os.environ.get("VLLM_NO_USAGE_STATS") == "1", "usage statistics are on")
        _take_memory()
        gc.collect()
        _check(not RECORD.engines, "CuMem allocator can only be used for one instance per process")
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, world_size=1, rank=0)
        shape = AutoConfig.from_pretrained(model)
        _check(shape.architectures is not None, "config.json has no architectures")
        _check(kwargs.get("load_format") == "dummy", "the folder has no weights")
        _check(skip_tokenizer_init, "the folder has no tokenizer")
        torch.manual_seed(0)  # that of vLLM: the global state changes
        with torch.random.fork_rng():
            self.model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
        self.model.eval().requires_grad_(False)
        length, longest = kwargs.get("max_model_len"), shape.max_position_embeddings
        self._longest = longest if length in (None, -1) else length
        self._mode = kwargs.get("logprobs_mode", "raw_logprobs")
        self._asleep: set[str] = set()
        self._cache: dict[tuple[int, ...], Tensor] = {}
        """Logits after each prefix, by the weights that computed them."""
        RECORD.engines.add(self)
        _finished("LLM", None)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Discard weights, and keys and values."""
        RECORD.calls.append(f"sleep({level})")
        _check(mode != "wait" and not self._asleep, "sleep: it sleeps already")
        self._asleep |= TAGS
        if level == 2:
            for weight in self.model.parameters():
                weight.fill_(torch.nan)
        _finished("sleep", None)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Allocate memory again."""
        RECORD.calls.append(f"wake_up({tags})")
        _take_memory()
        woken = TAGS if tags is None else set(tags)
        _check(woken <= self._asleep, f"wake_up: {woken} does not sleep")
        self._asleep -= woken
        return _finished("wake_up", not self._asleep)

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of the only worker."""
        _check(method == "reload_weights" and not args, method)
        return [self._reload_weights(**kwargs or {})]

    def _reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        RECORD.calls.append("reload_weights")
        _check("weights" not in self._asleep, "reload_weights: weights are asleep")
        _check(weights_iterator is not None, "reload_weights: the folder has no weights")
        _check_modes()
        assert weights_iterator is not None
        own = dict(self.model.named_parameters())
        for name, weight in weights_iterator:
            _check(own[name].shape == weight.shape, f"the shape of {name}")
            own.pop(name).copy_(weight)
        _check(not own, f"weights that were not given: {[*own]}")
        _finished("reload_weights", None)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget what earlier weights computed."""
        RECORD.calls.append("reset_prefix_cache")
        self._cache.clear()
        return _finished("reset_prefix_cache", True)

    def generate(
        self,
        prompts: Sequence[Mapping[str, Any]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """A completion of each prompt."""
        RECORD.calls.append("generate")
        _check(not self._asleep, f"generate: {self._asleep} is asleep")
        _check(len(prompts) == len(sampling_params), "as many settings as prompts")
        _check_modes()
        RECORD.parameters += sampling_params
        pairs = zip(prompts, sampling_params, strict=True)
        return _finished("generate", [self._complete(p, settings) for p, settings in pairs])

    def _complete(self, prompt: Mapping[str, Any], settings: SamplingParams) -> RequestOutput:
        _check(prompt.keys() == {"prompt_token_ids"}, str(prompt.keys()))
        ids = list(prompt["prompt_token_ids"])
        if len(ids) >= self._longest:
            raise ValueError(f"The prompt (length {len(ids)}) exceeds the maximum model length")
        _check(not settings.detokenize, "there is no tokenizer")
        assert settings.seed is not None and settings.max_tokens is not None
        generator = torch.Generator().manual_seed(settings.seed)
        entries: list[dict[int, Logprob]] = []
        reason = "length"
        for _ in range(min(settings.max_tokens, self._longest - len(ids))):
            logits = self._logits(ids)
            processed = (logits / settings.temperature).log_softmax(-1)
            token = int(processed.exp().multinomial(1, generator=generator))
            shown = processed if self._mode == "processed_logprobs" else logits.log_softmax(-1)
            entries.append({token: Logprob(float(shown[token]), 1)})
            ids.append(token)
            if token in (settings.stop_token_ids or []):
                reason = "stop"
                break
        n = len(prompt["prompt_token_ids"])
        logprobs = None if settings.logprobs is None else entries
        completion = CompletionOutput(0, "", ids[n:], logprobs, reason)
        return RequestOutput(ids[:n], [completion])

    def _logits(self, ids: list[int]) -> Tensor:
        known = self._cache.get(tuple(ids))
        if known is None:
            with torch.no_grad():
                known = self.model(torch.tensor([ids])).logits[0, -1].float()
            self._cache[tuple(ids)] = known
        return known


def _finished(method: str, result: Any) -> Any:
    """The result of a call, or what a fault makes of it."""
    fault = RECORD.faults.get(method)
    return result if fault is None else fault(result)


def _take_memory() -> None:
    """Check that torch has freed what it can, without which a GPU may be full."""
    _check(not RECORD.torch_has_memory, "torch holds memory")
    RECORD.torch_has_memory = True


def _check_modes() -> None:
    """Check that nothing of the caller changes how the engine computes."""
    _check(not torch.is_inference_mode_enabled(), "in inference mode")
    _check(not torch.is_autocast_enabled("cpu"), "with types of the caller")


def _check(condition: object, message: str) -> None:
    if not condition:
        RECORD.violations.append(message)
        raise AssertionError(message)


def install(patch: pytest.MonkeyPatch) -> Record:
    """Put the module into ``sys.modules``, and let this machine pass for one with a GPU."""
    global RECORD
    from align.online_rl.vllm import weights
    from align.pipeline import preflight

    RECORD = Record()
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vars(module).update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=dict)
    patch.setitem(sys.modules, "vllm", module)
    patch.setattr(weights, "DEVICE", "cpu")
    patch.setattr(preflight, "has_cuda", lambda: True)
    patch.setattr(torch.cuda, "empty_cache", lambda: setattr(RECORD, "torch_has_memory", False))
    patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    return RECORD


def call_script(runs: Path) -> None:
    """Run `align/run.py` with the stand-in, as a rank; its calls go to a file beside ``runs``."""
    from helpers import sharded_run

    record = install(pytest.MonkeyPatch())
    try:
        sharded_run.call_script(runs)
    finally:
        backends = [settings["distributed_executor_backend"] for settings in record.settings]
        text = json.dumps([record.calls, backends, record.violations])
        (runs.parent / f"calls-{os.environ['RANK']}.json").write_text(text)
