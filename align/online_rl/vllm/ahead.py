"""Completions that are requested before the update that trains on them: asynchronous sampling.

While the policy is updated, the server samples for the next ``max_staleness`` updates. Before each
update it receives the new weights, with which requests that are under way continue. So every token
is of a policy that is at most ``max_staleness`` updates old. The server returns the probability
with which it was sampled, and the update weights it by policy / server, at most
``importance_cap``.

Requests are not part of a checkpoint: a resumed run requests them again, with its present weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from align.online_rl.completions import Completions
from align.online_rl.vllm.server import Requests, ServerSampler


class RequestsAhead:
    """Requests for the completions of steps to come.

    ``prompts`` and ``seeds`` are those of a step.
    """

    def __init__(
        self,
        sampler: ServerSampler,
        prompts: Callable[[int], Sequence[Sequence[int]]],
        seeds: Callable[[int], Sequence[int]],
        *,
        steps: int,
        max_staleness: int,
    ) -> None:
        self._sampler, self._prompts, self._seeds = sampler, prompts, seeds
        self._steps, self._max_staleness = steps, max_staleness
        self._requests: dict[int, tuple[int, Requests]] = {}
        self.staleness = 0
        """Updates between the request for the last completions and their use."""

    def take(self, step: int) -> Completions:
        """The completions of a step, before its update; those of later steps are requested."""
        self._sampler.send_weights()
        end = min(step + self._max_staleness + 1, self._steps)
        for later in range(step, end):
            if later not in self._requests:
                requests = self._sampler.request(self._prompts(later), seeds=self._seeds(later))
                self._requests[later] = step, requests
        requested, requests = self._requests.pop(step)
        self.staleness = step - requested
        return self._sampler.collect(requests)

    def wait(self) -> None:
        """Wait until all requests have an answer."""
        for _, requests in self._requests.values():
            self._sampler.collect(requests)
