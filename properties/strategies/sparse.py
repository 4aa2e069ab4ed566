"""Hypothesis strategies of cases of sparse attention and of the indexer."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.indexer import IndexedAttentionCase, IndexerCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.properties.strategies.sizes import (
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    PAGE_SIZES,
    SEEDS,
    cycled,
    judgeable_stds,
    large_size,
)
from mla_spec.subjects.supports import Supports

SINK_STDS = (1.0, 4.0, 0.1)
"""Standard deviations of logits for which the LSE is known well enough to be compared with a sink."""


def _shared(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    duplicates: bool | None = None,
    with_length: bool | None = None,
    sinks: tuple[str, ...] = ("none", "finite", "infinite"),
    min_topk: int = 1,
    invalid: tuple[float, ...] = (0.0, 0.3, 0.9),
    empty_rows: bool | None = None,
    size: str = "",
) -> dict[str, Any]:
    """Fields of both kinds of cases. What the subject does not take is not drawn, whatever the keywords ask for."""
    if supports.latent_dims is not None:
        c, r = draw(st.sampled_from(supports.latent_dims))
    else:
        c = draw(st.integers(1, 24) | st.sampled_from((48, 512)))
        r = 2 * draw(st.integers(0, 6) | st.just(32))
    unit = supports.topk_multiple
    around_tiles = st.builds(lambda tiles, off: 16 * tiles + off, st.integers(1, 3), st.integers(-1, 1))
    many = st.sampled_from((64, 65, 127, 128, 130, 192))
    wanted = max(min_topk, draw(many if size == "topk" else st.integers(1, 24) | around_tiles))
    sink = draw(st.sampled_from(sinks)) if supports.attention_sink else "none"
    lengths = st.booleans() if with_length is None else st.just(with_length)
    empties = st.booleans() if empty_rows is None else st.just(empty_rows)
    stds = judgeable_stds(SINK_STDS if sink != "none" else LOGIT_STDS, profile, c + r)
    return {
        "dtype": profile.dtype,
        "seed": draw(SEEDS),
        "num_heads": draw(
            st.sampled_from(supports.num_heads or (MANY_HEADS if size == "heads" and c <= 48 else HEADS))
        ),
        "kv_lora_rank": c,
        "qk_rope_head_dim": r,
        "topk": -(-wanted // unit) * unit,
        "invalid": draw(st.sampled_from(invalid)),
        "duplicates": draw(st.booleans()) if duplicates is None else duplicates,
        "empty_rows": draw(empties) and supports.empty_row != "unsupported",
        "with_length": draw(lengths) and supports.topk_length,
        "sink": sink,
        "logit_std": draw(st.sampled_from(stds)),
        "regime": draw(st.sampled_from(("typical", "outlier", "ties"))),
    }


@st.composite
def sparse_prefill_cases(
    draw: DrawFn,
    /,
    supports: Supports,
    profile: Profile,
    *,
    min_queries: int = 1,
    keys_for_all: bool = False,
    **keywords: Any,
) -> SparsePrefillCase:
    """Fewer, as many, and more keys than indices; ``keys_for_all``: no fewer keys than queries.

    A quarter of the cases has many indices, heads or queries.
    """
    size = large_size(draw, ("topk", "heads", "queries"))
    shared = _shared(draw, supports, profile, size=size, **keywords)
    s_q = draw(st.sampled_from((9, 17, 33)) if size == "queries" else st.integers(min_queries, 6))
    near = st.integers(max(1, shared["topk"] - 1), shared["topk"] + 1)
    s_kv = draw(st.integers(1, 40) | near | st.sampled_from((63, 64, 65)))
    return SparsePrefillCase(s_q=s_q, s_kv=max(s_kv, s_q if keys_for_all else 1), **shared)


@st.composite
def sparse_decode_cases(
    draw: DrawFn, /, supports: Supports, profile: Profile, *, min_batch: int = 1, **keywords: Any
) -> SparseDecodeCase:
    """Several sequences and queries over slots of one pool; a quarter of the cases has many indices, heads or sequences."""
    size = large_size(draw, ("topk", "heads", "batch"))
    shared = _shared(draw, supports, profile, size=size, **keywords)
    page_size = draw(st.sampled_from(supports.page_sizes or PAGE_SIZES))
    return SparseDecodeCase(
        batch=draw(st.sampled_from((9, 17)) if size == "batch" else st.integers(min_batch, max(min_batch, 3))),
        s=draw(st.integers(1, min(3, supports.max_s or 3))),
        pages=draw(st.integers(1, 5 if page_size < 32 else 2)),
        page_size=page_size,
        **shared,
    )


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
