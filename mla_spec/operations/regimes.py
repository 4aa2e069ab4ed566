"""Regimes: the kinds of numbers and structure that cases have, by which coverage is counted.

A case may belong to several; every regime of a kind of case is one that some law should see in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Regime = tuple[str, Callable[[Any], bool]]
"""A name, and whether a case belongs to it."""


def _has(field: str, value: str, case: Any) -> bool:
    return bool(getattr(case, field) == value)


def values(field: str, *names: str) -> list[Regime]:
    return [(name, partial(_has, field, name)) for name in names]


SCORES: list[Regime] = [
    ("flat scores", lambda case: case.logit_std <= 0.1),
    ("moderate scores", lambda case: 0.1 < case.logit_std <= 4),
    ("peaked scores", lambda case: 4 < case.logit_std <= 256),
    ("huge scores", lambda case: case.logit_std > 256),
]
QUERIES: list[Regime] = [
    ("one query", lambda case: case.s == 1),
    ("several queries", lambda case: case.s > 1),
]
PACKED: list[Regime] = [
    ("no keys", lambda case: 0 in case.seqlens_k),
    ("no queries", lambda case: 0 in case.seqlens_q),
    ("more keys than queries", lambda case: any(t > n for n, t in _lengths(case))),
    ("fewer keys than queries", lambda case: any(t < n for n, t in _lengths(case))),
]


def _lengths(case: Any) -> list[tuple[int, int]]:
    return list(zip(case.seqlens_q, case.seqlens_k, strict=True))
