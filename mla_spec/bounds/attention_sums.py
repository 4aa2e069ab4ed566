"""The weighted sums over the keys from which the error bound of attention follows, in one pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mla_spec.reference.attention import SoftmaxBlock, key_block, log_sum_exp
from mla_spec.reference.typing import Array

ScoreError = Callable[[SoftmaxBlock], Array]
"""Block -> an error δ ≥ 0 of each score, [..., g, rows, block]."""

CELLS = 256
"""Cells of the histogram of scores, a power of two; scores a multiple of ``CELLS`` cells apart share one, which only lowers the spread."""


@dataclass(frozen=True)
class BoundSums:
    """What one pass over the keys leaves; p are the exact weights, x_j = expm1(δ_j), rows as in ``SoftmaxBlock``.

    Attributes:
        max_score, max_abs_score: [..., g, rows]; -inf and 0 in a row without keys.
        lse: log Σ_j exp(s_j), [..., g, rows]; -inf in a row without keys.
        out, out_square: Σ p_j v_j and Σ p_j v_j², [..., g, rows, dv].
        error, error_square: Σ p_j x_j and Σ p_j x_j², [..., g, rows]; inf where they overflow.
        v_error, v_error_square: Σ p_j e_j and Σ p_j e_j², e being the error of v; 0 without one.
        weight_square, value_square: Σ (p_j(1 + x_j))² and Σ (p_j(1 + x_j))² (|v_j| + e_j)²; 0 unless asked for.
        cells: Σ p_j over the keys whose score falls in a cell, [..., g, rows, CELLS]; empty unless asked for.
    """

    max_score: Array
    max_abs_score: Array
    lse: Array
    out: Array
    out_square: Array
    error: Array
    error_square: Array
    v_error: Array
    v_error_square: Array
    weight_square: Array
    value_square: Array
    cells: Array


def bound_sums(
    blocks: Iterator[SoftmaxBlock], score_error: ScoreError, v_error: Array | None, cell: float | None
) -> BoundSums:
    """Sum over ``blocks``.

    Args:
        v_error: [..., t, g, dv].
        cell: width of a cell of scores, natural logarithm; None where roundings of P need no statistics.
    """
    sums: dict[str, Array] = defaultdict(lambda: np.zeros(()))
    least = np.full((), np.inf)
    for block in blocks:
        m = block.max_score
        least = np.minimum(least, _least_score(block))
        growth, surplus = _growth(block, score_error(block))  # x_j and w_j x_j
        by_row = {
            "total": block.weights.sum(axis=-1),
            "error": surplus.sum(axis=-1),
            "error_square": _dot(surplus, growth),
        }
        e = None if v_error is None else key_block(v_error, block.keys)
        square = block.v**2
        by_column = {"out": block.weights @ block.v, "out_square": block.weights @ square}
        if e is not None:
            by_column |= {"v_error": block.weights @ e, "v_error_square": block.weights @ e**2}
        for name, row in by_row.items():
            sums[name] = sums[name] * block.decay + row
        for name, column in by_column.items():
            sums[name] = sums[name] * block.decay[..., None] + column
        if cell is not None:
            grown = block.weights + surplus
            grown *= grown
            size_square = square if e is None else (np.abs(block.v) + e) ** 2
            sums["weight_square"] = sums["weight_square"] * block.decay**2 + grown.sum(axis=-1)
            sums["value_square"] = sums["value_square"] * block.decay[..., None] ** 2 + grown @ size_square
            sums["cells"] = sums["cells"] * block.decay[..., None] + _histogram(block, cell)
    total = sums["total"]
    divisor = np.where(total == 0, 1.0, total)
    each = divisor[..., None]
    out = sums["out"] / each
    v_errors = [np.broadcast_to(sums[name] / each, out.shape) for name in ("v_error", "v_error_square")]
    return BoundSums(
        max_score=m,
        max_abs_score=np.where(total == 0, 0.0, np.maximum(np.abs(m), np.abs(least))),
        lse=log_sum_exp(m, total),
        out=out,
        out_square=sums["out_square"] / each,
        error=sums["error"] / divisor,
        error_square=sums["error_square"] / divisor,
        v_error=v_errors[0],
        v_error_square=v_errors[1],
        weight_square=sums["weight_square"] / divisor**2,
        value_square=sums["value_square"] / each**2,
        cells=sums["cells"] / each,
    )


def _least_score(block: SoftmaxBlock) -> Array:
    """The smallest visible score of each row; inf where there is none."""
    shown = block.scores if block.visible.all() else np.where(block.visible, block.scores, np.inf)
    return np.asarray(shown.min(axis=-1, initial=np.inf))


def _growth(block: SoftmaxBlock, delta: Array) -> tuple[Array, Array]:
    """x_j = expm1(δ_j), inf where it overflows, and w_j x_j, inf only where that does; both without cancellation."""
    growth = np.expm1(delta)
    if delta.max(initial=0.0) < 300:
        return growth, block.weights * growth
    small = delta < 300
    large = np.exp(block.exponent + np.where(small, 0.0, delta))
    return growth, np.where(small, block.weights * np.where(small, growth, 0.0), large)


def _dot(surplus: Array, growth: Array) -> Array:
    """Σ_j surplus_j growth_j, with 0 · inf = 0: a weight of 0 stays 0."""
    if np.isinf(growth).any():
        growth = np.where(surplus == 0, 0.0, growth)
    return np.asarray(np.einsum("...j,...j->...", surplus, growth))


def _histogram(block: SoftmaxBlock, cell: float) -> Array:
    """Weight per cell of the score, [..., g, rows, CELLS]."""
    cells = block.scores * (1 / cell)
    index = np.floor(cells, out=cells).astype(np.int64)  # beyond 2^63 all scores share a cell
    index &= CELLS - 1
    rows = index.reshape(math.prod(index.shape[:-1]), index.shape[-1])  # a view
    rows += CELLS * np.arange(rows.shape[0])[:, None]
    counted = np.bincount(index.ravel(), weights=block.weights.ravel(), minlength=CELLS * rows.shape[0])
    return np.asarray(counted.reshape(*index.shape[:-1], CELLS), dtype=np.float64)
