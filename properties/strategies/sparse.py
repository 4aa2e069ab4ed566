"""Hypothesis strategies of cases of sparse attention and of the indexer."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.properties.strategies.sizes import (
    FLAGS,
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    PAGE_SIZES,
    PREFILL_REGIMES,
    SEEDS,
    SINK_STDS,
    among,
    between,
    choice,
    judgeable_stds,
    large_size,
    near,
    supported,
)
from mla_spec.subjects.supports import Supports


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
        c, r = draw(choice(*supports.latent_dims))
    elif size == "published":
        c, r = 512, 64
    else:
        c, r = draw(among(1, 24, 48, 512)), 2 * draw(among(0, 6, 32))
    unit = supports.topk_multiple
    if size in ("topk", "published"):
        wanted = draw(choice(64, 65, 127, 128, 130, 192))
    else:
        wanted = near(draw, 16, 1, 3) if draw(between(0, 1)) else draw(between(1, 24))
    wanted = max(min_topk, wanted)
    sink = draw(choice(*sinks)) if supports.attention_sink else "none"
    has_length = draw(FLAGS) if with_length is None else with_length
    has_empty = draw(FLAGS) if empty_rows is None else empty_rows
    heads = (16, 128) if size == "published" else MANY_HEADS if size == "heads" and c <= 48 else HEADS
    stds = judgeable_stds(SINK_STDS if sink != "none" else LOGIT_STDS, profile, c + r)
    return {
        "dtype": profile.dtype,
        "seed": draw(SEEDS),
        "num_heads": draw(choice(*supports.num_heads or heads)),
        "kv_lora_rank": c,
        "qk_rope_head_dim": r,
        "topk": -(-wanted // unit) * unit,
        "invalid": draw(choice(*invalid)),
        "duplicates": draw(FLAGS) if duplicates is None else duplicates,
        "empty_rows": has_empty and supports.empty_row != "unsupported",
        "with_length": has_length and supports.topk_length,
        "sink": sink,
        "logit_std": draw(choice(*stds)),
        "regime": draw(choice(*supported(PREFILL_REGIMES, supports, profile, c))),
    }


def draw_sparse_prefill(
    draw: DrawFn,
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
    size = large_size(draw, ("topk", "heads", "queries", "published"))
    shared = _shared(draw, supports, profile, size=size, **keywords)
    s_q = draw(choice(9, 17, 33) if size == "queries" else between(min_queries, 2 if size == "published" else 6))
    topk = shared["topk"]
    s_kv = draw(among(1, 40, 63, 64, 65, max(1, topk - 1), topk, topk + 1))
    return SparsePrefillCase(s_q=s_q, s_kv=max(s_kv, s_q if keys_for_all else 1), **shared)


@st.composite
def sparse_prefill_cases(draw: DrawFn, /, supports: Supports, profile: Profile, **keywords: Any) -> SparsePrefillCase:
    """What ``draw_sparse_prefill`` draws."""
    return draw_sparse_prefill(draw, supports, profile, **keywords)


@st.composite
def sparse_decode_cases(
    draw: DrawFn, /, supports: Supports, profile: Profile, *, min_batch: int = 1, **keywords: Any
) -> SparseDecodeCase:
    """Several sequences and queries over slots of one pool; a quarter of the cases has many indices, heads or sequences."""
    size = large_size(draw, ("topk", "heads", "batch", "published"))
    shared = _shared(draw, supports, profile, size=size, **keywords)
    page_size = draw(choice(*supports.page_sizes or PAGE_SIZES))
    return SparseDecodeCase(
        batch=draw(
            choice(9, 17) if size == "batch" else between(min_batch, max(min_batch, 2 if size == "published" else 3))
        ),
        s=draw(between(1, 1 if size == "published" else min(3, supports.max_s or 3))),
        pages=draw(between(1, 5 if page_size < 32 else 2)),
        page_size=page_size,
        **shared,
    )
