"""Drift of policies from the baseline: KL, entropy, unfinished completions, variety, length.

The KL divergence is estimated from completions that the policy itself sampled, which needs their
tokens and their log-probabilities under both models. Each model is loaded once: the policies score
their own samples, the baseline comes last and scores those of all policies.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from align.evaluation.intervals import Bootstrap
from align.evaluation.results import DriftMetrics
from align.models import tokenization
from align.models.generation import Completion
from align.models.logps import sampled_logps
from align.models.policy import Policy
from align.models.prefix_sharing import wrapper
from align.runtime import distributed
from align.runtime.progress import Logger

if TYPE_CHECKING:
    from align.config.evaluate import Evaluate
    from align.data.rows import Row
    from align.evaluation.completions import Samples

Completions = Sequence[Sequence[Completion]]
"""The completions of each prompt."""


@dataclass(frozen=True, slots=True)
class ScoredSamples:
    """Sampled completions under a model: sums over the tokens of each completion."""

    logps: Float[Tensor, "prompts completions"]
    entropies: Float[Tensor, "prompts completions"]
    vocabulary: str
    """Digest of the vocabulary of the model's tokenizer."""


class DriftMeter:
    """Collects log-probabilities while the models of an evaluation are loaded one after another."""

    def __init__(self, config: Evaluate, prompts: Sequence[Row], logger: Logger) -> None:
        self._config, self._prompts, self._logger = config, prompts, logger
        self._own: dict[str, ScoredSamples] = {}
        self._under_baseline: dict[str, ScoredSamples] = {}

    def add(self, name: str, policy: Policy, samples: Mapping[str, Samples]) -> None:
        """Score the samples of a loaded policy; if it is the baseline, those of all policies.

        ``samples`` has those of all policies so far. The baseline must come last. Nothing is scored
        where KL cannot be estimated.
        """
        if not self._config.measures_drift:
            return
        self._own[name] = self._score(name, policy, samples[name])
        if name == self._config.baseline:
            # Token ids of another vocabulary mean other texts here, or are out of range.
            own = self._own[name]
            others = [
                each
                for each, scored in self._own.items()
                if each != name and scored.vocabulary == own.vocabulary
            ]
            self._under_baseline = {
                each: self._score(name, policy, samples[each]) for each in others
            }

    def _score(self, name: str, policy: Policy, samples: Samples) -> ScoredSamples:
        return score_samples(
            policy, self._prompts, samples.completions, self._config, self._logger, name=name
        )

    def metrics(self, samples: Mapping[str, Samples]) -> tuple[DriftMetrics, ...]:
        """Drift of all policies, the baseline last."""
        config = self._config
        names = [*(name for name in config.policies if name != config.baseline), config.baseline]
        bootstrap = Bootstrap(config.confidence, config.resamples, config.seed)
        return measure(
            config.baseline,
            {name: samples[name].completions for name in names},
            self._own,
            self._under_baseline,
            bootstrap,
        )


def score_samples(
    policy: Policy,
    prompts: Sequence[Row],
    completions: Completions,
    config: Evaluate,
    logger: Logger,
    *,
    name: str,
) -> ScoredSamples:
    """Log-probabilities and entropies of completions under a model, which may be another one.

    All prompts have the same number of completions, each with its tokens. The ranks share the work.
    ``name`` is shown as the progress. With ``config.prefix_sharing``, the model computes shared
    prompts once from here on.
    """
    if config.prefix_sharing:
        wrapper.enable_prefix_sharing(policy.model)
    tokenized = tokenization.tokenize_prompts(policy.tokenizer, [row["prompt"] for row in prompts])
    rows = [
        (prompt, completion.tokens)
        for prompt, sampled in zip(tokenized, completions, strict=True)
        for completion in sampled
    ]

    def score(share: list[tuple[list[int], tuple[int, ...]]]) -> list[list[float]]:
        scored = sampled_logps(
            policy.model,
            policy.tokenizer,
            share,
            temperature=config.temperature,
            batch_size=config.batch_size,
        )
        return torch.stack([scored.logps, scored.entropies], dim=1).tolist()

    results = distributed.map_rows(
        rows, score, size=None, progress=partial(logger.step, unit=f"{name}: drift")
    )
    by_prompt = torch.tensor(results, dtype=torch.float64).view(len(prompts), -1, 2)
    vocabulary = sorted(policy.tokenizer.get_vocab().items())
    digest = hashlib.sha256(repr(vocabulary).encode("utf-8", "surrogatepass")).hexdigest()
    return ScoredSamples(by_prompt[..., 0], by_prompt[..., 1], digest)


def measure(
    baseline: str,
    completions: Mapping[str, Completions],
    own: Mapping[str, ScoredSamples],
    under_baseline: Mapping[str, ScoredSamples],
    bootstrap: Bootstrap,
) -> tuple[DriftMetrics, ...]:
    """Drift of every policy from the baseline, in the order of ``completions``.

    ``own`` has the samples of a policy under itself, ``under_baseline`` under the baseline, where
    both have the same vocabulary. A policy without them, such as a file of completions, has no KL
    and no entropy; the baseline has no KL.
    """
    words = {
        name: [completion.text.split() for row in rows for completion in row]
        for name, rows in completions.items()
    }
    distinct = [distinct_n_grams(words, n=n) for n in (1, 2)]
    results = []
    for name, rows in completions.items():
        flat = [completion for row in rows for completion in row]
        n_tokens = sum(len(completion.tokens) for completion in flat)
        has_tokens = all(completion.tokens for completion in flat)
        scored, reference = (
            each.get(name) if has_tokens else None for each in (own, under_baseline)
        )
        kl = kl_ci = None
        if scored is not None and reference is not None and name != baseline:
            logratios = scored.logps - reference.logps
            kl, kl_ci = logratios.mean().item(), bootstrap.mean(logratios)
        results.append(
            DriftMetrics(
                policy=name,
                reference=None if kl is None else baseline,
                kl=kl,
                kl_ci=kl_ci,
                kl_per_token=None if kl is None else kl * len(flat) / n_tokens,
                entropy=None if scored is None else scored.entropies.sum().item() / n_tokens,
                missing_eos=1 - sum(c.finished for c in flat) / len(flat) if has_tokens else None,
                mean_tokens=sum(c.n_tokens for c in flat) / len(flat) if has_tokens else None,
                mean_words=sum(map(len, words[name])) / len(flat),
                distinct_1=distinct[0][name],
                distinct_2=distinct[1][name],
            )
        )
    return tuple(results)


def distinct_n_grams(
    texts: Mapping[str, Sequence[Sequence[str]]], *, n: int
) -> dict[str, float | None]:
    """Share of distinct n-grams for each of several sets of texts, at equal numbers of n-grams.

    The number is that of the smallest set; for a larger one, the result is the expected share in a
    random subset of its n-grams. None for a set without an n-gram. Letter case is ignored.

    >>> distinct_n_grams({"a": [["to", "be", "or", "not", "to", "be"]]}, n=1)
    {'a': 0.6666666666666666}

    Source: Li et al. 2016, arXiv:1510.03055, section 5.3 (distinct-n); Hurlbert 1971, Ecology 52
    (4), 577 to 586, eq. 17 (the expected value).
    """
    counts = {name: Counter(_n_grams(sequences, n)) for name, sequences in texts.items()}
    least = min((each.total() for each in counts.values() if each), default=0)
    return {
        name: expected_distinct(each, draws=least) / least if each else None
        for name, each in counts.items()
    }


def expected_distinct(counts: Counter[tuple[str, ...]], *, draws: int) -> float:
    """Expected number of distinct items among ``draws`` that are drawn without replacement.

    An item that occurs c times in N is missed with probability ``C(N - c, draws) / C(N, draws)``.
    """
    total = counts.total()

    def log_choose(of: int) -> float:  # up to a term that all binomials share
        return math.lgamma(of + 1) - math.lgamma(of - draws + 1)

    expected = 0.0
    for count, items in Counter(counts.values()).items():
        missed = 0.0
        if total - count >= draws:
            missed = math.exp(log_choose(total - count) - log_choose(total))
        expected += items * (1 - missed)
    return expected


def _n_grams(texts: Iterable[Sequence[str]], n: int) -> Iterable[tuple[str, ...]]:
    for words in texts:
        folded = [word.casefold() for word in words]
        yield from zip(*(folded[i:] for i in range(n)), strict=False)
