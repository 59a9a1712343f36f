"""Labels: the texts and the numbers that stand for true or false."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LABELS = {"true": True, "1": True, "false": False, "0": False}


def label_of(value: object, labels: Mapping[str, bool] | None = None) -> bool | None:
    """The label of a value, true, false, 1 or 0; None if the value is no label.

    ``labels`` maps others instead, in lower case.

    >>> label_of("1.0"), label_of("Up", {"up": True}), label_of("math")
    (True, True, None)
    """
    text = str(value).strip().lower()
    text = re.sub(r"^([-+]?\d+)\.0*$", r"\1", text).removeprefix("+")  # whole numbers as such
    return (labels or _LABELS).get(text)
