"""The page of the proof table, in Markdown."""

from __future__ import annotations

import importlib.metadata
import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.proofs.methods import BOUND, METHODS, WITHOUT_POLICY, Method, Run
from benchmarks.proofs.world import TEXTS

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's distribution, for the mean of a number of seeds."""
LIBRARIES = ("torch", "transformers", "trl", "accelerate")
HEAD = f"""# Proofs

```bash
OMP_NUM_THREADS=1 python -m benchmarks.proofs --results proofs.jsonl --page docs/results/proofs.md
```

The command wrote this page. It trains every method where theory names the result: in a world of
two prompts and {len(TEXTS)} completions, so that a policy is a table that can be computed exactly.
All runs use the stages and trainers of Align; only the models are tiny. Each seed has another
world, with random rewards and a random reference. A test of the default tier reads this page: every
method and loss of Align has its row or a reason, and no divergence is above the bound.

In formulas, r is the reward of a completion, ref its probability under the reference, and h the
log-ratio of the policy to the reference, up to a constant for each prompt. w is the probability
that it is preferred to a completion of the reference, where r is the Bradley-Terry model of
preferences. Divergences are in nats per completion.

- **start**: KL(reference, named policy)
- **seeds**: KL(trained policy, named policy) for each seed; in bold where above {BOUND}
- **mean**: over the seeds, with its 95 % interval (Student)
"""
BIASED = """## Methods that theory sends elsewhere

Each has its own named policy. "Bias" is its distance from the optimum of reward and KL with the
same β: KL(named, optimum) by the formula, and KL(trained, optimum) as measured, means over seeds.
"""
NOTES = """- GRPO divides by the standard deviation s of a prompt's rewards, so a prompt with rewards that
  spread less follows them further: the difficulty bias. It divides by the length as well, so each
  token has a cost c that only normalization determines: the length bias. DAPO and CISPO have the
  first bias, GRPO without the deviation the second, Dr. GRPO none.
- With the KL penalty in the reward, GRPO has neither: advantages are 0 at the optimum, whatever
  divides them.
- With `kl_placement: token_loss` (as in TRL), a token pays for its own KL only. The first token is
  then chosen by the mean reward that follows it, not by reward minus KL.
- With β = 1 the advantages of GRPO, DAPO, GSPO and CISPO can collapse a policy here: s falls as it
  sharpens, which sharpens it further. The rows use `kl_coef: 2`.
- IPO and `sigmoid_norm` compare means per token (as in TRL), so lengths multiply what they learn.
- The two losses named "best of two" learn how often a completion wins, not by how much.
"""
EXCLUDED = """## Losses that exclude completions

A completion that loses more often than it wins has probability 0 in the minimizer, and the others
are filled up to a common level: π = ref · max(0, √((2w − 1)/λ) − 1). Columns are the probability
of the excluded completions: of the reference, of each seed (in bold where above {bound}), and the
mean.
"""
KTO = """
KTO measures gains from a reference point, an estimate of KL(policy, reference). It is the mean
log-ratio of completions of other prompts, and these come from the reference, not from the policy:
the mean is negative, and clamped at 0. At the end of training:

| loss | seed | reference point of the loss | KL(policy, reference) |
|---|---|---|---|
"""


def page(runs: Sequence[Run]) -> str:
    """The page with the tables of all runs."""
    unbiased = [method for method in METHODS if not method.zeros and not biased(method)]
    sections = [
        HEAD,
        "## Methods whose optimum is known\n",
        "The policy is the maximum of E[r] − β KL(policy, reference), which is ref · exp(r/β).\n",
        table(unbiased, runs),
        BIASED,
        table([method for method in METHODS if biased(method)], runs, with_bias=True),
        NOTES,
        EXCLUDED.format(bound=BOUND),
        table([method for method in METHODS if method.zeros], runs) + reference_points(runs),
        "## Losses that name no policy\n",
        "| loss of `dpo` | reason |\n|---|---|\n"
        + "".join(f"| `{loss}` | {reason} |\n" for loss, reason in WITHOUT_POLICY.items()),
        missing(runs),
        "## Versions\n",
        ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES) + ";",
        f"{len(runs)} runs, {sum(run.seconds for run in runs) / 60:.0f} minutes of processor time.\n",
    ]
    return "\n".join(sections)


def missing(runs: Sequence[Run]) -> str:
    """A section with the methods that have no run; empty if there are none."""
    trained = {run.method for run in runs}
    names = [method.name for method in METHODS if method.name not in trained]
    return "\n".join(["## Not run so far\n", *(f"- {name}" for name in names), ""]) if names else ""


def biased(method: Method) -> bool:
    """Whether theory names another policy than the optimum of reward and KL, with full support."""
    return not method.zeros and not method.is_unbiased


def table(methods: Iterable[Method], runs: Sequence[Run], *, with_bias: bool = False) -> str:
    """A table with one row for each method that has runs."""
    lines = [
        "| method | stage | named policy | start | seeds | mean |",
        "|---|---|---|---|---|---|",
    ]
    if with_bias:
        lines = [lines[0] + " bias: formula | bias: measured |", lines[1] + "---|---|"]
    for method in methods:
        own = sorted((run for run in runs if run.method == method.name), key=lambda run: run.seed)
        if not own:
            continue
        reached = [run.reached for run in own]
        cells = [
            method.name,
            f"`{method.stage}`",
            method.formula,
            f"{statistics.mean(run.start for run in own):.2f}",
            ", ".join(shown(value) for value in reached),
            mean_with_interval(reached),
        ]
        if with_bias:
            cells += [
                f"{statistics.mean(values):.2f}"
                for values in ([run.bias for run in own], [run.measured_bias for run in own])
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    """A divergence, in bold above the bound."""
    return f"{value:.3f}" if value <= BOUND else f"**{value:.3f}**"


def mean_with_interval(values: Sequence[float]) -> str:
    """The mean, and half the width of its 95 % interval; the mean alone for other numbers."""
    mean = statistics.mean(values)
    if len(values) not in T_95:
        return f"{mean:.3f}"
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def reference_points(runs: Sequence[Run]) -> str:
    """The table of KTO's reference points; empty without a run of KTO."""
    own = [run for run in runs if run.reference_point is not None]
    if not own:
        return ""
    return KTO + "".join(
        f"| {run.method} | {run.seed} | {run.reference_point:.2f} | {run.moved:.2f} |\n"
        for run in sorted(own, key=lambda run: (run.method, run.seed))
    )
