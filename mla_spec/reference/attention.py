"""Attention with its log-sum-exp: the only attention loop of the package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mla_spec.reference.product import accurate_product
from mla_spec.reference.typing import Array, BoolArray, IntArray

BLOCK_SIZE = 512
"""Keys held at once: so few that a block and what is formed of it stay in a cache, so many that products are fast."""

# Once it has seen so large a piece freed, malloc of glibc keeps memory of up to this size, and does not return it to the
# system after each block (mallopt(3), M_MMAP_THRESHOLD). The piece is never written, so it takes no memory.
np.empty(31 * 2**20, dtype=np.uint8)


@dataclass(frozen=True)
class SoftmaxBlock:
    """One step of an online softmax; rows are (head of group, query) pairs.

    Sums over the keys, divided by the sum of the weights at the end, follow by
    ``total = total * block.decay + (this block's sum with block.weights)``.

    Attributes:
        keys: the rows of k and v in this block.
        scores: softmax_scale · q·k, [..., g, rows, block], of keys that a row may not see too.
        visible: which of them it may see, [..., 1, rows, block].
        exponent: score minus the largest one so far, -inf where not visible; [..., g, rows, block].
        weights: exp(exponent).
        decay: exp(largest score before this block − largest score so far), [..., g, rows].
        max_score: the largest score so far, [..., g, rows]; -inf in a row that has seen no key.
        v: rows of v, [..., g, block, dv]; 0 where no query sees them.
    """

    keys: slice
    scores: Array
    visible: BoolArray
    exponent: Array
    weights: Array
    decay: Array
    max_score: Array
    v: Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    window: int | None = None,
    attn_sink: Array | None = None,
    accurate: bool = True,
    block_size: int = BLOCK_SIZE,
) -> tuple[Array, Array]:
    """out_i = Σ_j softmax_j(softmax_scale · q_i·k_j) v_j over the keys query i may see.

    Heads share keys in g groups: g = h is multi-head, g = 1 multi-query attention. Query i of s is aligned to the end of
    the sequence and sees keys 0 .. seqlen - s + i when causal (bottom-right), else 0 .. seqlen - 1.

    Args:
        q: [..., s, h, d].
        k: [..., t, g, d], g dividing h.
        v: [..., t, g, dv].
        cache_seqlens: valid keys of each sequence, [...] or one number; t when None. Rows past it are never read.
        window: how many keys a query sees, the last ones of those above; all when None. Rows that no query sees are not read.
        attn_sink: score of one more key with value 0, which the LSE does not count, [h]; -inf none, and +inf gives exactly 0.
        accurate: products to about an ulp of their gauge, which takes three times as long, and not those of BLAS.
        block_size: keys held at once; memory is O(s · h · (block_size + dv)) whatever t is.

    Returns:
        (out [..., s, h, dv], lse [..., h, s]): natural logarithm. A row that sees no key gives 0 and -inf.
        Any finite score is handled, up to 1e300 in magnitude.

    Raises:
        ValueError: shapes do not fit, a length lies outside 0 .. t, or a window is smaller than 1.
    """
    total, out = np.zeros(()), np.zeros(())
    for block in softmax_blocks(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        cache_seqlens=cache_seqlens,
        causal=causal,
        window=window,
        accurate=accurate,
        block_size=block_size,
    ):
        total = total * block.decay + block.weights.sum(axis=-1)  # [..., g, rows]; pairwise
        if accurate:
            values = accurate_product(block.weights, block.v, prefixes=not block.visible.all())
        else:
            values = block.weights @ block.v
        out = out * block.decay[..., None] + values  # [..., g, rows, dv]
    s, h = q.shape[-3], q.shape[-2]
    out = out / np.where(total == 0, 1.0, total)[..., None]
    out, lse = rows_to_heads(out, s, h), rows_to_lse(log_sum_exp(block.max_score, total), s, h)
    return out if attn_sink is None else out * sink_share(np.swapaxes(lse, -1, -2), attn_sink)[..., None], lse


def sink_share(lse: Array, attn_sink: Array) -> Array:
    """1 / (1 + exp(attn_sink − lse)), what a sink [h] leaves to the keys of rows with LSE [..., h]; 0 in rows without keys."""
    shift = np.where(np.isneginf(lse), np.inf, attn_sink - np.where(np.isneginf(lse), 0.0, lse))
    with np.errstate(over="ignore"):
        share: Array = 1 / (1 + np.exp(shift))
    return share


def softmax_blocks(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | int | None,
    causal: bool,
    window: int | None = None,
    accurate: bool = True,
    block_size: int,
) -> Iterator[SoftmaxBlock]:
    """The keys in blocks, each with its weights relative to the largest score so far; at least one block.

    Arguments and errors are those of ``attention``.
    """
    limit = _visible_keys(q, k, v, cache_seqlens, causal)  # [..., 1, rows]
    first = np.zeros_like(limit) if window is None else np.maximum(limit - _counted(window), 0)  # [..., 1, rows]
    # Rows that no query sees are not read.
    read_limit, read_first = (
        limit.max(axis=-1, initial=0)[..., None],
        first.min(axis=-1, initial=k.shape[-3])[..., None],
    )
    product = accurate_product if accurate else np.matmul
    factor, power = math.frexp(softmax_scale)  # q times a power of two is exact
    rows = heads_to_rows(np.ldexp(q, power), k.shape[-2])  # [..., g, rows, d]
    m = np.full(np.broadcast_shapes(rows.shape[:-1], limit.shape), -np.inf)
    for start in range(0, max(1, k.shape[-3]), block_size):
        keys = slice(start, start + block_size)
        index = np.arange(start, min(start + block_size, k.shape[-3]))
        read = (index < read_limit) & (index >= read_first)  # [..., 1, block]
        scores = product(rows, np.swapaxes(key_block(k, keys, read), -1, -2))  # [..., g, rows, block]
        scores *= factor
        visible = (index < limit[..., None]) & (index >= first[..., None])  # [..., 1, rows, block]
        shown = scores if visible.all() else np.where(visible, scores, -np.inf)
        m_new = np.maximum(m, shown.max(axis=-1, initial=-np.inf))
        shift = np.where(np.isneginf(m_new), 0.0, m_new)
        exponent = shown - shift[..., None]
        yield SoftmaxBlock(
            keys=keys,
            scores=scores,
            visible=visible,
            exponent=exponent,
            weights=np.exp(exponent),
            decay=np.exp(m - shift),
            max_score=m_new,
            v=key_block(v, keys, read),
        )
        m = m_new


def log_sum_exp(max_score: Array, total: Array) -> Array:
    """The LSE, m + log Σ exp(s − m); -inf where there is no key."""
    empty = total == 0
    return np.where(empty, -np.inf, np.where(empty, 0.0, max_score) + np.log(np.where(empty, 1.0, total)))


def heads_to_rows(x: Array, groups: int) -> Array:
    """[..., s, h, d] -> [..., g, (h/g)·s, d]: the queries that share a key head, as rows."""
    *lead, s, h, d = x.shape
    return x.swapaxes(-2, -3).reshape(*lead, groups, h // groups * s, d)


def rows_to_heads(x: Array, s: int, h: int) -> Array:
    """[..., g, (h/g)·s, d] -> [..., s, h, d]."""
    return x.reshape(*x.shape[:-3], h, s, x.shape[-1]).swapaxes(-3, -2)


def rows_to_lse(x: Array, s: int, h: int) -> Array:
    """[..., g, (h/g)·s] -> [..., h, s]."""
    return x.reshape(*x.shape[:-2], h, s)


def key_block(x: Array, keys: slice, read: BoolArray | None = None) -> Array:
    """Rows ``keys`` of [..., t, g, d] as [..., g, block, d]; rows that ``read`` [..., 1, block] excludes are 0."""
    rows = x[..., keys, :, :].swapaxes(-2, -3)
    return rows if read is None or read.all() else np.where(read[..., None], rows, 0.0)


def _counted(window: int) -> int:
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return window


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
