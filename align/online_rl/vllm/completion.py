"""Completions as vLLM returns them, checked before they are trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.online_rl.completions import Completions

LARGEST_LOGP = 1e-3
"""Largest log-probability that rounding explains, in nats."""
_REPAIR = "start the server with the recipe's model, and without options that change completions"


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion."""

    tokens: list[int]
    """Its tokens, including the one that ends it."""
    logps: list[float]
    """Log-probability of each token according to the sampler, in nats."""


class InvalidCompletionError(Exception):
    """An answer that is no completion of the request."""

    def __init__(self, reason: str, repair: str = _REPAIR) -> None:
        super().__init__(reason)
        self.reason = reason
        self.repair = repair


def sampling_settings(
    *, temperature: float, max_tokens: int, stops: set[int], seed: int
) -> dict[str, Any]:
    """How one completion is sampled, by the names that a server and ``SamplingParams`` share.

    Everything that vLLM would otherwise take from the ``generation_config.json`` of its model is
    named, so that tokens have the probabilities of the policy.
    """
    return {
        "n": 1,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "ignore_eos": True,  # `stop_token_ids` are all tokens that end a completion
        "stop_token_ids": sorted(stops),
        "logprobs": 0,  # of the sampled token alone
    }


def request_seed(seed: int) -> int:
    """The seed of a completion as vLLM reads it, a whole number of 32 bits."""
    return seed % 2**31


def read_completion(answer: Any, *, max_tokens: int, stops: set[int]) -> Completion:
    """The one completion in the answer of a server to ``POST /v1/completions``.

    Raises:
        InvalidCompletionError: There is not exactly one, it lacks fields, or it is invalid.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise InvalidCompletionError(f"an answer without `choices`: {str(answer)[:200]!r}")
    if len(choices) != 1:
        raise InvalidCompletionError(f"{len(choices)} completions where 1 was requested")
    choice = choices[0] if isinstance(choices[0], dict) else {}
    logprobs = choice.get("logprobs")
    fields: dict[str, Any] = {
        "token_ids": choice.get("token_ids"),
        "logprobs.token_logprobs": (
            logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        ),
    }
    for name, value in fields.items():
        if not isinstance(value, list):
            raise InvalidCompletionError(f"a completion without `{name}`")
    tokens, logps = fields.values()
    return check_completion(
        tokens, logps, choice.get("finish_reason"), max_tokens=max_tokens, stops=stops
    )


def check_completion(
    tokens: Sequence[Any],
    logps: Sequence[Any],
    finish_reason: object,
    *,
    max_tokens: int,
    stops: set[int],
) -> Completion:
    """A completion, if it is one that the policy could have sampled up to a stop or the limit.

    Raises:
        InvalidCompletionError: It is not.
    """
    if len(tokens) != len(logps):
        raise InvalidCompletionError(f"{len(tokens)} tokens with {len(logps)} log-probabilities")
    if not tokens:
        raise InvalidCompletionError("a completion without tokens")
    for token in tokens:
        if type(token) is not int or token < 0:
            raise InvalidCompletionError(f"a token that is no number: {token!r}")
    for logp in logps:
        if not isinstance(logp, int | float) or not math.isfinite(logp) or logp > LARGEST_LOGP:
            raise InvalidCompletionError(f"a log-probability that is none: {logp!r}")
    if any(token in stops for token in tokens[:-1]):
        raise InvalidCompletionError("tokens after the one that ends a completion")
    if tokens[-1] not in stops and len(tokens) != max_tokens:
        raise InvalidCompletionError(
            f"a completion that ends after {len(tokens)} of {max_tokens} tokens without a token "
            f"that ends it ({finish_reason})"
        )
    return Completion(list(tokens), [min(float(logp), 0.0) for logp in logps])


def as_completions(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], stops: set[int]
) -> Completions:
    """Completions of prompts, in the prompts' order."""
    return Completions(
        [list(prompt) for prompt in prompts],
        [each.tokens for each in completions],
        [each.tokens[-1] in stops for each in completions],
        [each.logps for each in completions],
    )
