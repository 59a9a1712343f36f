"""Sampling with a vLLM server.

Before each sampling, the server receives the policy's weights, with its adapter merged into the
base. It returns the log-probability of each token with the completions. They differ slightly from
the policy's, so the update weights tokens by policy / server, at most ``importance_cap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any

from align.config.online_rl import OnlineRL
from align.errors import UserError
from align.online_rl.completions import Completions
from align.online_rl.models import ModelView
from align.online_rl.vllm.client import Client
from align.online_rl.vllm.completion import Completion, as_completions, request_seed
from align.online_rl.vllm.weights import WeightChannel, check_mergeable
from align.runtime import distributed


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests for completions that are under way."""

    prompts: list[list[int]]
    futures: list[Future[Completion]]


@dataclass(frozen=True, slots=True)
class ServerSampler:
    """Samples with a vLLM server.

    The main process sends weights; each process requests its own completions.
    """

    client: Client
    channel: WeightChannel | None
    """How weights are sent; None on other processes than the main one."""
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
        """Send the policy's weights, and sample one completion per prompt."""
        self.send_weights()
        return self.collect(self.request(prompts, seeds=seeds, max_new_tokens=max_new_tokens))

    def send_weights(self) -> None:
        """Send the policy's weights to the server. The main process sends, and all ranks wait."""
        if self.channel is not None:
            self.channel.send(self.policy.model)
        distributed.barrier()

    def request(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> Requests:
        """Request one completion per prompt, without waiting for any."""
        futures = [
            self.client.complete(
                prompt,
                temperature=self.config.temperature,
                max_tokens=max_new_tokens or self.config.max_new_tokens,
                stops=self.stops,
                seed=request_seed(seed),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return Requests([list(prompt) for prompt in prompts], futures)

    def collect(self, requests: Requests) -> Completions:
        """The completions, once all have arrived; the first error ends the wait, on all ranks."""
        done, _ = wait(requests.futures, return_when=FIRST_EXCEPTION)
        problem: UserError | None = None
        try:
            for future in done:
                future.result()
        except UserError as error:
            problem = error
        distributed.raise_together(problem)
        completions = [future.result() for future in requests.futures]
        return as_completions(requests.prompts, completions, self.stops)


def connect(config: OnlineRL, policy: ModelView, stops: set[int], device: Any) -> ServerSampler:
    """A sampler with the server at ``config.vllm_url``.

    Raises:
        UserError: vLLM is not installed, the server cannot be reached or is not set up for online
            RL, or the policy has weights that it cannot hold.
    """
    check_mergeable(policy.model)
    client = Client(config.vllm_url, timeout=config.vllm_timeout)
    channel = WeightChannel(client, device) if distributed.is_main() else None
    return ServerSampler(client, channel, policy, stops, config)
