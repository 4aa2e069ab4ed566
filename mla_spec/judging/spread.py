"""How large errors are beside what is allowed and what is predicted: counts of elements, as plain data.

``bound`` has |error| / bound, ``predicted`` |error| / predicted standard deviation. Both count in powers of two: "-3" has what is above
2^-3 and at most 2^-2, "exact" what has no error. The first and the last power that are counted also have what lies beyond them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from mla_spec.reference.typing import Array

Spread = dict[str, dict[str, int]]

POWERS: Final = {"bound": range(-20, 0), "predicted": range(-20, 4)}
"""By kind, what is counted. No error that is above its bound is, nor is any law's that does not hold."""

EXACT: Final = "exact"


def counted(kind: str, ratio: Array) -> dict[str, int]:
    """The counts of ratios, none below 0."""
    powers, wrong = POWERS[kind], ratio[ratio > 0]
    bins = np.clip(np.ceil(np.log2(wrong)) - 1, powers[0], powers[-1]).astype(int)
    values, counts = np.unique(bins, return_counts=True)
    found = {str(value): int(count) for value, count in zip(values, counts, strict=True)}
    return found | ({EXACT: int((ratio == 0).sum())} if (ratio == 0).any() else {})


def added(parts: Iterable[Spread]) -> Spread:
    """The counts of several."""
    found: Spread = {}
    for part in parts:
        for name, counts in part.items():
            own = found.setdefault(name, {})
            for value, count in counts.items():
                own[value] = own.get(value, 0) + count
    return found
