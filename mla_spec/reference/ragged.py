"""Packed queries over a paged latent cache: prompts, prompts after a cached prefix, and decoded tokens in one call."""

from __future__ import annotations

import numpy as np

from mla_spec.reference.cache import paged_decode
from mla_spec.reference.prefill import packed_tokens
from mla_spec.reference.typing import Array, IntArray


def ragged_decode(
    q: Array,
    kv_cache: Array,
    block_table: IntArray,
    cache_seqlens: IntArray,
    cu_seqlens_q: IntArray,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Array, Array]:
    """``paged_decode`` of every sequence, whose queries are the tokens cu[i] .. cu[i + 1] - 1 of the packed axis.

    Args:
        q: [tokens, h, c+r].
        kv_cache: [pages, page_size, 1, c+r].
        block_table: [b, max pages].
        cache_seqlens: [b], tokens of each sequence, its queries' own among them.
        cu_seqlens_q: [b + 1], from 0 to the number of tokens. A sequence may have no queries or no keys.
        causal: whether query i of s sees keys 0 .. t - s + i of the t of its sequence (bottom-right), or all of them.

    Returns:
        (out [tokens, h, head_dim_v], lse [h, tokens]); a row that sees no key gives 0 and -inf.

    Raises:
        ValueError: offsets do not fit the tokens or the batch; and as ``paged_decode``.
    """
    parts = [
        paged_decode(
            q[None, tokens],
            kv_cache,
            block_table[i : i + 1],
            cache_seqlens[i : i + 1],
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
        )
        for i, tokens in enumerate(query_tokens(q, block_table, cache_seqlens, cu_seqlens_q))
    ]
    return np.concatenate([out[0] for out, _ in parts]), np.concatenate([lse[0] for _, lse in parts], axis=-1)


def query_tokens(q: Array, block_table: IntArray, cache_seqlens: IntArray, cu_seqlens_q: IntArray) -> list[slice]:
    """The tokens of each sequence; ValueError where offsets do not fit the tokens, or the sequences are not as many."""
    tokens = packed_tokens("cu_seqlens_q", cu_seqlens_q, len(q))
    if not len(block_table) == len(cache_seqlens) == len(tokens):
        raise ValueError(
            f"block_table, cache_seqlens and cu_seqlens_q must be of one batch, got {len(block_table)}, "
            f"{len(cache_seqlens)} and {len(tokens)} sequences"
        )
    return tokens
