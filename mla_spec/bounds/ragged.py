"""The bound of packed queries over a paged latent cache: each query's is that of a row of decode with its own keys."""

from __future__ import annotations

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.operand_rounding import query_error
from mla_spec.bounds.prefill import packed
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.ragged import query_tokens
from mla_spec.reference.typing import Array, IntArray


def ragged_decode_with_bound(
    q: Array,
    kv_cache: Array,
    block_table: IntArray,
    cache_seqlens: IntArray,
    cu_seqlens_q: IntArray,
    *,
    head_dim_v: int,
    softmax_scale: float,
    profile: Profile,
    causal: bool = True,
    probable: bool = False,
    failure: float = FAILURE_PROBABILITY,
) -> BoundedAttention:
    """``ragged_decode`` and the error of computing it as ``profile`` says; arguments and errors are those of both.

    ``failure`` is of each sequence.
    """
    rounding = query_error(q, softmax_scale, profile)  # one scale may be that of all sequences
    parts = []
    for i, tokens in enumerate(query_tokens(q, block_table, cache_seqlens, cu_seqlens_q)):
        rows = gather_rows(kv_cache, block_table[i : i + 1], cache_seqlens[i : i + 1])[0, :, None]  # [t, 1, c+r]
        parts.append(
            attention_with_bound(
                q[tokens],
                rows,
                rows[..., :head_dim_v],
                softmax_scale=softmax_scale,
                profile=profile,
                causal=causal,
                query_error=rounding[tokens],
                probable=probable,
                failure=failure,
            )
        )
    return packed(parts)
