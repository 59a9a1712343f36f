"""The page of the proof table, in Markdown."""

from __future__ import annotations

import importlib.metadata
import math
import re
import statistics
from collections.abc import Mapping, Sequence

from align.config.stages import ONLINE_RL
from benchmarks.proofs.methods import BOUND, METHODS, WITHOUT_POLICY, Method
from benchmarks.proofs.runs import Run
from benchmarks.proofs.world import TEXTS

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's distribution, for the mean of a number of seeds."""
Kept = Mapping[str, Sequence[str]]
"""Lines of an earlier page, by method."""
MARK = "<!-- fingerprint {}: {} -->\n"
"""Line of a page that names the training and the theory of a method's rows."""
LIBRARIES = ("torch", "transformers", "trl", "accelerate")
HEAD = f"""# Proofs

```bash
OMP_NUM_THREADS=1 python -m benchmarks.proofs --results proofs.jsonl --page docs/results/proofs.md
```

The command wrote this page. It trains every method where theory names the result: in a world of
two prompts and {len(TEXTS)} completions, so that a policy is a table that can be computed exactly.
All runs use the stages and trainers of Align; only the models are tiny. Each seed has another
world, with random rewards and a random reference. A test of the default tier reads this page: every
method, every loss that the installed TRL has for SFT, DPO and KTO, and every choice of the keys
that shape the loss of online RL has its row or a reason, and no value under "seeds" is above the
bound.

{{}}

In formulas, r is the reward of a completion, ref its probability under the reference, and h the
log-ratio of the policy to the reference, up to a constant for each prompt. w is the probability
that it is preferred to a completion of the reference, where r is the Bradley-Terry model of
preferences. Divergences are in nats per completion.

- **start**: KL(reference, named policy)
- **seeds**: KL(trained policy, named policy) for each seed; in bold where above {BOUND}
- **mean**: over the seeds, with its 95 % interval (Student)
"""
HEAD_OF_EXCLUDED = """For the {} losses that [exclude completions](#losses-that-exclude-completions), that value is the
probability of the excluded completions. This is no divergence: a policy collapsed onto a single
other completion would have 0. The bias of single seeds lies off the formula; the farthest are:

{}"""
BIASED = """## Methods that theory sends elsewhere

Each has its own named policy. "Bias" is its distance from the optimum of reward and KL with the
same β: KL(named, optimum) by the formula, and KL(trained, optimum) as measured, for each seed. As
each seed has another world, the difference between measurement and formula is taken for each seed;
its mean has a 95 % interval.

The aim is a bias that the runs confirm to two digits. The measured mean is off the formula by up to
the difference plus half the width of its interval. Up to 5 % of the mean bias by the formula leave
two digits, up to 50 % one; rows with fewer than two are listed below their table.

### Losses
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
- `scale_advantages: batch` divides all prompts by the same deviation. It has no difficulty bias,
  but β is measured in units of that deviation.
- `normalize_scores` weighs two rewards by their spread under the policy, whatever their own units.
- With `filter: mixed_groups`, the KL term of the loss is measured on mixed groups only, which hold
  fewer of the completions that the policy already prefers: the KL penalty is weaker on those.
  Rewards are 0 or 1 in these rows, and groups have 4 completions. With the KL penalty in the reward
  the optimum is unchanged, because all advantages are 0 there.
- IPO and `sigmoid_norm` compare means per token (as in TRL), so lengths multiply what they learn.
- The two losses named "best of two" learn how often a completion wins, not by how much.
"""
EXCLUDED = """## Losses that exclude completions

A completion that loses more often than it wins has probability 0 in the minimizer, and the others
are filled up to a common level: π = ref · max(0, √((2w − 1)/λ) − 1). Columns are the probability
of the excluded completions: of the reference, of each seed (in bold where above {bound}), and the
mean; then the bias as above. KL(trained, named) is infinite while an excluded completion has any
probability. The last column is the other direction, KL(named, trained), for each seed (in bold
where above {bound}): it is finite, and large if the other completions have the wrong shares.

The objective is concave in the policy, so it has one maximum. But the gradient on a completion is a
multiple of its probability, and parameters are shared: the first steps carry completions of the
maximum below 1e-3 along with those that should go, and the noise of small batches keeps them there.
A slow test shows both in a loop without TRL, in the world of seed 2 with 320 steps and a learning
rate of 1.5e-3. With the exact gradient of the expected loss, KL(named, trained) ends within
{bound}; with batches of 200 sampled completions, above 1. These rows therefore have a lower
learning rate, larger batches, and pairs whose sides are equal as often as the distributions of
chosen and rejected completions allow. As the losses add a term of each side, matching sides leaves
the expected loss unchanged; it only makes batches more alike. The settings were chosen on seed 2.
Of two seeds outside the table, KTO ends at 0.018 nats with seed 3 and, above the bound, at 0.028
with seed 4; by the settings of the other rows it was 0.061 and 0.161.
"""
DIGITS = """
The runs confirm fewer than two digits of the mean bias by the formula for:

"""
TIME = """
{} training runs of {} methods took {:.0f} minutes of processor time in sum, without the start of
the processes: {:.1f} minutes on two cores{}."""
TARGET = 15
"""Minutes on two cores in which the whole page is to be computed."""
KTO = """
KTO measures gains from a reference point, an estimate of KL(policy, reference). It is the mean
log-ratio of completions of other prompts, and these come from the reference, not from the policy:
the mean is negative, and clamped at 0. At the end of training:

| loss | seed | reference point of the loss | KL(policy, reference) |
|---|---|---|---|
"""
KEPT = """
The rows of {} methods are of an earlier call of the command, with the same training and theory."""


def page(runs: Sequence[Run], before: str = "") -> str:
    """The page with the tables of all runs.

    A method without a run keeps its rows of the page ``before``, if those are of the present
    training and theory.
    """
    kept = kept_lines(before, {run.method for run in runs})
    full = [method for method in METHODS if biased(method) and not method.zeros]
    unbiased, losses, gradients, excluding = (
        table(methods, runs, kept)
        for methods in (
            [method for method in METHODS if not biased(method)],
            [each for each in full if each.stage not in ONLINE_RL],
            [each for each in full if each.stage in ONLINE_RL],
            [method for method in METHODS if method.zeros],
        )
    )
    sections = [
        HEAD.format(head_of_excluded(excluding)),
        "## Methods whose optimum is known\n",
        "The policy is the maximum of E[r] − β KL(policy, reference), which is ref · exp(r/β).\n",
        unbiased,
        BIASED,
        losses + digits(losses),
        "### Policy gradients\n",
        gradients + digits(gradients),
        NOTES,
        EXCLUDED.format(bound=BOUND),
        excluding + digits(excluding) + reference_points(runs, kept),
        "## Losses without a row\n",
        "| stage | loss | reason |\n|---|---|---|\n"
        + "".join(
            f"| `{stage}` | `{loss}` | {reason} |\n"
            for (stage, loss), reason in WITHOUT_POLICY.items()
        ),
        missing(runs, kept),
        "## Versions and time\n",
        ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES) + ".",
        *([KEPT.format(len(kept))] if kept else []),
        *([time_of(runs)] if runs else []),
        "",
        marks(runs, kept),
    ]
    return "\n".join(sections)


def marks(runs: Sequence[Run], kept: Kept) -> str:
    """The fingerprint of every method that the page has."""
    prints = {run.method: run.fingerprint for run in runs}
    prints |= {method.name: method.fingerprint for method in METHODS if method.name in kept}
    return "".join(MARK.format(digest, name) for name, digest in sorted(prints.items()))


def fingerprints(text: str) -> dict[str, str]:
    """The fingerprints on a page, by method."""
    digit, name = MARK.strip().split("{}: {}")
    found = re.findall(f"^{digit}([0-9a-f]*): (.*){name}$", text, re.MULTILINE)
    return {method: digest for digest, method in found}


def kept_lines(before: str, trained: set[str]) -> dict[str, list[str]]:
    """The lines of a page for methods that have no run and are unchanged since."""
    prints = fingerprints(before)
    lines: dict[str, list[str]] = {}
    for method in METHODS:
        if method.name in prints.keys() - trained and prints[method.name] == method.fingerprint:
            start = f"| {method.name} | "
            lines[method.name] = [line for line in before.splitlines() if line.startswith(start)]
    return lines


def missing(runs: Sequence[Run], kept: Kept) -> str:
    """A section with the methods that have no rows; empty if there are none."""
    trained = {run.method for run in runs} | kept.keys()
    names = [method.name for method in METHODS if method.name not in trained]
    return "\n".join(["## Not run so far\n", *(f"- {name}" for name in names), ""]) if names else ""


def biased(method: Method) -> bool:
    """Whether theory names another policy than the optimum of reward and KL."""
    return not method.is_unbiased


def table(methods: Sequence[Method], runs: Sequence[Run], kept: Kept) -> str:
    """A table with one row for each method that has runs, or a row of an earlier page.

    Methods that are biased have the columns of the bias; a table has only such, or none.
    """
    lines = [
        "| method | stage | named policy | start | seeds | mean |",
        "|---|---|---|---|---|---|",
    ]
    if any(map(biased, methods)):
        columns = " bias: formula | bias: measured | difference |"
        lines = [lines[0] + columns, lines[1] + "---|---|---|"]
    if any(method.zeros for method in methods):
        lines = [lines[0] + " KL(named, trained) |", lines[1] + "---|"]
    for method in methods:
        own = sorted((run for run in runs if run.method == method.name), key=lambda run: run.seed)
        if not own:
            lines += kept.get(method.name, [])[:1]
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
        if biased(method):
            columns = ([run.bias for run in own], [run.measured_bias for run in own])
            cells += [", ".join(f"{value:.3f}" for value in values) for values in columns]
            cells += [mean_with_interval([run.measured_bias - run.bias for run in own])]
        if method.zeros:
            divergences = [run.from_named for run in own if run.from_named is not None]
            complete = len(divergences) == len(own)
            cells += [", ".join(map(shown, divergences)) if complete else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def bias_cells(text: str) -> dict[str, tuple[list[float], list[float], str]]:
    """Biases by the formula, as measured, and their mean difference, by the rows of a table."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {
        row[0]: (list(map(float, row[6].split(", "))), list(map(float, row[7].split(", "))), row[8])
        for row in rows
    }


def head_of_excluded(text: str) -> str:
    """What the head of the page says about the rows of losses that exclude completions.

    Each is named with the seed whose measured bias is farthest from the formula.
    """
    lines = []
    for name, (formula, measured, _) in bias_cells(text).items():
        bias, value = max(
            zip(formula, measured, strict=True), key=lambda pair: abs(pair[1] - pair[0])
        )
        lines.append(f"- {name}: {value:.3f} measured against {bias:.3f}")
    return HEAD_OF_EXCLUDED.format(len(lines), "\n".join(lines)) if lines else ""


def digits(text: str) -> str:
    """A line for each row of a table whose bias is confirmed to one digit or to none."""
    lines = []
    for name, (formula, _, difference) in bias_cells(text).items():
        bias = statistics.mean(formula)
        mean, *half = (abs(float(part)) for part in difference.split(" ± "))
        off = mean + sum(half)
        if off > 0.05 * bias:
            known = "one digit" if off <= 0.5 * bias else "no digit"
            lines.append(f"- {name}: {bias:.3f}, off by up to {off:.3f}: {known}\n")
    return DIGITS + "".join(lines) if lines else ""


def time_of(runs: Sequence[Run]) -> str:
    """The processor time of all runs, compared with the target if every method has one."""
    minutes = sum(run.seconds for run in runs) / 60
    methods = {run.method for run in runs}
    relation = "above" if minutes / 2 > TARGET else "within"
    target = f", {relation} the {TARGET} minutes that are the aim"
    target = target if methods >= {method.name for method in METHODS} else ""
    return TIME.format(len(runs), len(methods), minutes, minutes / 2, target)


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


def reference_points(runs: Sequence[Run], kept: Kept) -> str:
    """The table of KTO's reference points; empty without KTO."""
    own = sorted(
        (run for run in runs if run.reference_point is not None),
        key=lambda run: (run.method, run.seed),
    )
    lines = [line for name in sorted(kept) for line in kept[name][1:]]
    for run in own:
        cells = [run.method, str(run.seed), f"{run.reference_point:.2f}", f"{run.moved:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return KTO + "".join(f"{line}\n" for line in lines) if lines else ""
