"""Fixed cases of ``decode_quantized``."""

from __future__ import annotations

from dataclasses import replace

from mla_spec.bounds.profile import Profile
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, latent_formats
from mla_spec.properties.fixed.counts import LENGTHS, first_of, nearest, ordinary_page_size, placed, takes_empty_rows
from mla_spec.properties.strategies.sizes import cycled
from mla_spec.subjects.supports import Supports

MEANINGFUL_STD = 0.1
"""Of logits to which rounding dequantised rows to 16 bits leaves a meaning."""


def ordinary(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """As ``decode``, in the first format of a latent cache."""
    return [
        QuantisedDecodeCase(
            dtype=profile.dtype,
            format=name,
            page_size=ordinary_page_size(supports),
            seqlens=LENGTHS,
            s=min(2, supports.max_s or 2),
            num_heads=first_of(supports.num_heads, 3),
            causal=supports.causal[0],
            logit_std=MEANINGFUL_STD,
            power_of_two=True,
        )
        for name in latent_formats(supports)[:1]
    ]


def elementary(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """Every format of a latent cache once; an empty sequence."""
    base = ordinary(supports, profile)
    cases = [replace(case, format=name) for case in base for name in latent_formats(supports)]
    return [*cases, *(replace(case, seqlens=(3, 0, 17), s=1) for case in base if takes_empty_rows(supports))]


def _case(
    supports: Supports,
    profile: Profile,
    lengths: tuple[int, ...],
    s: int,
    heads: int,
    page_size: int,
    *,
    seed: int,
    causal: bool,
    shared_pages: int,
    formats: int = 1,
) -> list[QuantisedDecodeCase]:
    """In the first formats of a latent cache, with the nearest numbers that the subject takes; none where it has no format."""
    return [
        QuantisedDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            format=name,
            page_size=nearest(supports.page_sizes, page_size),
            seqlens=lengths,
            s=min(s, supports.max_s or s),
            num_heads=nearest(supports.num_heads, heads),
            causal=causal,
            logit_std=MEANINGFUL_STD,
            power_of_two=True,
            shared_pages=shared_pages,
        )
        for name in latent_formats(supports)[:formats]
    ]


COUNTS = (
    # lengths, queries, heads, page size, seed
    (tuple(cycled([5, 17, 9, 1, 20, 2, 30], 140)), 1, 2, 32, 0),
    ((5, 37), 5, 128, 64, 1),
    ((20, 37), 1, 24, 64, 24),
    ((20, 37), 1, 32, 64, 32),
    ((20, 37), 1, 128, 64, 128),
    (placed(2048, (5,), 0), 1, 2, 16, 0),
    (placed(2100, (5,), 1), 2, 2, 64, 1),
    ((5, 300), 1, 2, 256, 2),
    ((100,) * 8, 1, 2, 64, 0),
    (placed(300, (5,) * 9, 8), 1, 2, 64, 1),
)


def counts(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """Many sequences, heads and queries, and more than 2048 keys at each place of a batch."""
    cases = []
    for lengths, s, heads, page_size, seed in COUNTS:
        causal = supports.causal[seed % len(supports.causal)]
        shared = 20 if len(lengths) > 3 else 0
        enough = tuple(max(n, s) for n in lengths)
        cases += _case(supports, profile, enough, s, heads, page_size, seed=seed, causal=causal, shared_pages=shared)
    return cases


CROSSED = (
    # lengths, queries, heads, page size
    ((1024, 741), 3, 2, 64),
    ((300, 0, 129), 4, 2, 32),
    ((577, 5), 2, 128, 64),
    ((2300,), 5, 24, 64),
)

OF_EVERY_FORMAT = (
    # lengths, queries, heads, page size
    ((20, 37), 8, 24, 64),
    ((100,), 2, 128, 64),
)


def crossed(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """Several queries and many heads over hundreds of keys, and an empty sequence beside them; a few keys in every format."""
    cases = []
    causal, every = max(supports.causal), len(supports.cache_formats)
    for seed, (lengths, s, heads, page_size) in enumerate(OF_EVERY_FORMAT, 100):
        enough = tuple(max(n, s) for n in lengths)
        cases += _case(
            supports, profile, enough, s, heads, page_size, seed=seed, causal=causal, shared_pages=0, formats=every
        )
    for seed, (lengths, s, heads, page_size) in enumerate(CROSSED):
        enough = lengths if takes_empty_rows(supports) else tuple(max(n, s) for n in lengths)
        cases += _case(supports, profile, enough, s, heads, page_size, seed=seed, causal=causal, shared_pages=20)
    return cases
