"""Ragged prefill: attention of packed sequences, each to its own keys."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mla_spec.reference.attention import attention
from mla_spec.reference.typing import Array, IntArray


def prefill(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    *,
    softmax_scale: float,
    causal: bool = True,
    window: int | None = None,
    attn_sink: Array | None = None,
) -> tuple[Array, Array]:
    """``attention`` of every sequence, sequence i being tokens cu[i] .. cu[i + 1] - 1 of the packed axis.

    Args:
        q: [tokens, h, d].
        k, v: [key tokens, g, d] and [key tokens, g, dv], g dividing h.
        cu_seqlens_q, cu_seqlens_k: [b + 1], from 0 to the number of tokens. A sequence may have no queries or no keys.
        causal: whether query i of s sees keys 0 .. t - s + i of the t of its sequence (bottom-right), or all of them.
        window, attn_sink: those of ``attention``.

    Returns:
        (out [tokens, h, dv], lse [h, tokens]); a row that sees no key gives 0 and -inf.

    Raises:
        ValueError: offsets do not fit the tokens or each other; and as ``attention``.
    """
    parts = [
        attention(
            q[queries],
            k[keys],
            v[keys],
            softmax_scale=softmax_scale,
            causal=causal,
            window=window,
            attn_sink=attn_sink,
        )
        for queries, keys in packed_sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    ]
    return np.concatenate([out for out, _ in parts]), np.concatenate([lse for _, lse in parts], axis=-1)


def packed_sequences(q: Array, k: Array, cu_seqlens_q: IntArray, cu_seqlens_k: IntArray) -> list[tuple[slice, slice]]:
    """Tokens of each sequence's queries and keys; ValueError where offsets do not fit the tokens or each other."""
    queries = packed_tokens("cu_seqlens_q", cu_seqlens_q, len(q))
    keys = packed_tokens("cu_seqlens_k", cu_seqlens_k, len(k))
    if len(queries) != len(keys):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    return list(zip(queries, keys, strict=True))


def packed_tokens(name: str, cu_seqlens: IntArray, tokens: int) -> list[slice]:
    """The tokens of each sequence; ValueError where the offsets called ``name`` do not fit so many."""
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (np.diff(cu_seqlens) < 0).any():
        got = np.asarray(cu_seqlens).tolist()
        raise ValueError(f"{name} must rise from 0 to the number of tokens {tokens}, got {got}")
    return [slice(*pair) for pair in pairwise(np.asarray(cu_seqlens).tolist())]
