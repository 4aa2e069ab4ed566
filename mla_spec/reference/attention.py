"""Softmax attention with its log-sum-exp: the only attention loop of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mla_spec.reference.typing import Array, BoolArray, IntArray

ScoreError = Callable[[Array, slice], Array]
"""(scores [..., g, rows, block], keys of the block) -> an error δ ≥ 0 of each score, same shape."""

Columns = Callable[[Array], Array]
"""Rows of v [..., g, block, dv] -> what is averaged instead of them, [..., g, block, width]."""


@dataclass(frozen=True)
class SoftmaxSums:
    """What one pass over the keys leaves, rows being (head of group, query) pairs and x_j the columns of key j.

    Attributes:
        max_score, max_abs_score: [..., g, rows]; -inf and 0 in a row without keys.
        lse: log Σ_j exp(s_j), [..., g, rows]; -inf in a row without keys.
        mean: Σ_j p_j x_j, [..., g, rows, width].
        excess_total, excess: Σ_j p_j expm1(δ_j), [..., g, rows], and Σ_j p_j expm1(δ_j) x_j, like ``mean``; inf or NaN
            where they overflow, and 0 without a ``score_error``.
    """

    max_score: Array
    max_abs_score: Array
    lse: Array
    mean: Array
    excess_total: Array
    excess: Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    block_size: int = 512,
) -> tuple[Array, Array]:
    """out_i = Σ_j softmax_j(softmax_scale · q_i·k_j) v_j over the keys query i may see.

    Heads share keys in g groups: g = h is multi-head, g = 1 multi-query attention. Query i of s is aligned to the end of
    the sequence and sees keys 0 .. seqlen - s + i when causal (bottom-right), else 0 .. seqlen - 1.

    Args:
        q: [..., s, h, d].
        k: [..., t, g, d], g dividing h.
        v: [..., t, g, dv].
        cache_seqlens: valid keys of each sequence, [...] or one number; t when None. Rows past it are never read.
        block_size: keys held at once; memory is O(s · h · (block_size + dv)) whatever t is.

    Returns:
        (out [..., s, h, dv], lse [..., h, s]): natural logarithm. A row that sees no key gives 0 and -inf.
        Any finite score is handled, up to 1e300 in magnitude.

    Raises:
        ValueError: shapes do not fit, or a length lies outside 0 .. t.
    """
    sums = softmax_sums(
        q, k, v, softmax_scale=softmax_scale, cache_seqlens=cache_seqlens, causal=causal, block_size=block_size
    )
    s, h = q.shape[-3], q.shape[-2]
    return rows_to_heads(sums.mean, s, h), rows_to_lse(sums.lse, s, h)


def softmax_sums(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | int | None,
    causal: bool,
    block_size: int,
    columns: Columns = lambda v: v,
    score_error: ScoreError | None = None,
) -> SoftmaxSums:
    """Weighted means over the keys in one pass (online softmax).

    Args:
        columns: what is averaged; v itself by default.
        score_error: the δ of ``SoftmaxSums.excess``.

    Raises:
        ValueError: as ``attention``.
    """
    limit = _visible_keys(q, k, v, cache_seqlens, causal)  # [..., 1, rows]
    read_limit = limit.max(axis=-1, initial=0)[..., None]  # [..., 1, 1]: rows that no query sees are not read
    rows = heads_to_rows(q * softmax_scale, k.shape[-2])  # [..., g, rows, d]
    lead = np.broadcast_shapes(rows.shape[:-1], limit.shape)
    width = columns(np.zeros((1, v.shape[-1]))).shape[-1]
    m, least = np.full(lead, -np.inf), np.full(lead, np.inf)
    total, excess_total = np.zeros(lead), np.zeros(lead)
    mean, excess = np.zeros((*lead, width)), np.zeros((*lead, width))
    for start in range(0, k.shape[-3], block_size):
        keys = slice(start, start + block_size)
        index = np.arange(start, min(start + block_size, k.shape[-3]))
        read = index < read_limit  # [..., 1, block]
        scores = rows @ np.swapaxes(key_block(k, keys, read), -1, -2)  # [..., g, rows, block]
        visible = index < limit[..., None]  # [..., 1, rows, block]
        shown = scores if visible.all() else np.where(visible, scores, -np.inf)
        m_new = np.maximum(m, shown.max(axis=-1))
        shift = np.where(np.isneginf(m_new), 0.0, m_new)
        decay = np.exp(m - shift)
        exponent = shown - shift[..., None]
        weights = np.exp(exponent)
        total = total * decay + weights.sum(axis=-1)
        x = columns(key_block(v, keys, read))  # [..., g, block, width]
        mean = mean * decay[..., None] + weights @ x
        if score_error is not None:
            least = np.minimum(least, np.where(visible, scores, np.inf).min(axis=-1))
            surplus = _excess(weights, exponent, score_error(scores, keys))
            excess_total = excess_total * decay + surplus.sum(axis=-1)
            excess = excess * decay[..., None] + surplus @ x
        m = m_new
    empty = total == 0
    divisor = np.where(empty, 1.0, total)
    return SoftmaxSums(
        max_score=m,
        max_abs_score=np.where(empty, 0.0, np.maximum(np.abs(m), np.abs(least))),
        lse=np.where(empty, -np.inf, np.where(empty, 0.0, m) + np.log(divisor)),
        mean=mean / divisor[..., None],
        excess_total=excess_total / divisor,
        excess=excess / divisor[..., None],
    )


def _excess(weights: Array, exponent: Array, error: Array) -> Array:
    """exp(exponent + error) − exp(exponent) without cancellation; inf where it overflows."""
    small = error < 300
    if small.all():
        return weights * np.expm1(error)
    return np.where(
        small,
        weights * np.expm1(np.where(small, error, 0.0)),
        np.exp(exponent + np.where(small, 0.0, error)),
    )


def heads_to_rows(x: Array, groups: int) -> Array:
    """[..., s, h, d] -> [..., g, (h/g)·s, d]: the queries that share a key head, as rows."""
    *lead, s, h, d = x.shape
    return np.moveaxis(x, -2, -3).reshape(*lead, groups, h // groups * s, d)


def rows_to_heads(x: Array, s: int, h: int) -> Array:
    """[..., g, (h/g)·s, d] -> [..., s, h, d]."""
    return np.moveaxis(x.reshape(*x.shape[:-3], h, s, x.shape[-1]), -3, -2)


def rows_to_lse(x: Array, s: int, h: int) -> Array:
    """[..., g, (h/g)·s] -> [..., h, s]."""
    return x.reshape(*x.shape[:-2], h, s)


def key_block(x: Array, keys: slice, read: BoolArray | None = None) -> Array:
    """Rows ``keys`` of [..., t, g, d] as [..., g, block, d]; rows that ``read`` [..., 1, block] excludes are 0."""
    rows = np.moveaxis(x[..., keys, :, :], -2, -3)
    return rows if read is None or read.all() else np.where(read[..., None], rows, 0.0)


def _visible_keys(q: Array, k: Array, v: Array, cache_seqlens: IntArray | int | None, causal: bool) -> IntArray:
    """How many keys each row sees, [..., 1, rows]; checks every shape."""
    if q.ndim < 3 or k.ndim < 3 or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q [..., s, h, d] and k [..., t, g, d] must agree in d, got {q.shape} and {k.shape}")
    s, h = q.shape[-3:-1]
    t, g = k.shape[-3:-1]
    if g == 0 or h % g:
        raise ValueError(f"the number of key heads must divide the number of query heads, got {g} and {h}")
    if v.shape[-3:-1] != (t, g):
        raise ValueError(f"v must be [..., {t}, {g}, dv] like k, got {v.shape}")
    seqlens = np.asarray(t if cache_seqlens is None else cache_seqlens)
    if seqlens.size and (seqlens.min() < 0 or seqlens.max() > t):
        raise ValueError(f"cache_seqlens must lie in 0 .. {t}, got {seqlens.min()} .. {seqlens.max()}")
    seen = seqlens[..., None] - s + 1 + np.arange(s) if causal else seqlens[..., None] + np.zeros(s, dtype=int)
    seen = np.maximum(seen, 0)  # [..., s]
    return np.tile(seen, h // g)[..., None, :]  # [..., 1, (h/g)·s]
