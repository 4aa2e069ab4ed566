"""Fixed cases of ``ragged_decode``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.properties.fixed.counts import (
    BETWEEN,
    ELEMENTS,
    FEW,
    FEW_OF_LARGE_PAGES,
    arranged,
    first_of,
    latent_dims,
    long_lengths,
    most_keys,
    nearest,
    ordinary_page_size,
    placed,
    room_for_pages,
    shortened,
    takes_empty_rows,
)
from mla_spec.properties.strategies.sizes import cycled, long_enough
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """A prompt, a decoded token, a prompt after a cached prefix, and another decoded token."""
    c, r = first_of(supports.latent_dims, (24, 8))
    return [
        RaggedDecodeCase(
            dtype=profile.dtype,
            seqlens_q=(9, 1, 5, 1),
            seqlens_k=tuple(long_enough(n, ordinary_page_size(supports), profile) for n in (9, 37, 20, 5)),
            num_heads=first_of(supports.num_heads, 3),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=ordinary_page_size(supports),
            causal=supports.causal[0],
        )
    ]


def elementary(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """One query and key; a prompt beside decoded tokens; ends of pages; sequences without queries or keys."""
    (base,) = ordinary(supports, profile)
    if profile.coarse:
        return [base]
    size = base.page_size
    alone = replace(base, seqlens_q=(1,), seqlens_k=(1,), num_heads=nearest(supports.num_heads, 1))
    none = [replace(alone, seqlens_q=(2, 0, 1), seqlens_k=(0, 3, 2))] if takes_empty_rows(supports) else []
    return [
        alone,
        replace(alone, seqlens_q=(2, 1), seqlens_k=(2, 2)),
        replace(alone, seqlens_q=(1, 3, 1), seqlens_k=(size, size + 3, 2 * size + 1)),
        *none,
        base,
    ]


def several_queries(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Prompts of several tokens, causal."""
    (base,) = ordinary(supports, profile)
    return [replace(base, causal=True)]


def _narrow(
    supports: Supports,
    profile: Profile,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: int,
    page_size: int,
    **options: Any,
) -> RaggedDecodeCase:
    """With the narrowest rows of a cache, and of heads and page sizes the nearest that the subject takes."""
    c, r = latent_dims(supports)
    return RaggedDecodeCase(
        dtype=profile.dtype,
        seqlens_q=queries,
        seqlens_k=keys,
        num_heads=nearest(supports.num_heads, heads),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=nearest(supports.page_sizes, page_size),
        **options,
    )


def rare(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Hundreds of queries among decoded tokens, before and behind them; full and empty prefixes that end with a page."""

    def case(queries: tuple[int, ...], pasts: tuple[int, ...], size: int, seed: int) -> RaggedDecodeCase:
        keys = tuple(n + long_enough(past, size, profile) for n, past in zip(queries, pasts, strict=True))
        if takes_empty_rows(supports) and not profile.coarse:
            keys = (*keys[:-1], 0)
        causal = supports.causal[seed % len(supports.causal)]
        return _narrow(supports, profile, queries, keys, 3, size, seed=seed, causal=causal)

    size = nearest(supports.page_sizes, 16)
    return [
        case((1, 300, 1, 0, 5, 1, 2), (0, 0, 2 * size - 1, 3, size, 40, 0), size, 0),
        case((200, 1, 1, 70, 1), (size, 3 * size, 70, 0, 0), nearest(supports.page_sizes, 64), 1),
    ]


COUNTS = (
    # queries of each sequence, over and over; sequences, heads, page size
    ((1, 1, 3, 1, 0), 140, 2, 64),
    ((1, 7, 1), 3, 24, 32),
    ((5, 1), 2, 48, 16),
    ((1, 4), 2, 112, 256),
    ((1, 1100, 1), 3, 2, 64),
    ((3, 1), 2, 128, 64),
)


def counts(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Many sequences, heads and queries, and pages of other sizes; one long sequence, at each place among the others."""
    width = sum(latent_dims(supports))

    def case(
        queries: tuple[int, ...], keys: tuple[int, ...], heads: int, page_size: int, seed: int
    ) -> RaggedDecodeCase:
        if not takes_empty_rows(supports):
            keys = tuple(max(n, t) for n, t in zip(queries, keys, strict=True))
        causal = supports.causal[seed % len(supports.causal)]
        made = _narrow(supports, profile, queries, keys, heads, page_size, seed=seed, causal=causal)
        pages = sum(-(-n // made.page_size) for n in keys)
        return replace(made, shared_pages=room_for_pages(pages, made.page_size * width))

    cases = []
    for seed, (each, b, heads, page_size) in enumerate(COUNTS):
        queries = tuple(cycled(list(each), b))
        cached = shortened(tuple(cycled(list(FEW if page_size < 128 else FEW_OF_LARGE_PAGES), b)), width)
        keys = tuple(n + more for n, more in zip(queries, cached, strict=True))
        if sum(queries) * max(keys) * nearest(supports.num_heads, heads) <= ELEMENTS:
            cases.append(case(queries, keys, heads, page_size, seed))
    for seed, (long, place) in enumerate(long_lengths(3 * width, most_keys(profile))):
        cases.append(case((1, 2, 1), placed(long, (5, 70), place), 2, 1 if long > 2**16 else 64, seed))
    for seed, keys in enumerate(shortened(keys, width) for keys in arranged()):
        cases.append(case((1 + seed % 2,) * len(keys), keys, 2, 64, seed))
    return cases


CROSSED = (
    # queries, keys, heads, page size
    (tuple(cycled([1, 2, 1, 4], len(BETWEEN))), BETWEEN, 2, 64),
    ((1, 300, 1, 129, 2), (70, 2311, 4161, 1290, 512), 2, 16),
    ((3, 1), (2049, 700), 128, 64),
    (tuple([1] * 66 + [70, 1, 0, 0, 0]), tuple([37] * 66 + [200, 5, 0, 0, 0]), 2, 32),
    (tuple([70] + [1] * 67), tuple([90] + [37] * 67), 2, 64),
    ((66, 1), (90, 37), 72, 64),
    ((66_000, 3), (20, 5), 1, 64),
)


def crossed(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Prompts after long prefixes and decoded tokens of long sequences; many decoded tokens before a prompt, and padding behind it."""
    width = sum(latent_dims(supports))
    cases = []
    for seed, (queries, keys, heads, page_size) in enumerate(CROSSED):
        heads = nearest(supports.num_heads, heads)
        if sum(keys) * width > ELEMENTS or sum(queries) * max(keys) * heads > ELEMENTS:
            continue
        more_keys = all(s <= t for s, t in zip(queries, keys, strict=True))
        if not (more_keys or takes_empty_rows(supports) or False in supports.causal):
            continue
        lengths = tuple(min(n, most_keys(profile)) for n in keys)
        causal = max(supports.causal) if more_keys else min(supports.causal)
        cases.append(_narrow(supports, profile, queries, lengths, heads, page_size, seed=seed, causal=causal))
    return cases
