"""Hypothesis strategies of cases of sparse attention and of the indexer."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.properties.strategies.sizes import (
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    PAGE_SIZES,
    PREFILL_REGIMES,
    SEEDS,
    judgeable_stds,
    large_size,
    supported,
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
        "regime": draw(st.sampled_from(supported(PREFILL_REGIMES, supports))),
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
