"""Gradients of attention with respect to q, k and v, for a loss that depends on out and on the LSE.

Source: FlashAttention-2 (arXiv 2307.08691), section 2.2. With P = softmax(S), S = σ Q Kᵀ and O = P V,

    dV = Pᵀ dO,  dP = dO Vᵀ,  D_i = Σ_d dO_id O_id,  dS_ij = P_ij (dP_ij − D_i + dlse_i),  dQ = σ dS K,  dK = σ dSᵀ Q,

where dlse enters because ∂lse_i/∂S_ij = P_ij.
"""

from __future__ import annotations

import numpy as np

from mla_spec.reference.attention import (
    attention,
    heads_to_rows,
    key_block,
    rows_to_heads,
    sink_share,
    softmax_blocks,
)
from mla_spec.reference.prefill import packed_sequences
from mla_spec.reference.product import accurate_product
from mla_spec.reference.sparse import selected_indices, selected_rows
from mla_spec.reference.typing import Array, IntArray


def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    out_grad: Array,
    *,
    softmax_scale: float,
    cache_seqlens: IntArray | int | None = None,
    causal: bool = True,
    lse_grad: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of a loss with respect to the q, k and v of ``attention``, whose arguments and errors these are.

    Args:
        out_grad: of the loss with respect to out, [..., s, h, dv].
        lse_grad: of the loss with respect to the LSE, [..., h, s]; None where it does not depend on it.

    Returns:
        (q_grad [..., s, h, d], k_grad [..., t, g, d], v_grad [..., t, g, dv]). Queries that see no key have gradient 0,
        and so have keys that no query sees. Memory is O(s · h · t).
    """
    s, h = q.shape[-3:-1]
    g = k.shape[-2]
    (block,) = softmax_blocks(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        cache_seqlens=cache_seqlens,
        causal=causal,
        block_size=max(1, k.shape[-3]),
    )
    total = block.weights.sum(axis=-1, keepdims=True)
    p = block.weights / np.where(total == 0, 1.0, total)  # [..., g, rows, t]
    key = key_block(k, block.keys, np.asarray(block.visible.any(axis=-2)))  # [..., g, t, d]
    query = heads_to_rows(q, g)  # [..., g, rows, d]
    do = heads_to_rows(out_grad, g)  # [..., g, rows, dv]
    dv = accurate_product(np.swapaxes(p, -1, -2), do, prefixes=True)  # [..., g, t, dv]
    dp = accurate_product(do, np.swapaxes(block.v, -1, -2))  # [..., g, rows, t]
    mean = (p * dp).sum(axis=-1, keepdims=True)  # D, [..., g, rows, 1]
    if lse_grad is not None:
        mean = mean - lse_grad.reshape(mean.shape)
    ds = p * (dp - mean)  # [..., g, rows, t]
    dq = softmax_scale * accurate_product(ds, key, prefixes=True)  # [..., g, rows, d]
    dk = softmax_scale * accurate_product(np.swapaxes(ds, -1, -2), query, prefixes=True)  # [..., g, t, d]
    return rows_to_heads(dq, s, h), np.moveaxis(dk, -3, -2), np.moveaxis(dv, -3, -2)


def prefill_backward(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    out_grad: Array,
    *,
    softmax_scale: float,
    causal: bool = True,
    lse_grad: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``attention_backward`` of every sequence of ``prefill``, whose arguments and errors these are.

    Args:
        out_grad: [tokens, h, dv].
        lse_grad: [h, tokens].

    Returns:
        Gradients of the shapes of q, k and v; 0 for a sequence without queries or without keys.
    """
    parts = [
        attention_backward(
            q[queries],
            k[keys],
            v[keys],
            out_grad[queries],
            softmax_scale=softmax_scale,
            causal=causal,
            lse_grad=None if lse_grad is None else lse_grad[:, queries],
        )
        for queries, keys in packed_sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    ]
    dq, dk, dv = (np.concatenate(grads) for grads in zip(*parts, strict=True))
    return dq, dk, dv


def sparse_prefill_backward(
    q: Array,
    kv: Array,
    indices: IntArray,
    out_grad: Array,
    *,
    head_dim_v: int,
    softmax_scale: float,
    attn_sink: Array | None = None,
    topk_length: IntArray | None = None,
    lse_grad: Array | None = None,
) -> tuple[Array, Array]:
    """Gradients with respect to the q and kv of ``sparse_attention``, whose arguments these are.

    A row of kv is a key, and its first ``head_dim_v`` columns are a value: it gets the gradients of both, from every entry
    that selects it, repetitions included. Rows that no entry selects have gradient 0. The sink is a constant.

    Args:
        out_grad: [..., s, h, head_dim_v].
        lse_grad: [..., h, s].

    Returns:
        (q_grad [..., s, h, d], kv_grad [..., t, d]).
    """
    rows, count = selected_rows(kv, indices, topk_length)
    key, query = rows[..., None, :], q[..., None, :, :]  # [..., s, k, 1, d] and [..., s, 1, h, d]
    value, do = key[..., :head_dim_v], out_grad[..., None, :, :]
    dlse = np.zeros(q.shape[:-1]) if lse_grad is None else np.swapaxes(lse_grad, -1, -2)  # [..., s, h]
    if attn_sink is not None:
        out, lse = attention(query, key, value, softmax_scale=softmax_scale, cache_seqlens=count, causal=False)
        do, through_share, _ = sink_backward(out, lse, do, attn_sink)
        dlse = dlse + through_share[..., 0]
    dq, dk, dv = attention_backward(
        query,
        key,
        value,
        do,
        softmax_scale=softmax_scale,
        cache_seqlens=count,
        causal=False,
        lse_grad=dlse[..., None],
    )
    dk[..., :head_dim_v] += dv
    return dq[..., 0, :, :], scattered(dk[..., 0, :], *selected_indices(kv, indices, topk_length), kv.shape[-2])


def sink_backward(out: Array, lse: Array, out_grad: Array, attn_sink: Array) -> tuple[Array, Array, Array]:
    """Gradients of a loss with respect to attention without a sink and to the sink, given that of ``share · out``.

    The share is that of ``sink_share``: ∂share/∂lse = share (1 − share) = −∂share/∂sink.

    Args:
        out, lse: of ``attention`` without the sink, [..., s, h, dv] and [..., h, s].
        out_grad: [..., s, h, dv].
        attn_sink: [h].

    Returns:
        (out_grad [..., s, h, dv], lse_grad [..., h, s], sink_grad [h]): the last is a sum over all queries. Queries that see no
        key give 0.
    """
    share = sink_share(np.swapaxes(lse, -1, -2), attn_sink)  # [..., s, h]
    through_share = share * (1 - share) * (out_grad * out).sum(axis=-1)  # [..., s, h]
    sink_grad = -through_share.reshape(-1, attn_sink.size).sum(axis=0)
    return share[..., None] * out_grad, np.swapaxes(through_share, -1, -2), sink_grad


def scattered(rows: Array, chosen: IntArray, count: IntArray, t: int) -> Array:
    """[..., t, d]: of rows [..., s, k, d] the first ``count`` [..., s] of each s, added up where ``chosen`` [..., s, k] says."""
    used = np.arange(chosen.shape[-1]) < count[..., None]  # [..., s, k]
    total = np.zeros((*rows.shape[:-3], t, rows.shape[-1]))
    lead = np.nonzero(used)[:-2]
    np.add.at(total, (*lead, chosen[used]), rows[used])
    return total
