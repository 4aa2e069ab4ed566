"""Hypothesis strategies of cases of ``indexer``, and of attention over what it selects."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.indexer import IndexedAttentionCase, IndexerCase
from mla_spec.properties.strategies.sizes import (
    LOGIT_STDS,
    SEEDS,
    among,
    between,
    choice,
    cycled,
    judgeable_stds,
    large_size,
    several,
)
from mla_spec.subjects.supports import Supports


def draw_indexer(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_batch: int = 1,
    min_queries: int = 0,
    min_past: int | None = None,
    regimes: tuple[str, ...] = ("typical", "ties", "integers", "negative"),
    min_head_dim: int = 1,
) -> IndexerCase:
    """Packed sequences with more, as many, or fewer keys than queries; top_k below, at and above the number of keys.

    A quarter of the cases has many heads or sequences, or one sequence of many queries or keys.
    """
    shape = supports.indexer_dims
    size = large_size(draw, ("heads", "batch", "queries", "keys"))
    regime = draw(choice(*regimes))
    largest = 8 if regime == "integers" else 24  # products of "integers" stay below 2^8
    many = size == "heads" and regime != "integers"
    if shape is not None:
        h, d = draw(choice(*shape))
    else:
        h = draw(choice(16, 64) if many else between(1, 8))
        d = draw(among(min_head_dim, max(min_head_dim, largest), 128 if largest > 8 else 8))
    least = -2 if min_past is None else min_past
    queries = several(draw, lambda: draw(between(min_queries, 6)), min_batch, 4)
    if size == "batch":
        few = [draw(between(min_queries, 3)) for _ in range(5)]
        queries = cycled(few, draw(choice(9, 17)))
    elif size == "queries":
        queries[0] = draw(choice(17, 33, 65))
    if not any(queries):
        queries[-1] = 1
    past = cycled([draw(among(least, 12, 0, 16, 40)) for _ in range(7)], len(queries))
    if size == "keys":
        past[-1] = draw(choice(64, 100, 129, 200))
    keys = [max(0, n + more) for n, more in zip(queries, past, strict=True)]
    top_k = draw(choice(*supports.indexer_top_k or (1, 2, 3, 4, 8, 16, 64)))
    if supports.indexer_top_k is None and draw(between(0, 1)):
        top_k = max(1, keys[draw(between(0, len(keys) - 1))])
    return IndexerCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens_q=tuple(queries),
        seqlens_k=tuple(keys),
        num_heads=h,
        head_dim=d,
        top_k=top_k,
        regime=regime,
    )


@st.composite
def indexer_cases(draw: DrawFn, /, supports: Supports, profile: Profile, **keywords: Any) -> IndexerCase:
    """What ``draw_indexer`` draws."""
    return draw_indexer(draw, supports, profile, **keywords)


@st.composite
def indexed_attention_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, select_all: bool = False
) -> IndexedAttentionCase:
    """No sequence has fewer keys than queries; ``select_all``: top_k is not below the longest one's number of keys."""
    indexer = draw_indexer(draw, supports, profile, min_past=0)
    if supports.latent_dims is not None:
        c, r = draw(choice(*supports.latent_dims))
    else:
        c, r = draw(between(1, 24)), 2 * draw(between(0, 4))
    unit, least = supports.topk_multiple, max(indexer.seqlens_k) if select_all else 1
    if supports.indexer_top_k is None:
        top_k = -(-max(least, 1 if select_all else indexer.top_k) // unit) * unit
    else:
        top_k = draw(choice(*(k for k in supports.indexer_top_k if k >= least and k % unit == 0)))
    return IndexedAttentionCase(
        **vars(indexer) | {"top_k": top_k},
        attention_heads=draw(choice(*supports.num_heads or (1, 2, 3, 4))),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        logit_std=draw(choice(*judgeable_stds(LOGIT_STDS, profile, c + r))),
    )
