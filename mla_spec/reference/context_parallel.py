"""Decode whose keys are dealt to ranks in blocks: what one rank makes of the keys that it holds."""

from __future__ import annotations

import numpy as np

from mla_spec.reference.cache import paged_decode
from mla_spec.reference.typing import Array, IntArray


def own_tokens(tokens: IntArray, *, ranks: int, rank: int, interleave: int) -> IntArray:
    """How many of the first ``tokens`` of a sequence one rank holds: token i is that of rank i // interleave % ranks.

    Raises:
        ValueError: there is no such rank, or a block has no token.
    """
    if not 0 <= rank < ranks or interleave < 1:
        raise ValueError(
            f"rank must lie in 0 .. ranks - 1 and interleave be positive, got {rank}, {ranks}, {interleave}"
        )
    rounds, rest = np.divmod(np.asarray(tokens), ranks * interleave)
    own: IntArray = rounds * interleave + np.clip(rest - rank * interleave, 0, interleave)
    return own


def seen_by_queries(cache_seqlens: IntArray, s: int, *, causal: bool, **dealt: int) -> IntArray:
    """How many of its rank's keys each of s queries sees, [b, s]: the first ones, up to the query's place in the whole."""
    whole = cache_seqlens[:, None] + (np.arange(s) - s + 1 if causal else np.zeros(s, dtype=int))
    return own_tokens(np.maximum(whole, 0), **dealt)


def rank_decode(
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
    causal: bool = True,
) -> tuple[Array, Array]:
    """``paged_decode`` of each query over the keys of one rank that it sees.

    Args:
        kv_cache, block_table: of the rank alone, whose tokens follow each other in its pages.
        cache_seqlens: [b], tokens of each whole sequence.

    Returns:
        (out [b, s, h, head_dim_v], lse [b, h, s]); a row that sees no key of this rank gives 0 and -inf.

    Raises:
        ValueError: as ``own_tokens`` and ``paged_decode``.
    """
    b, s, h, d = q.shape
    seen = seen_by_queries(cache_seqlens, s, causal=causal, ranks=ranks, rank=rank, interleave=interleave)
    out, lse = paged_decode(
        q.reshape(b * s, 1, h, d),
        kv_cache,
        block_table.repeat(s, axis=0),
        seen.reshape(-1),
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=False,
    )
    return out.reshape(b, s, h, head_dim_v), lse.reshape(b, s, h).swapaxes(1, 2)


def places(own: IntArray, *, ranks: int, rank: int, interleave: int) -> IntArray:
    """Where the tokens that a rank holds, counted from 0, stand in their sequence."""
    place: IntArray = (own // interleave * ranks + rank) * interleave + own % interleave
    return place
