"""Agreement of the annotators of a session, and what each of them has decided."""

from __future__ import annotations

import math
from collections.abc import Sequence

from align.evaluation.annotation.session import Annotator


def agreement_line(preferences: Sequence[Sequence[float]]) -> str:
    """Krippendorff's alpha with its interval, over the pairs that several annotators decided."""
    several = [row for row in preferences if sum(not math.isnan(value) for value in row) > 1]
    if not several:
        return "Agreement: no pair has two decisions yet."
    import torch

    from align.functional.agreement import krippendorff_alpha

    alpha = krippendorff_alpha(torch.tensor(several, dtype=torch.float64))
    pairs = f"{len(several):,} shared pair{'s' * (len(several) > 1)}"
    if math.isnan(alpha.value):
        return f"Agreement: not defined yet, over {pairs}."
    low, high = alpha.interval
    return f"Agreement: α {alpha.value:.2f} ({low:.2f} to {high:.2f}), over {pairs}."


def annotator_lines(annotators: dict[str, Annotator]) -> list[str]:
    """One line for each annotator: decisions, skipped pairs, attention checks, time."""
    lines = []
    for name, person in annotators.items():
        skipped = sum(map(math.isnan, person.decisions.values()))
        line = f"{name or '(no name)'}: {len(person.decisions) - skipped:,} decided"
        line += f", {skipped:,} skipped" if skipped else ""
        if person.n_checks:
            line += f", attention checks {person.n_passed} of {person.n_checks}"
        if person.n_rows and person.seconds:
            line += f", {person.seconds / person.n_rows:.0f} s each"
        lines.append(line)
    return lines
