"""Sampling with vLLM in the training process, on the same GPU.

Between two samplings the engine sleeps at level 2: its weights, keys and values are discarded, and
their memory is free for the update. To sample, it wakes up for weights, receives those of the
policy, with its adapter merged into the base, wakes up for keys and values, and samples. Tokens are
weighted by policy / engine, as with a server.

The engine is made from the shape of the policy alone, with random weights and without a tokenizer:
prompts and completions are tokens. With several processes each has an engine for its completions.

Left out: models that one GPU cannot hold, whose engine would need several.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.config.online_rl import OnlineRL
from align.errors import UserError, printable
from align.online_rl.completions import Completions
from align.online_rl.models import ModelView
from align.online_rl.vllm import weights
from align.online_rl.vllm.completion import (
    Completion,
    InvalidCompletionError,
    as_completions,
    check_completion,
    request_seed,
    sampling_settings,
)
from align.runtime import distributed

_SHARE = "change `vllm_gpu_memory_utilization`, or use `vllm_mode: server`"
_OTHER = "use another version of vLLM, or `vllm_mode: server`"


@dataclass(frozen=True, slots=True)
class EngineSampler:
    """Samples with an engine of vLLM in this process, which sleeps before and after."""

    engine: Any
    """A ``vllm.LLM`` that sleeps."""
    policy: ModelView
    stops: set[int]
    """Tokens that end a completion."""
    config: OnlineRL

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> Completions:
        """Give the engine the policy's weights, and sample one completion per prompt."""
        limit = max_new_tokens or self.config.max_new_tokens
        with _plain_tensors(self.policy.model.device.type):
            self._wake_up("weights")
            self._call(
                "collective_rpc",
                "reload_weights",
                kwargs={"weights_iterator": weights.merged_weights(self.policy.model)},
            )
            if not self._call("reset_prefix_cache"):
                raise _error("reset_prefix_cache", "it was not done", _OTHER)
            self._wake_up("kv_cache")
            answers = self._sample(prompts, seeds=seeds, max_tokens=limit)
            self._call("sleep", level=2)
        try:
            completions = self._read(answers, prompts, max_tokens=limit)
        except InvalidCompletionError as error:
            raise _error("generate", error.reason, _OTHER) from None
        return as_completions(prompts, completions, self.stops)

    def _wake_up(self, tag: str) -> None:
        torch.cuda.empty_cache()  # vLLM allocates its memory without the allocator of torch
        self._call("wake_up", tags=[tag])

    def _sample(
        self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], max_tokens: int
    ) -> Any:
        from vllm import SamplingParams, TokensPrompt

        settings = [
            SamplingParams(
                **sampling_settings(
                    temperature=self.config.temperature,
                    max_tokens=max_tokens,
                    stops=self.stops,
                    seed=request_seed(seed),
                ),
                detokenize=False,
            )
            for seed in seeds
        ]
        tokens = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        return self._call("generate", tokens, settings, use_tqdm=False)

    def _read(
        self, answers: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int
    ) -> list[Completion]:
        """The completions in the answer of the engine, in the order of the prompts."""
        if len(answers) != len(prompts):
            reason = f"{len(answers)} answers where {len(prompts)} were requested"
            raise InvalidCompletionError(reason)
        completions = []
        for answer, prompt in zip(answers, prompts, strict=True):
            if answer.prompt_token_ids != list(prompt):
                raise InvalidCompletionError("an answer to another prompt")
            if len(answer.outputs) != 1:
                reason = f"{len(answer.outputs)} completions where 1 was requested"
                raise InvalidCompletionError(reason)
            (output,) = answer.outputs
            tokens, positions = list(output.token_ids), output.logprobs
            if positions is None:
                raise InvalidCompletionError("a completion without `logprobs`")
            if len(positions) != len(tokens):
                reason = f"{len(tokens)} tokens with {len(positions)} log-probabilities"
                raise InvalidCompletionError(reason)
            found = [each.get(token) for token, each in zip(tokens, positions, strict=True)]
            logps = [None if each is None else each.logprob for each in found]
            completions.append(
                check_completion(
                    tokens, logps, output.finish_reason, max_tokens=max_tokens, stops=self.stops
                )
            )
        return completions

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _guarded(method, lambda: getattr(self.engine, method)(*args, **kwargs))


def start(
    config: OnlineRL, policy: ModelView, stops: set[int], device: torch.device
) -> EngineSampler:
    """A sampler with an engine in this process, which sleeps.

    Raises:
        UserError: vLLM is not installed, this process has no GPU, the engine cannot be made, or
            the policy has weights that it cannot hold.
    """
    weights.check_mergeable(policy.model)
    # The engine has to be in this process, for it receives tensors. Read when it is made.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"vllm_mode: vLLM is not installed ({error}); install `vllm`, or remove `sampler`"
        ) from None
    if device.type != weights.DEVICE:
        raise UserError(
            f"vllm_mode: `colocate` needs an NVIDIA GPU, and the policy is on {device.type}; train "
            "on a GPU, or remove `sampler`"
        )
    torch.cuda.empty_cache()  # vLLM counts what torch holds as used
    with tempfile.TemporaryDirectory(prefix="align-vllm-") as folder:
        shape = copy.deepcopy(policy.model.config)
        shape.architectures = [type(policy.model).__name__]
        shape.save_pretrained(folder)
        settings = _engine_settings(config, folder)
        engine = _guarded("LLM", lambda: LLM(**settings))
    _guarded("sleep", lambda: engine.sleep(level=2))
    return EngineSampler(engine, policy, stops, config)


def _engine_settings(config: OnlineRL, folder: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``, for a model of the shape that is in a folder."""
    several = distributed.world_size() > 1
    half = "bfloat16" in (config.dtype, config.mixed_precision)
    return {
        "model": folder,
        "load_format": "dummy",  # random weights, until those of the policy come
        "skip_tokenizer_init": True,
        "dtype": "bfloat16" if half else "float32",
        "tensor_parallel_size": 1,
        "distributed_executor_backend": "external_launcher" if several else "uni",
        "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
        "max_model_len": -1,  # the longest that fits, up to the positions of the model
        "max_num_seqs": config.sample_batch_size,
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
    }


@contextlib.contextmanager
def _plain_tensors(device_type: str) -> Iterator[None]:
    """Inside this block vLLM computes in its own types, on tensors that it may change."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device_type, enabled=False),
    ):
        yield


def _guarded(method: str, call: Callable[[], Any]) -> Any:
    """The result of a call of vLLM, whose errors end the run with one line."""
    try:
        return call()
    except Exception as error:
        text = str(error)
        is_memory = isinstance(error, torch.OutOfMemoryError) or "memory" in text.lower()
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise _error(method, reason, _SHARE if is_memory else _OTHER) from error


def _error(method: str, reason: str, repair: str) -> UserError:
    """An error of the engine in one of its methods, on one line."""
    line = f"vllm_mode: vLLM: {method}: {' '.join(reason.split())[:300]}; {repair}"
    return UserError(printable(line))
