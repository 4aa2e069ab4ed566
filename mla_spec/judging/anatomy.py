"""The anatomy of an error: which elements are wrong, where they lie, and how what was got relates to what was wanted.

All of it is plain data that JSON can hold: numbers that are not finite are text.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mla_spec.reference.typing import Array, BoolArray, IntArray

SAMPLE = 48
"""Elements of a wrong result that are kept: the worst ones, and others evenly over all."""

GRID = 24, 32
"""Rows and columns that a grid of errors has at most."""

ROUNDING = 16.0
"""Errors up to so many bounds may come of a coarser rounding; a wrong formula is mostly further off."""

Anatomy = dict[str, Any]
"""``what`` was judged, its ``shape``, how many elements are ``wrong``, whether it was judged ``within`` a bound or by its bits,
the largest error / bound (``excess``), the ``pattern`` with its ``value``, ``where``, and a ``sample``.

``pattern`` is one of "nan", "infinite", "zero", "factor", "offset", "factors" (one each row), "rounding" and "other".
``where`` has, by the number of an axis, the ranges [first, last] of the indices that are wrong, for axes of which others are
right. ``sample`` is a list of [flat index, got, want, bound]. ``grid`` has the largest error / bound over the last axis: rows are all
other axes but the last of them, such as queries, columns are that one, such as heads. Of large results, so many neighbours are one
cell that there are at most ``GRID``; of results with fewer than three axes it is empty.
"""


def anatomy_of(what: str, got: Array, want: Array, allowed: Array | None) -> Anatomy:
    """The anatomy of a result that is not what it should be; ``allowed`` is None where bits were compared."""
    bound = np.zeros(want.shape) if allowed is None else np.broadcast_to(allowed, want.shape)
    excess = _excess(got, want, bound)
    wrong = excess > 1
    pattern, value = _pattern(got, want, bound, wrong, float(excess.max(initial=0.0)))
    return {
        "what": what,
        "shape": list(want.shape),
        "wrong": int(wrong.sum()),
        "judged": "bits" if allowed is None else "within",
        "excess": _plain(float(excess.max(initial=0.0))),
        "pattern": pattern,
        "value": None if value is None else _plain(value),
        "where": {str(axis): ranges for axis, ranges in _where(wrong).items()},
        "sample": _sample(got, want, bound, excess),
        "grid": _grid(excess),
    }


def _excess(got: Array, want: Array, bound: Array) -> Array:
    """|got − want| / bound; 0 where both are the same, inf where one alone is finite."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(all="ignore"):
        ratio = np.abs(got - want) / bound
    return np.where(same, 0.0, np.where(np.isfinite(ratio), ratio, np.inf))


def _pattern(got: Array, want: Array, bound: Array, wrong: BoolArray, excess: float) -> tuple[str, float | None]:
    g, w, b = got[wrong], want[wrong], bound[wrong]
    if g.size == 0:
        return "other", None
    if np.isnan(g).any():
        return "nan", None
    if not np.isfinite(g).all() or not np.isfinite(w).all():
        return "infinite", None
    if (g == 0).all():
        return "zero", None
    if excess <= ROUNDING:
        return "rounding", None
    return _relation(g, w, 2 * b) or _relation_of_rows(got, want, 2 * bound, wrong) or ("other", None)


def _relation(g: Array, w: Array, slack: Array) -> tuple[str, float] | None:
    """The one factor or offset that makes ``w`` into ``g``."""
    if g.size < 2 or np.ptp(w) <= slack.max():
        return None
    factor = float((g * w).sum() / (w * w).sum())
    if (np.abs(g - factor * w) <= slack * max(1.0, abs(factor))).all():
        return "factor", factor
    offset = float(np.median(g - w))
    return ("offset", offset) if (np.abs(g - w - offset) <= slack).all() else None


def _relation_of_rows(got: Array, want: Array, slack: Array, wrong: BoolArray) -> tuple[str, None] | None:
    """Whether every row of the last axis has a factor of its own."""
    width = got.shape[-1] if got.ndim else 0
    if width < 2:
        return None
    rows = wrong.reshape(-1, width).any(axis=-1)
    g, w, s = (x.reshape(-1, width)[rows] for x in (got, want, slack))
    if not np.isfinite(g).all() or not (w != 0).any(axis=-1).all():
        return None
    factor = (g * w).sum(axis=-1, keepdims=True) / (w * w).sum(axis=-1, keepdims=True)
    fits = np.abs(g - factor * w) <= s * np.maximum(1.0, np.abs(factor))
    return ("factors", None) if fits.all() else None


def _where(wrong: BoolArray) -> dict[int, list[list[int]]]:
    found = {}
    for axis in range(wrong.ndim):
        hit = wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != axis))
        if hit.any() and not hit.all():
            found[axis] = _ranges(np.flatnonzero(hit))
    return found


def _ranges(indices: IntArray) -> list[list[int]]:
    """Consecutive indices as [first, last]."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return [[int(run[0]), int(run[-1])] for run in np.split(indices, breaks)]


def _sample(got: Array, want: Array, bound: Array, excess: Array) -> list[list[Any]]:
    worst = np.argsort(-excess.ravel(), kind="stable")[: SAMPLE // 2]
    even = np.linspace(0, excess.size - 1, SAMPLE // 2).astype(int)
    chosen = sorted({int(i) for i in (*worst, *even)}) if excess.size else []
    return [[i, *(_plain(float(x.flat[i])) for x in (got, want, bound))] for i in chosen]


def _grid(excess: Array) -> list[list[float | str]]:
    if excess.ndim < 3 or excess.size == 0:
        return []
    cells = excess.max(axis=-1).reshape(-1, excess.shape[-2])
    for axis, most in enumerate(GRID):
        step = -(-cells.shape[axis] // most)
        cells = np.maximum.reduceat(cells, range(0, cells.shape[axis], step), axis=axis)
    return [[_plain(float(f"{x:.3g}")) for x in row] for row in cells]


def _plain(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def same_wrong_numbers(one: Anatomy, other: Anatomy) -> bool:
    """Whether two wrong results of the same call are the same, but for what honest roundings may change."""
    keys = ("what", "shape", "judged")
    if not one or not other or any(one[key] != other[key] for key in keys):
        return False
    mine, theirs = ({row[0]: row[1:] for row in each["sample"]} for each in (one, other))
    common = mine.keys() & theirs.keys()
    if len(common) < len(mine) // 2 or not any(_is_wrong(mine[i]) for i in common):
        return False
    return all(_close(float(mine[i][0]), float(theirs[i][0]), float(mine[i][2])) for i in common)


def _is_wrong(row: list[Any]) -> bool:
    got, want, bound = (float(x) for x in row)
    return not (abs(got - want) <= bound or got == want)


def _close(a: float, b: float, bound: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 2 * bound
