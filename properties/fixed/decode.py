"""Fixed cases of ``decode``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.properties.fixed.counts import (
    BETWEEN,
    ELEMENTS,
    FEW,
    FEW_OF_LARGE_PAGES,
    LENGTHS,
    PADDED,
    arranged,
    first_of,
    latent_dims,
    long_lengths,
    most_keys,
    nearest,
    no_published_rows,
    ordinary_page_size,
    placed,
    room_for_pages,
    shortened,
    takes_empty_rows,
    thinned,
)
from mla_spec.properties.strategies.sizes import cycled, judgeable_stds, long_enough
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Two queries to each of three sequences, where the subject takes so many."""
    c, r = first_of(supports.latent_dims, (24, 8))
    page_size = ordinary_page_size(supports)
    return [
        DecodeCase(
            dtype=profile.dtype,
            seqlens=tuple(long_enough(n, page_size, profile) for n in LENGTHS),
            s=min(2, supports.max_s or 2),
            num_heads=first_of(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=page_size,
            causal=supports.causal[0],
        )
    ]


def elementary(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """One key; as many queries as keys; ends of pages; an empty sequence; one head; peaked scores."""
    (base,) = ordinary(supports, profile)
    if profile.coarse:
        return [base]
    size, one = base.page_size, nearest(supports.num_heads, 1)
    width = base.kv_lora_rank + base.qk_rope_head_dim
    several = min(2, supports.max_s or 2)
    alone = replace(base, seqlens=(1,), s=1, num_heads=one)
    cases = [
        alone,
        replace(alone, seqlens=(several,), s=several),
        replace(alone, seqlens=(size, size + 1, 2 * size + 1), num_heads=nearest(supports.num_heads, 17)),
        *([replace(alone, seqlens=(3, 0, 17))] if takes_empty_rows(supports) else []),
        replace(base, seed=1, logit_std=max(judgeable_stds((1.0, 16.0, 64.0), profile, width))),
    ]
    return [*cases, base]


def several_queries(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """The elementary ones with several causal queries."""
    cases = (replace(case, causal=True) for case in elementary(supports, profile))
    return [case for case in cases if case.s > 1 and min(case.seqlens) > 0]


def _narrow(
    supports: Supports, profile: Profile, lengths: tuple[int, ...], s: int, heads: int, page_size: int, **options: Any
) -> DecodeCase:
    """With the narrowest rows of a cache, and of each number the nearest that the subject takes."""
    c, r = latent_dims(supports)
    return DecodeCase(
        dtype=profile.dtype,
        seqlens=lengths,
        s=min(s, supports.max_s or s),
        num_heads=nearest(supports.num_heads, heads),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=nearest(supports.page_sizes, page_size),
        **options,
    )


SUNKEN_STDS = (1e4, 1e3, 256.0, 64.0)
"""Of logits that are all negative: the first puts whole rows below what some kernels take for -inf."""


def rare(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """All scores far below 0, and queries on both sides of a boundary of pages; and the first and the last page of a pool."""
    width = sum(latent_dims(supports))
    s = min(4, supports.max_s or 4)
    least = 0 if takes_empty_rows(supports) else s
    # of rows so narrow one key has all the weight, and what rounds its score changes nothing
    sunken = judgeable_stds(SUNKEN_STDS, profile, width, "typical" if width <= 8 else "sunken")
    plain = max(judgeable_stds((1.0, 0.1), profile, width, "typical"))
    cases = []
    for size in sorted({nearest(supports.page_sizes, size) for size in (1, 16, 64)}):
        lengths = tuple(max(n, least) for n in (size + 1, 2 * size + 1, s, 3 * size + s - 1))
        if profile.coarse:
            lengths = tuple(long_enough(n, size, profile) for n in lengths)
        base = _narrow(supports, profile, lengths, s, 3, size, causal=max(supports.causal), regime="sunken")
        cases += [replace(base, logit_std=std) for std in (sunken[0], sunken[-1])]
        cases.append(replace(base, seed=3, regime="typical", shared_pages=6, logit_std=plain))
    return cases


COUNTS = (
    # sequences, queries, heads, page size
    (96, 1, 24, 64),
    (140, 6, 2, 64),
    (256, 1, 3, 32),
    (200, 1, 1, 256),
    (3, 3, 32, 64),
    (3, 5, 48, 32),
    (2, 8, 128, 64),
    (2, 6, 96, 256),
    (3, 7, 112, 32),
    (2, 8, 64, 16),
)


def counts(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Many sequences, heads and queries, and pages of other sizes; one long sequence, at each place of a batch."""
    width = sum(latent_dims(supports))

    def case(seqlens: tuple[int, ...], s: int, heads: int, page_size: int, seed: int) -> DecodeCase:
        least = 1 if takes_empty_rows(supports) else min(supports.max_s or 8, s)
        causal = supports.causal[seed // 2 % len(supports.causal)]
        lengths = tuple(max(n, least) for n in seqlens)
        made = _narrow(supports, profile, lengths, s, heads, page_size, seed=seed, causal=causal, logit_std=1.0)
        pages = -(-max(seqlens) // made.page_size) * len(seqlens)
        return replace(made, shared_pages=room_for_pages(pages, made.page_size * width))

    def lengths(b: int, page_size: int) -> tuple[int, ...]:
        few = FEW if page_size < 128 else FEW_OF_LARGE_PAGES
        cut: tuple[int, ...] = shortened(tuple(cycled(list(few), b)), width)
        return cut

    cases = [
        case(lengths(b, page_size), s, heads, page_size, seed) for seed, (b, s, heads, page_size) in enumerate(COUNTS)
    ]
    for seed, (long, place) in enumerate(long_lengths(3 * width, most_keys(profile))):
        cases.append(case(placed(long, (5, 70), place), 1 + seed % 2, 2, 1 if long > 2**16 else 64, seed))
    arrangements = (shortened(seqlens, width) for seqlens in arranged())
    return cases + [case(seqlens, 1 + seed % 2, 2, 64, seed) for seed, seqlens in enumerate(arrangements)]


CROSSED = (
    # lengths, queries, heads, page size
    (BETWEEN, 1, 2, 64),
    (BETWEEN[::2], 4, 3, 128),
    (BETWEEN[1::2], 2, 20, 16),
    ((4161, 700), 1, 128, 64),
    ((4225, 1000), 2, 96, 64),
    ((2049, 0, 700), 8, 16, 64),
    ((8400,), 1, 2, 64),
    ((33_000,), 1, 2, 64),
    ((4500, 0, 8641, 4161), 3, 2, 64),
    ((4161, 4161, 4161), 2, 2, 32),
    (tuple(cycled(list(PADDED), 130)), 2, 3, 32),
    (tuple(cycled([7, 12, 3], 256)), 2, 128, 16),  # more than 65535 rows of queries
    ((300, 5), 1, 112, 64),
    ((700, 129), 4, 128, 64),
    ((4200, 9, 130), 6, 2, 64),
    ((0, 4400, 5), 2, 2, 64),
    ((1000, 700), 2, 2, 256),
    ((4097, 8193), 3, 2, 64),
)
LONG_SEEDS = (1, 4, 7, 15, 16)
"""Of the crossed cases that sinks and windows are added to."""


WHOLE = (
    # lengths, queries, heads, page size
    ((200, 70), 1, 16, 32),
    ((130,), 1, 16, 64),
    ((200,), 2, 128, 64),
    ((70, 5), 1, 128, 1),
    ((150,), 4, 32, 64),
    ((129,), 1, 64, 16),
    ((300,), 2, 16, 256),
    ((100,), 2, 64, 64),
)


def _whole(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Published shapes, whole: latents of 512 and 64, with the heads that tensor parallelism leaves and the pages of engines."""
    if no_published_rows(supports):
        return []
    return [_published(supports, profile, *shape, seed) for seed, shape in enumerate(WHOLE, 100)]


def _published(
    supports: Supports, profile: Profile, lengths: tuple[int, ...], s: int, heads: int, page_size: int, seed: int
) -> DecodeCase:
    made = _narrow(supports, profile, lengths, s, heads, page_size, seed=seed, causal=max(supports.causal))
    return replace(made, kv_lora_rank=512, qk_rope_head_dim=64)


def crossed(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Lengths between a few tiles and many, with several queries under the mask, many heads, and empty sequences beside them; whole
    published shapes.
    """
    width = sum(latent_dims(supports))
    cases = []
    for seed, (wanted, s, heads, page_size) in enumerate(CROSSED):
        least = 0 if takes_empty_rows(supports) else min(s, supports.max_s or s)
        lengths = tuple(max(min(n, most_keys(profile)), least) for n in thinned(wanted, width))
        made = _narrow(supports, profile, lengths, s, heads, page_size, seed=seed, causal=max(supports.causal))
        if len(lengths) * made.s * made.num_heads * width <= ELEMENTS:
            cases.append(made)
    return cases + _whole(supports, profile)


def published(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """More keys than a part of a split has: with the heads of one rank and of eight, one query and two."""
    lengths = (((min(n, most_keys(profile)),), s, heads, 64) for n, s, heads in ((4161, 1, 128), (4225, 2, 16)))
    return [_published(supports, profile, *shape, seed) for seed, shape in enumerate(lengths)]


def long(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Of the crossed ones some of many heads and several queries over thousands of keys, which sinks and windows are added to."""
    return [case for case in crossed(supports, profile) if case.seed in LONG_SEEDS]
