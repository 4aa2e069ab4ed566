"""Sparse attention in ball arithmetic, and its indexer in balls and rational numbers.

The formulas as they stand in the DeepSeek-V3.2 technical report, section 2.1; an attention sink is one more key of weight
e^sink and value 0. Nothing of ``mla_spec.reference`` but the configuration dataclasses is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from mla_spec.golden.exact.balls import (
    Ball,
    Balls,
    arb,
    ball,
    rotate,
)
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.indexer import IndexerConfig
from mla_spec.reference.typing import Array, IntArray


def sparse_attention(
    q: Balls,
    rows: Balls,
    indices: IntArray,
    *,
    scale: Ball,
    head_dim_v: int,
    attn_sink: Array | None,
    topk_length: IntArray | None,
) -> tuple[Balls, Balls, Balls]:
    """Each query q[i] [h, d] over the rows [t, d] that indices[i] [k] selects.

    Returns:
        (out [s, h, v], max_logits [s, h], lse [s, h]).
    """
    s, h, _ = q.shape
    out, largest, lse = (np.empty(shape, dtype=object) for shape in ((s, h, head_dim_v), (s, h), (s, h)))
    for i in range(s):
        read = indices[i] if topk_length is None else indices[i][: topk_length[i]]
        keys = ball(rows[[j for j in read if 0 <= j < len(rows)]])  # [k, d]
        for head in range(h):
            sink = -np.inf if attn_sink is None else float(attn_sink[head])
            out[i, head], largest[i, head], lse[i, head] = _attend(q[i, head], keys, scale, head_dim_v, sink)
    return out, largest, lse


def _attend(q: Balls, keys: Balls, scale: Ball, head_dim_v: int, sink: float) -> tuple[Balls, Ball, Ball]:
    if len(keys) == 0:
        return ball(np.zeros(head_dim_v)), arb.neg_inf(), arb.neg_inf()
    scores = scale * (keys @ ball(q))  # [k]
    largest = scores[0]
    for score in scores[1:]:
        largest = largest.max(score)
    weights = np.exp(scores)
    total = weights.sum()
    if sink == np.inf:
        return ball(np.zeros(head_dim_v)), largest, total.log()
    with_sink = total if sink == -np.inf else total + arb(sink).exp()
    return weights @ keys[:, :head_dim_v] / with_sink, largest, total.log()


# The indexer


def select(
    q: Array, k: Array, weights: Array, cu_seqlens_q: IntArray, cu_seqlens_k: IntArray, top_k: int
) -> tuple[Array, IntArray]:
    """Σ_h w_h relu(q_h · k) of each query and the keys that it sees, 0 elsewhere, and the keys selected, largest first.

    Rational arithmetic: every product and sum is exact, so equal logits are known to be equal. Of those the smaller index
    comes first. Logits are rounded to nearest.

    Returns:
        (logits [tokens, key tokens], indices [tokens, top_k]).
    """
    logits, indices = np.zeros((len(q), len(k))), np.full((len(q), top_k), -1, dtype=np.int32)
    for sequence in range(len(cu_seqlens_q) - 1):
        first, last = cu_seqlens_q[sequence : sequence + 2]
        start, end = cu_seqlens_k[sequence : sequence + 2]
        for i in range(first, last):
            seen = range(start, max(start, end - (last - 1 - i)))
            exact = {j: _logit(q[i], k[j], weights[i]) for j in seen}
            chosen = sorted(seen, key=lambda j: (-exact[j], j))[:top_k]
            indices[i, : len(chosen)] = chosen
            for j in seen:
                logits[i, j] = float(exact[j])
    return logits, indices


def _logit(q: Array, k: Array, weights: Array) -> Fraction:
    key = [Fraction(x) for x in k.tolist()]
    scores = [sum((Fraction(a) * b for a, b in zip(row, key, strict=True)), Fraction(0)) for row in q.tolist()]
    return sum((Fraction(w) * max(x, Fraction(0)) for w, x in zip(weights.tolist(), scores, strict=True)), Fraction(0))


def layer_norm(x: Balls, weight: Balls, bias: Balls, eps: float) -> Balls:
    """Weight · (x − mean) / sqrt(mean((x − mean)²) + eps) + bias over the last axis."""
    x, n = ball(x), x.shape[-1]
    centred = x - x.sum(axis=-1, keepdims=True) / n
    variance = (centred * centred).sum(axis=-1, keepdims=True) / n
    return ball(weight) * centred / np.sqrt(variance + arb(eps)) + ball(bias)


def project_indexer(
    hidden: Balls, q_latent: Balls, positions: IntArray, weights: Mapping[str, Balls], config: IndexerConfig
) -> tuple[Balls, Balls, Balls]:
    """(q [s, h, d], k [s, d], weights [s, h]) of hidden [s, e] and q_latent [s, q_lora_rank]."""
    w, x = {name: ball(values) for name, values in weights.items()}, ball(hidden)
    h, d = config.index_n_heads, config.index_head_dim
    q = (ball(q_latent) @ w["wq_b"].T).reshape(len(x), h, d)
    k = layer_norm(x @ w["wk"].T, w["k_norm.weight"], w["k_norm.bias"], config.k_norm_eps)
    heads = x @ w["weights_proj"].T / (arb(h).sqrt() * arb(d).sqrt())
    return rotate_part(q, positions, config.rope, 0), rotate_part(k, positions, config.rope, 0), heads


def rotate_part(x: Balls, positions: IntArray, rope: RopeConfig | None, start: int) -> Balls:
    """Dims start .. start + r − 1 of x [s, d] or [s, h, d] rotated, the others as they are."""
    out = ball(x).copy()
    if rope is not None:
        part = slice(start, start + rope.dim)
        out[..., part] = rotate(out[..., part], positions, rope)
    return out
