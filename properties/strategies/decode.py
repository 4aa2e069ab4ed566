"""Hypothesis strategies of cases of ``decode``."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.properties.strategies.sizes import (
    FLAGS,
    HEADS,
    LOGIT_STDS,
    MANY_HEADS,
    MANY_SEQUENCES,
    PAGE_SIZES,
    SEEDS,
    among,
    between,
    cancelling_stds,
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

DECODE_SIZES = ("heads", "batch", "keys", "queries", "published")


DECODE_REGIMES = ("typical", "outlier", "ties", "offset", "sink", "cancelling", "negative", "sunken")

PUBLISHED_HEADS = (16, 128)
"""Of DeepSeek-V3 with and without tensor parallelism."""

C = TypeVar("C", DecodeCase, PrefillCase)

ELEMENTS = 400_000
"""Of the cache of a case, about; sequences share pages where they would need more."""


@cache
def _with_rope(dims: tuple[tuple[int, int], ...], least: int) -> tuple[tuple[int, int], ...]:
    return tuple(pair for pair in dims if pair[1] >= least)


def latent_dims(draw: DrawFn, supports: Supports, min_rope: int, *, published: bool) -> tuple[int, int]:
    """Widths (c, r) of a cached row."""
    if supports.latent_dims is not None:
        chosen: tuple[int, int] = draw(choice(*_with_rope(supports.latent_dims, min_rope)))
        return chosen
    if published:
        return 512, 64
    return draw(among(1, 24, 32, 48, 512)), 2 * draw(among(min_rope // 2, 6, 8, 32))


def _length(draw: DrawFn, shortest: int, page_size: int, s: int) -> int:
    """A short length, or one near a boundary of pages or of tiles of 16 keys."""
    where = draw(choice("short", "pages", "tiles"))
    length: int
    if where == "short":
        length = draw(between(shortest, max(shortest, 40)))
    elif where == "pages":
        length = near(draw, page_size, 0, 3 if page_size < 32 else 1)
    else:
        length = near(draw, 16, 1, 4, above=max(1, s - 1))
    return max(shortest, length)


@cache
def _batches(page: int, *, shared: bool) -> tuple[int, ...]:
    """How many sequences there may be where pages have so many elements, and each sequence one of its own unless ``shared``."""
    return tuple(n for n in MANY_SEQUENCES if shared or n * page <= ELEMENTS) or MANY_SEQUENCES[:1]


def _shared_pages(batch: int, longest: int, page_size: int, width: int) -> int:
    """How many pages sequences share; 0 where each has its own."""
    pages = -(-longest // page_size)
    return 0 if batch * pages * page_size * width <= ELEMENTS else max(pages, ELEMENTS // (page_size * width))


def draw_decode(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_s: int = 1,
    max_s: int = 8,
    min_length: int = 0,
    min_batch: int = 1,
    min_rope: int = 0,
    causal: bool | None = None,
    regimes: tuple[str, ...] = DECODE_REGIMES,
    logit_stds: tuple[float, ...] = LOGIT_STDS,
    sizes: tuple[str, ...] = DECODE_SIZES,
    shared: bool = False,
    sinks: tuple[str, ...] = ("none",),
    windows: tuple[int, ...] = (0,),
) -> DecodeCase:
    """Ragged batches over shuffled pages; lengths around boundaries of pages and of tiles of 16 keys.

    A quarter of the cases has many heads, sequences or queries, or one sequence of some hundred keys, and an eighth all the
    sizes of DeepSeek-V3; ``sizes`` says which may be. Keywords narrow what is drawn, for laws that need, say, two queries.
    ``sinks`` and ``windows`` are drawn only where there is a choice, so that other laws keep their cases.
    ``shared``: many sequences may share pages, else there are fewer of them. Where the subject has no rule for rows without
    keys, none occur.
    """
    size = large_size(draw, sizes)
    published = size == "published"
    page_size = draw(choice(*supports.page_sizes or ((64,) if published else PAGE_SIZES)))
    most_s = min(max_s, supports.max_s or max_s)
    s = draw(between(5, 8) if size == "queries" and most_s == 8 else between(min_s, max(min_s, min(most_s, 4))))
    is_causal = draw(choice(*(c for c in supports.causal if causal is None or c == causal)))
    shortest = min_length
    if supports.empty_row == "unsupported":
        shortest = max(shortest, s if is_causal else 1)
    c, r = latent_dims(draw, supports, min_rope, published=published)
    regime = draw(choice(*supported(regimes, supports, profile, c)))
    stds = judgeable_stds(logit_stds, profile, c + r, regime)
    if regime == "cancelling":
        stds = cancelling_stds(stds, profile, c + r)
    seqlens = several(draw, lambda: _length(draw, shortest, page_size, s), min_batch, max(min_batch, 4))
    if size == "batch":
        batch = draw(choice(*_batches(page_size * (c + r), shared=shared)))
        most = max(shortest + 8, ELEMENTS // (batch * (c + r)))
        seqlens = cycled(several(draw, lambda: min(_length(draw, shortest, page_size, s), most), 5, 5), batch)
    elif size == "keys":
        seqlens[draw(between(0, len(seqlens) - 1))] = draw(choice(129, 192, 200, 255, 256, 257))
    if profile.coarse and len(seqlens) <= 4 and draw(FLAGS):
        seqlens = [long_enough(n, page_size, profile) for n in seqlens]
    heads = PUBLISHED_HEADS if published else MANY_HEADS if size == "heads" else HEADS
    case = DecodeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens=tuple(seqlens),
        s=s,
        num_heads=draw(choice(*supports.num_heads or heads)),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=page_size,
        causal=is_causal,
        logit_std=draw(choice(*stds)),
        regime=regime,
        qk_nope_head_dim=draw(between(1, 8)),
        v_head_dim=draw(between(1, 8)),
        shared_pages=_shared_pages(len(seqlens), max(seqlens), page_size, c + r) if shared else 0,
    )
    return with_options(draw, case, sinks, windows)


def with_options(draw: DrawFn, case: C, sinks: tuple[str, ...], windows: tuple[int, ...]) -> C:
    """The case with a sink and a window, each drawn only where there is a choice."""
    sink = sinks[0] if len(sinks) == 1 else draw(choice(*sinks))
    window = windows[0] if len(windows) == 1 else draw(choice(*windows))
    return replace(case, sink=sink, window=window)


@st.composite
def decode_cases(draw: DrawFn, /, supports: Supports, profile: Profile, **keywords: Any) -> DecodeCase:
    """What ``draw_decode`` draws."""
    return draw_decode(draw, supports, profile, **keywords)
