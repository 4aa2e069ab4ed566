"""The weighted sums over the keys from which the error bound of attention follows, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mla_spec.reference.attention import SoftmaxBlock, log_sum_exp
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
    zero = np.zeros(())
    total, error, error_square, weight_square = zero, zero, zero, zero
    columns, value_square, cells = zero, zero, zero
    least = np.full((), np.inf)
    for block in blocks:
        m, decay = block.max_score, block.decay
        least = np.minimum(least, np.where(block.visible, block.scores, np.inf).min(axis=-1, initial=np.inf))
        delta = score_error(block)
        surplus = _surplus(block, delta)  # w_j x_j
        total = total * decay + block.weights.sum(axis=-1)
        error = error * decay + surplus.sum(axis=-1)
        # x_j is inf where δ_j overflows; a weight of 0 stays 0
        error_square = error_square * decay + _product(surplus, np.expm1(delta)).sum(axis=-1)
        e = None if v_error is None else np.moveaxis(v_error[..., block.keys, :, :], -2, -3)
        square = block.v**2
        parts = [block.v, square] if e is None else [block.v, square, e, e**2]
        columns = columns * decay[..., None] + block.weights @ np.concatenate(parts, axis=-1)
        if cell is not None:
            grown = (block.weights + surplus) ** 2
            size_square = square if e is None else (np.abs(block.v) + e) ** 2
            weight_square = weight_square * decay**2 + grown.sum(axis=-1)
            value_square = value_square * decay[..., None] ** 2 + grown @ size_square
            cells = cells * decay[..., None] + _histogram(block, cell)
    divisor = np.where(total == 0, 1.0, total)
    each = divisor[..., None]
    means = columns / each
    dv = means.shape[-1] // (2 if v_error is None else 4)
    out, out_square, *v_errors = np.split(means, range(dv, means.shape[-1], dv), axis=-1)
    none = np.zeros_like(out)
    return BoundSums(
        max_score=m,
        max_abs_score=np.where(total == 0, 0.0, np.maximum(np.abs(m), np.abs(least))),
        lse=log_sum_exp(m, total),
        out=out,
        out_square=out_square,
        error=error / divisor,
        error_square=error_square / divisor,
        v_error=v_errors[0] if v_errors else none,
        v_error_square=v_errors[1] if v_errors else none,
        weight_square=weight_square / divisor**2,
        value_square=value_square / each**2,
        cells=cells / each,
    )


def _surplus(block: SoftmaxBlock, delta: Array) -> Array:
    """w_j expm1(δ_j) without cancellation; inf where it overflows."""
    small = delta < 300
    if small.all():
        return block.weights * np.expm1(delta)
    return np.where(
        small,
        block.weights * np.expm1(np.where(small, delta, 0.0)),
        np.exp(block.exponent + np.where(small, 0.0, delta)),
    )


def _product(surplus: Array, growth: Array) -> Array:
    """Surplus · growth with 0 · inf = 0."""
    return np.where(surplus == 0, 0.0, surplus * growth)


def _histogram(block: SoftmaxBlock, cell: float) -> Array:
    """Weight per cell of the score, [..., g, rows, CELLS]."""
    index = np.floor(block.scores * (1 / cell)).astype(np.int64)  # beyond 2^63 all scores share a cell
    index &= CELLS - 1
    rows = index.reshape(math.prod(index.shape[:-1]), index.shape[-1])  # a view
    rows += CELLS * np.arange(rows.shape[0])[:, None]
    counted = np.bincount(index.ravel(), weights=block.weights.ravel(), minlength=CELLS * rows.shape[0])
    return np.asarray(counted.reshape(*index.shape[:-1], CELLS), dtype=np.float64)
