"""The worst-case error of the indexer's logits and of the largest logit of sparse attention, computed as a profile says."""

from __future__ import annotations

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.attention_moments import Rates
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.operand_rounding import query_error
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.reference.formats import FORMATS, format_of
from mla_spec.reference.sparse import indexer_logits, selected_rows
from mla_spec.reference.typing import Array, BoolArray, IntArray

_U64 = FORMATS["float64"].unit_roundoff


def indexer_with_bound(
    q: Array,
    k: Array,
    weights: Array,
    profile: Profile,
    *,
    q_error: Array | None = None,
    k_error: Array | None = None,
) -> tuple[Array, ErrorBound]:
    """``indexer_logits`` and the error of computing them as ``profile`` says.

    relu changes no difference by more than its own size, so an error of q·k counts as it is. What is stored are the scores
    of the heads; their weighted sum is formed in the arithmetic of the softmax, in any order.

    Args:
        q, k, weights: those of ``indexer_logits``, exact as stored.
        q_error, k_error: how far the operands may be from ``q`` and ``k``, elementwise; 0 when None.
    """
    h, d = q.shape[-2:]
    q_error = np.zeros_like(q) if q_error is None else q_error
    k_error = np.zeros_like(k) if k_error is None else k_error
    q_size, k_size, weight = np.abs(q) + q_error, np.abs(k) + k_error, np.abs(weights)

    def weighted(of_q: Array, of_k: Array) -> Array:
        """Σ_h |w| of_q · of_k, [..., s, t]."""
        return indexer_logits(of_q, of_k, weight)

    gauge = weighted(q_size, k_size)
    inherited = weighted(q_error, k_size) + weighted(np.abs(q), k_error)
    product = profile.score.relative_error(d + profile.operand_roundings) * gauge
    stored = format_of(profile.score_format)
    rate = (1 + stored.unit_roundoff) ** profile.score_roundings
    rate = rate * (1 + gamma(h + 2, format_of(profile.softmax).unit_roundoff)) - 1
    logits = indexer_logits(q, k, weights)
    underflow = stored.smallest_normal * weight.sum(axis=-1, keepdims=True)  # [..., s, 1]
    return logits, ErrorBound(
        {
            "products of q and k": (1 + rate) * product,
            "error of the operands": (1 + rate) * inherited,
            f"scores in {stored.name} and their weighted sum": rate * weighted(q, k) + underflow,
            "the reference's own float64": gamma(d + h + 2, _U64) * gauge,
        }
    )


def max_logits_with_bound(
    q: Array,
    kv: Array,
    indices: IntArray,
    *,
    softmax_scale: float,
    profile: Profile,
    topk_length: IntArray | None = None,
) -> tuple[Array, ErrorBound]:
    """The largest softmax_scale · q·k of each row of ``sparse_attention``, and its error.

    With every score s_j off by at most Δ_j, the largest one lies between max(s_j − Δ_j) and max(s_j + Δ_j), of which the
    latter is further away.

    Returns:
        (max_logits, error), both [..., h, s]; a row that selects nothing gives -inf, exactly.
    """
    rows, count = selected_rows(kv, indices, topk_length)
    visible = (np.arange(rows.shape[-2]) < count[..., None])[..., None, :]  # [..., s, 1, k]
    scores = softmax_scale * np.einsum("...shd,...skd->...shk", q, rows)
    gauge = abs(softmax_scale) * np.einsum("...shd,...skd->...shk", np.abs(q), np.abs(rows))
    rates = Rates.of(profile, q.shape[-1], rows.shape[-2])
    q_error = query_error(q, softmax_scale, profile)
    moved_q = abs(softmax_scale) * np.einsum("...shd,...skd->...shk", q_error, np.abs(rows))
    delta = (1 + rates.kappa) * (rates.gamma_qk * (gauge + moved_q) + moved_q) + rates.kappa * np.abs(scores)
    largest = _largest(scores, visible)
    some = ~np.isneginf(largest)
    m = np.where(some, largest, 0.0)
    moved = np.where(some, _largest(scores + delta, visible), 0.0) - m
    # Kernels multiply by log2(e) and back.
    stored = (2 * rates.u + format_of(profile.lse).unit_roundoff) * (np.abs(m) + moved)
    own = gamma(q.shape[-1] + 2, _U64) * gauge.max(axis=-1, initial=0.0)
    error = ErrorBound({"error of the scores": moved, "rounding": stored, "the reference's own float64": own})
    exact_where_empty = error.map(lambda term: np.swapaxes(np.where(some, term, 0.0), -1, -2))
    return np.swapaxes(largest, -1, -2), exact_where_empty


def _largest(scores: Array, visible: BoolArray) -> Array:
    largest: Array = np.where(visible, scores, -np.inf).max(axis=-1, initial=-np.inf)
    return largest


def selection_shortfall(logits: Array, error: Array, selected: BoolArray, visible: BoolArray) -> Array:
    """By how much the errors fail to explain a selection of the largest logits, [..., s]; at most 0 where they do.

    A key may be selected before another only if its computed logit can be as large: I_j + e_j ≥ I_i − e_i for each j
    that is selected and each visible i that is not. All arguments [..., s, t].
    """
    weakest = np.where(selected, logits + error, np.inf).min(axis=-1, initial=np.inf)
    strongest = np.where(visible & ~selected, logits - error, -np.inf).max(axis=-1, initial=-np.inf)
    unlimited = np.isinf(weakest) | np.isinf(strongest)  # nothing selected, or all that is visible
    return np.where(unlimited, 0.0, strongest - weakest)


def sparse_attention(
    q: Array,
    kv: Array,
    indices: IntArray,
    *,
    head_dim_v: int,
    softmax_scale: float,
    profile: Profile,
    attn_sink: Array | None = None,
    topk_length: IntArray | None = None,
    probable: bool = False,
    failure: float = FAILURE_PROBABILITY,
) -> BoundedAttention:
    """Attention of each query over the keys that its row of ``indices`` selects, and its error bound.

    Every occurrence of an index counts as a key of its own; the order of a row does not matter.

    Args:
        q: [..., s, h, d].
        kv: [..., t, d]; the values are the first ``head_dim_v`` columns.
        indices: [..., s, k]; entries of -1 or not in 0 .. t - 1 select nothing.
        attn_sink: natural logarithm of one more weight with value 0, [h]; -inf none. The LSE does not count it.
        topk_length: [...] or [..., s]; entries from there on are not read. All when None.

    Returns:
        out [..., s, h, head_dim_v] and lse [..., h, s]; a row that selects nothing gives 0 and -inf. A sink of +inf gives
        exactly 0.
    """
    rows, count = selected_rows(kv, indices, topk_length)
    rows = rows[..., None, :]  # [..., s, k, 1, d]
    bounded = attention_with_bound(
        q[..., None, :, :],  # one query per set of keys
        rows,
        rows[..., :head_dim_v],
        softmax_scale=softmax_scale,
        profile=profile,
        query_error=query_error(q, softmax_scale, profile)[..., None, :, :],
        probable=probable,
        failure=failure,
        cache_seqlens=count,
        causal=False,
        attn_sink=attn_sink,
    )
    return bounded.map(lambda x: x[..., 0, :, :], lambda x: np.swapaxes(x[..., 0], -1, -2))
