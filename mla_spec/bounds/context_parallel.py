"""The bound of one rank's decode: each query's is that of a row with the keys of the rank that it sees."""

from __future__ import annotations

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.operand_rounding import query_error
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.context_parallel import seen_by_queries
from mla_spec.reference.typing import Array, IntArray


def rank_decode_with_bound(
    q: Array,
    kv_cache: Array,
    block_table: IntArray,
    cache_seqlens: IntArray,
    *,
    head_dim_v: int,
    softmax_scale: float,
    ranks: int,
    rank: int,
    interleave: int,
    profile: Profile,
    causal: bool = True,
    probable: bool = False,
    failure: float = FAILURE_PROBABILITY,
) -> BoundedAttention:
    """``rank_decode`` and the error of computing it as ``profile`` says; arguments and errors are those of both."""
    b, s, h, d = q.shape
    seen = seen_by_queries(cache_seqlens, s, causal=causal, ranks=ranks, rank=rank, interleave=interleave).reshape(-1)
    rows = gather_rows(kv_cache, block_table.repeat(s, axis=0), seen)[:, :, None]  # [b · s, t, 1, c+r]
    bounded = attention_with_bound(
        q.reshape(b * s, 1, h, d),
        rows,
        rows[..., :head_dim_v],
        softmax_scale=softmax_scale,
        profile=profile,
        cache_seqlens=seen,
        causal=False,
        query_error=query_error(q, softmax_scale, profile).reshape(b * s, 1, h, d),
        probable=probable,
        failure=failure,
    )

    def of_out(x: Array) -> Array:
        return x.reshape(b, s, h, -1)  # [b · s, 1, h, v] -> [b, s, h, v]

    def of_lse(x: Array) -> Array:
        return x.reshape(b, s, h).swapaxes(1, 2)  # [b · s, h, 1] -> [b, h, s]

    return bounded.map(of_out, of_lse)
