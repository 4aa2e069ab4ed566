"""Hypothesis strategies of cases of ``indexer``, and of attention over what it selects."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.indexer import IndexedAttentionCase, IndexerCase
from mla_spec.properties.strategies.sizes import (
    LOGIT_STDS,
    SEEDS,
    cycled,
    judgeable_stds,
    large_size,
)
from mla_spec.subjects.supports import Supports


@st.composite
def indexer_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_batch: int = 1,
    min_queries: int = 0,
    min_past: int | None = None,
    regimes: tuple[str, ...] = ("typical", "ties", "integers"),
    min_head_dim: int = 1,
) -> IndexerCase:
    """Packed sequences with more, as many, or fewer keys than queries; top_k below, at and above the number of keys.

    A quarter of the cases has many heads or sequences, or one sequence of many queries or keys.
    """
    shape = supports.indexer_dims
    size = large_size(draw, ("heads", "batch", "queries", "keys"))
    regime = draw(st.sampled_from(regimes))
    largest = 8 if regime == "integers" else 24  # products of "integers" stay below 2^8
    many = size == "heads" and regime != "integers"
    free = st.tuples(
        st.sampled_from((16, 64)) if many else st.integers(1, 8),
        st.integers(min_head_dim, max(min_head_dim, largest)) | st.just(128 if largest > 8 else 8),
    )
    h, d = draw(st.sampled_from(shape) if shape is not None else free)
    count = draw(st.integers(min_batch, 4))
    least = -2 if min_past is None else min_past
    queries = draw(st.lists(st.integers(min_queries, 6), min_size=count, max_size=count).filter(any))
    if size == "batch":
        few = draw(st.lists(st.integers(min_queries, 3), min_size=5, max_size=5).filter(any))
        queries = cycled(few, draw(st.sampled_from((9, 17))))
    elif size == "queries":
        queries[0] = draw(st.sampled_from((17, 33, 65)))
    past = draw(st.lists(st.integers(least, 12) | st.sampled_from((0, 16, 40)), min_size=7, max_size=7))
    past = cycled(past, len(queries))
    if size == "keys":
        past[-1] = draw(st.sampled_from((64, 100, 129, 200)))
    keys = [max(0, n + more) for n, more in zip(queries, past, strict=True)]
    top_k = st.sampled_from(supports.indexer_top_k or (1, 2, 3, 4, 8, 16, 64))
    around = st.sampled_from(keys).map(lambda n: max(1, n))
    return IndexerCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens_q=tuple(queries),
        seqlens_k=tuple(keys),
        num_heads=h,
        head_dim=d,
        top_k=draw(top_k if supports.indexer_top_k else top_k | around),
        regime=regime,
    )


@st.composite
def indexed_attention_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, select_all: bool = False
) -> IndexedAttentionCase:
    """No sequence has fewer keys than queries; ``select_all``: top_k is not below the longest one's number of keys."""
    indexer = draw(indexer_cases(supports, profile, min_past=0))
    widths = st.tuples(st.integers(1, 24), st.integers(0, 4).map(lambda half: 2 * half))
    c, r = draw(st.sampled_from(supports.latent_dims) if supports.latent_dims is not None else widths)
    unit, least = supports.topk_multiple, max(indexer.seqlens_k) if select_all else 1
    if supports.indexer_top_k is None:
        top_k = -(-max(least, 1 if select_all else indexer.top_k) // unit) * unit
    else:
        top_k = draw(st.sampled_from([k for k in supports.indexer_top_k if k >= least and k % unit == 0]))
    return IndexedAttentionCase(
        **vars(indexer) | {"top_k": top_k},
        attention_heads=draw(st.sampled_from(supports.num_heads or (1, 2, 3, 4))),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        logit_std=draw(st.sampled_from(judgeable_stds(LOGIT_STDS, profile, c + r))),
    )
