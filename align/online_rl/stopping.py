"""The stop rule: a judge compares the policy with the best policy so far, on held-out prompts.

Each check draws prompts of the held-out split with replacement, and a fresh completion of each from
both policies. Given the policies, its comparisons are therefore independent of all earlier ones,
and their expectation is the win rate on the split: what
:func:`align.functional.sequential.decline_e_values` requires. The run stops when the e-value
reaches ``1 / alpha``. A policy that wins at least half of a check becomes the best policy.

Training reads nothing of this: until it stops, a run has the weights that it has without the rule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.online_rl import OnlineRL
from align.config.stopping import Stop
from align.data.rows import Row
from align.functional.sequential import decline_e_values
from align.judges.base import Pair
from align.judges.build import Judge, build_judges, check_rows
from align.judges.preferences import preferences
from align.models import tokenization
from align.online_rl.models import OnlineRLModels
from align.online_rl.prompts import Prompts
from align.online_rl.results import StopMetrics
from align.online_rl.sampling import Sampler
from align.online_rl.sharding import divided_like
from align.runtime import distributed
from align.runtime.progress import Logger, NullDisplay
from align.runtime.seeds import derive_seed, derive_seeds, generator


@dataclass(slots=True)
class StopRule:
    """The judge, its prompts, the best policy so far, and the comparisons of all checks."""

    stop: Stop
    judges: Mapping[str, Judge]
    prompts: Prompts
    """All prompts of the held-out split."""
    per_check: int
    """Comparisons in each check."""
    planned: int
    """Checks of a run that is not stopped."""
    batch_size: int
    models: OnlineRLModels
    sampler: Sampler
    seed: int
    best_step: int = 0
    """Updates of the best policy so far."""
    best: list[Tensor] = field(default_factory=list)
    """Its trainable parameters."""
    best_training: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the batch that the best policy sampled; those of the step that made it, if no
    batch followed."""
    best_held_out: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the best policy on the held-out prompts."""
    outcomes: list[list[float]] = field(default_factory=list)
    """Preference for the policy over the best one in each comparison of each check."""

    @property
    def e_values(self) -> list[float]:
        """The e-value after each check."""
        if not self.outcomes:
            return []
        values: list[float] = decline_e_values(
            torch.tensor(self.outcomes, dtype=torch.float64), planned=self.planned
        ).tolist()
        return values

    @property
    def stops(self) -> bool:
        """Whether the last check stops the run."""
        return bool(self.outcomes) and self.e_values[-1] >= 1 / self.stop.alpha

    def check(
        self,
        done: int,
        *,
        training: Mapping[str, float],
        held_out: Mapping[str, float],
    ) -> dict[str, float]:
        """Compare the policy after ``done`` updates with the best one; returns metrics to log.

        A collective call. Before the first update, the policy becomes the best one. ``training``
        and ``held_out`` are its metrics, stored with it if it does.
        """
        if done == 0:
            self._keep(0, training, held_out)
            return {}
        places = torch.randint(
            len(self.prompts), (self.per_check,), generator=generator(self.seed, "stop", done)
        )
        prompts = self.prompts.select(places.tolist())
        completions = self._sample(prompts, "stop", done)
        with self._best_policy():
            of_best = self._sample(prompts, "stop-best", done)
        outcomes = preferences(
            self.judges,
            _pairs(prompts.rows, completions, of_best),
            batch_size=self.batch_size,
            logger=Logger("stop", Path(), NullDisplay(), main=False),
        )
        self.outcomes.append(outcomes)
        decided = [each for each in outcomes if not math.isnan(each)]
        win_rate = sum(decided) / len(decided) if decided else math.nan
        if win_rate >= 0.5:
            self._keep(done, training, held_out)
        metrics = {"stop_e_value": self.e_values[-1], "best_step": float(self.best_step)}
        return metrics | ({"stop_win_rate": win_rate} if decided else {})

    def add_batch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store the metrics of a step, counted from 0, if the best policy sampled its batch."""
        if step == self.best_step:
            self.best_training = metrics

    def restore_best(self) -> None:
        """Give the policy the weights of the best one, to be saved."""
        self._load(self.best)

    def result(self, done: int, steps: int) -> StopMetrics:
        """What the rule found in a run that ended after ``done`` of ``steps`` updates."""
        (judge,) = self.judges
        return StopMetrics(
            judge=judge,
            alpha=self.stop.alpha,
            is_stopped=self.stops and done < steps,
            best_step=self.best_step,
            checks=len(self.outcomes),
            e_value=self.e_values[-1] if self.outcomes else 1.0,
            missing=sum(math.isnan(each) for check in self.outcomes for each in check),
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores beside the weights of the best policy, as JSON types."""
        outcomes = [[None if math.isnan(o) else o for o in check] for check in self.outcomes]
        return {
            "best_step": self.best_step,
            "best_training": dict(self.best_training),
            "best_held_out": dict(self.best_held_out),
            "outcomes": outcomes,
        }

    def restore(self, state: Mapping[str, Any], best: Sequence[Tensor]) -> None:
        """Continue from :meth:`state` and the weights of the best policy of a checkpoint."""
        self.best_step = state["best_step"]
        self.best_training, self.best_held_out = state["best_training"], state["best_held_out"]
        self.outcomes = [[math.nan if o is None else o for o in each] for each in state["outcomes"]]
        self.best = [
            weight.to(p.device) for weight, p in zip(best, self._parameters(), strict=True)
        ]

    def _parameters(self) -> list[Tensor]:
        return list(self.models.parameters(self.models.policy))

    def _keep(
        self, done: int, training: Mapping[str, float], held_out: Mapping[str, float]
    ) -> None:
        self.best_step, self.best_training, self.best_held_out = done, training, held_out
        self.best = [p.detach().clone() for p in self._parameters()]

    def _load(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, weight in zip(self._parameters(), weights, strict=True):
                p.copy_(divided_like(weight, p))

    @contextlib.contextmanager
    def _best_policy(self) -> Iterator[None]:
        """Inside this block, the policy is the best one so far."""
        trained = [p.detach().clone() for p in self._parameters()]
        self._load(self.best)
        try:
            yield
        finally:
            self._load(trained)

    def _sample(self, prompts: Prompts, purpose: str, done: int) -> list[str]:
        """One completion per prompt, on every rank; the ranks share the work."""

        def generate(places: list[int]) -> list[str]:
            seeds = derive_seeds(derive_seed(self.seed, purpose, done), places)
            tokens = prompts.select(places).tokens
            with self.models.mixed_precision():
                return self.sampler.generate(tokens, seeds=seeds).texts(self.models.tokenizer)

        return distributed.map_rows(range(len(prompts)), generate, size=None)


def _pairs(rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> list[Pair]:
    turn = tokenization.assistant_turn
    return [
        Pair(
            row["prompt"],
            turn(one),
            turn(other),
            {key: row[key] for key in sorted(row.keys() - {"prompt"})},
        )
        for row, one, other in zip(rows, first, second, strict=True)
    ]


def build_stop_rule(
    config: OnlineRL,
    inputs: Mapping[str, Path | str],
    rows: Sequence[Row],
    tokenize: Callable[[Sequence[Row]], Prompts],
    models: OnlineRLModels,
    sampler: Sampler,
    *,
    runs: Path,
) -> StopRule | None:
    """The stop rule of a recipe on the held-out ``rows``; None if it has none.

    Verdicts of a server are stored in ``runs``.

    Raises:
        UserError: The judge cannot be loaded, or cannot score the prompts.
    """
    stop = config.stop
    if stop is None:
        return None
    judges = build_judges(
        stop.judge,
        {"judge": inputs["stop.judge"]} if "stop.judge" in inputs else {},
        runs=runs,
        dtype=config.dtype,
        quantization=None,
        batch_size=config.sample_batch_size,
    )
    check_rows(judges, rows, repair="name another `judge` in `stop`")
    return StopRule(
        stop,
        judges,
        tokenize(rows),
        per_check=config.n_eval_prompts,
        planned=config.evaluations,
        batch_size=config.sample_batch_size,
        models=models,
        sampler=sampler,
        seed=config.seed,
    )
