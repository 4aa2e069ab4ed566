"""Hypothesis strategies of cases of ``ragged_decode``."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.properties.strategies.decode import ELEMENTS
from mla_spec.properties.strategies.sizes import (
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    MANY_SEQUENCES,
    PAGE_SIZES,
    SEEDS,
    among,
    between,
    choice,
    cycled,
    judgeable_stds,
    large_size,
    long_enough,
    near,
    several,
    supported,
)
from mla_spec.subjects.supports import Supports

RAGGED_SIZES = ("batch", "queries", "heads", "keys", "published")
FEWER_SIZES = ("batch", "queries")
RAGGED_REGIMES = ("typical", "outlier", "ties", "negative", "sunken")


def _queries(draw: DrawFn, least: int) -> int:
    """One, as a decoded token has; a few; or near a tile of 16."""
    number: int = draw(between(1, 3))
    if number == 1:
        return max(1, least)
    number = draw(between(0, 9)) if number == 2 else near(draw, 16, 1, 2)
    return max(least, number)


def _past(draw: DrawFn, least: int, page_size: int) -> int:
    """Cached keys before the first query: a few, or such that they end near a boundary of pages."""
    number: int
    if draw(between(0, 1)) and page_size < 128:
        number = near(draw, page_size, 0, 2)
        return max(least, number)
    number = draw(between(least, 20))
    return number


@st.composite
def ragged_decode_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_batch: int = 1,
    min_past: int | None = None,
    min_queries: int = 0,
    causal: bool | None = None,
    logit_stds: tuple[float, ...] = LOGIT_STDS,
    sizes: tuple[str, ...] = FEWER_SIZES,
    shared: bool = False,
) -> RaggedDecodeCase:
    """Prompts, prompts after a cached prefix and decoded tokens, some sequences empty; pages shuffled.

    A quarter of the cases is large in one of ``sizes``: hundreds of queries of a sequence, many sequences. ``min_past`` is the
    least number of keys before a sequence's first query; None allows fewer keys than queries. ``shared``: many sequences may
    share pages. Where the subject has no rule for rows without keys, none occur.
    """
    is_causal = draw(choice(*(c for c in supports.causal if causal is None or c == causal)))
    size = large_size(draw, sizes)
    published = size == "published"
    page_size = draw(choice(*supports.page_sizes or ((64,) if published else PAGE_SIZES)))
    queries = several(draw, lambda: _queries(draw, min_queries), min_batch, max(min_batch, 4))
    if size == "batch":
        few = several(draw, lambda: draw(between(min_queries, 3)), 5, 5)
        queries = cycled(few, draw(choice(*MANY_SEQUENCES[: 4 if page_size > 16 else 5])))
    elif size == "queries":
        queries[draw(between(0, len(queries) - 1))] = draw(choice(65, 129, 257))
    elif published:
        queries = [min(n, max(min_queries, 5)) for n in queries[: max(min_batch, 2)]]
    if not any(queries):
        queries[-1] = 1
    least = -3 if min_past is None else min_past
    pasts = cycled(several(draw, lambda: _past(draw, least, page_size), 7, 7), len(queries))
    if size == "keys":
        pasts[draw(between(0, len(pasts) - 1))] = draw(choice(129, 200, 256))
    if profile.coarse:
        pasts = [long_enough(n, page_size, profile) for n in pasts]
    keys = [max(0, n + past) for n, past in zip(queries, pasts, strict=True)]
    if supports.empty_row == "unsupported":
        keys = [max(t, n if is_causal else min(n, 1)) for n, t in zip(queries, keys, strict=True)]
    c, r = _dims(draw, supports, published=published)
    regime = draw(choice(*supported(RAGGED_REGIMES, supports, profile, c)))
    pages = sum(-(-t // page_size) for t in keys)
    heads = (16, 128) if published else MANY_HEADS if size == "heads" else HEADS
    return RaggedDecodeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens_q=tuple(queries),
        seqlens_k=tuple(keys),
        num_heads=draw(choice(*supports.num_heads or heads)),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=page_size,
        causal=is_causal,
        logit_std=draw(choice(*judgeable_stds(logit_stds, profile, c + r, regime))),
        regime=regime,
        shared_pages=max(3, pages // 2) if shared and pages * page_size * (c + r) > ELEMENTS else 0,
    )


def _dims(draw: DrawFn, supports: Supports, *, published: bool) -> tuple[int, int]:
    """Widths (c, r) of a cached row; narrow unless the subject declares them."""
    if supports.latent_dims is not None:
        chosen: tuple[int, int] = draw(choice(*supports.latent_dims))
        return chosen
    return (512, 64) if published else (draw(among(1, 16, 24, 32)), 2 * draw(between(0, 4)))
