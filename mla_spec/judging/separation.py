"""What separates the cases that fail from those that pass: one size, option or regime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from mla_spec.judging.regime_count import together
from mla_spec.operations.all import REGIMES
from mla_spec.operations.case import Case

FEWEST = 3
"""Cases that must lie on the other side before a boundary means anything."""

History = list[tuple[Case, bool]]
"""Cases in the order in which they ran, and whether each failed."""


def separation(history: History) -> dict[str, Any]:
    """The condition that all failing cases satisfy and the fewest passing ones; empty where none says anything.

    ``field`` is a field of the case, or the longest, shortest or number of one that has several values, or a regime. ``is``
    or ``least`` or ``most`` is its value. ``failing`` counts the failing cases, ``passing`` those that pass though they
    satisfy it, ``elsewhere`` those that pass and do not.
    """
    failing = [_features(case) for case, failed in history if failed]
    passing = [_features(case) for case, failed in history if not failed]
    if not failing:
        return {}
    shared = set.intersection(*(set(f) for f in (*failing, *passing)))
    found = [
        {"field": name, **condition, "failing": len(failing)} | _counts(name, condition, passing)
        for name in failing[0]
        if name in shared
        for condition in _conditions([f[name] for f in failing])
    ]
    best = max(found, key=lambda each: each["elsewhere"], default={"elsewhere": 0})
    return best if best["elsewhere"] >= FEWEST else {}


def by_regime(history: History, ratios: Sequence[float | None]) -> dict[str, dict[str, Any]]:
    """What came of the cases of each regime; ``ratios`` has the largest error / bound of every case."""
    return together(
        {name: {"cases": 1, "failed": int(failed), "worst": ratio}}
        for (case, failed), ratio in zip(history, ratios, strict=True)
        for name, holds in REGIMES.get(case.kind, ())
        if holds(case)
    )


def _features(case: Case) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for f in fields(case):
        value = getattr(case, f.name)
        if f.name == "seed":
            continue
        if isinstance(value, tuple):
            features[f"number of {f.name}"] = len(value)
            if value and all(isinstance(each, int) for each in value):
                features |= {f"longest of {f.name}": max(value), f"shortest of {f.name}": min(value)}
        else:
            features[f.name] = value
    return features | {f"regime {name!r}": bool(holds(case)) for name, holds in REGIMES.get(case.kind, ())}


def _conditions(values: list[Any]) -> Iterable[dict[str, Any]]:
    """What holds of all of ``values``."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        yield {"least": min(values)}
        yield {"most": max(values)}
    elif len(set(values)) == 1:
        yield {"is": values[0]}


def _counts(name: str, condition: dict[str, Any], passing: list[dict[str, Any]]) -> dict[str, int]:
    inside = sum(satisfies(f[name], condition) for f in passing)
    return {"passing": inside, "elsewhere": len(passing) - inside}


def satisfies(value: Any, condition: dict[str, Any]) -> bool:
    """Whether a value is what a condition says."""
    if "is" in condition:
        return bool(value == condition["is"])
    if value is None:
        return False
    return bool(value >= condition["least"] if "least" in condition else value <= condition["most"])


def threshold(inside: list[float], outside: list[float]) -> dict[str, float]:
    """The boundary between two groups of numbers: the least or the most of the first; empty where they overlap."""
    if inside and outside:
        if min(inside) > max(outside):
            return {"least": min(inside)}
        if max(inside) < min(outside):
            return {"most": max(inside)}
    return {}
