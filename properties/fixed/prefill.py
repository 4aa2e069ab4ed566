"""Fixed cases of ``prefill``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.prefill import PrefillCase
from mla_spec.properties.fixed.counts import (
    BETWEEN,
    ELEMENTS,
    FEW,
    arranged,
    first_of,
    most_keys,
    nearest,
    placed,
    prefill_dims,
    shortened,
    takes_empty_rows,
)
from mla_spec.properties.strategies.sizes import cycled, judgeable_stds
from mla_spec.subjects.supports import Supports


def ordinary(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Three packed sequences, with more keys than queries and with as many."""
    d, v = first_of(supports.prefill_dims, (24, 16))
    return [
        PrefillCase(
            dtype=profile.dtype,
            seqlens_q=(5, 9, 2),
            seqlens_k=(20, 9, 37),
            num_heads=first_of(supports.num_heads, 3),
            qk_head_dim=d,
            v_head_dim=v,
            causal=supports.causal[0],
        )
    ]


def elementary(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """One query and key; a cached prefix beside none; rows without keys; a whole tile and a token; peaked scores."""
    (base,) = ordinary(supports, profile)
    if profile.coarse:
        return [base]
    one = nearest(supports.num_heads, 1)
    alone = replace(base, seqlens_q=(1,), seqlens_k=(1,), num_heads=one)
    none = [replace(alone, seqlens_q=(2, 3, 1), seqlens_k=(0, 1, 4))] if takes_empty_rows(supports) else []
    return [
        alone,
        replace(alone, seqlens_q=(2, 2), seqlens_k=(2, 5)),
        *none,
        replace(base, seqlens_q=(17, 3), seqlens_k=(17, 34)),
        replace(base, seed=1, logit_std=max(judgeable_stds((1.0, 16.0, 64.0), profile, base.qk_head_dim))),
        base,
    ]


def causal(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Self-attention of two sequences."""
    (base,) = ordinary(supports, profile)
    return [replace(base, seqlens_q=(2, 17), seqlens_k=(2, 17), causal=True)]


def _narrow(
    supports: Supports, profile: Profile, queries: tuple[int, ...], keys: tuple[int, ...], heads: int, **options: Any
) -> PrefillCase:
    """With the narrowest rows of keys and values, and the nearest number of heads that the subject takes."""
    d, v = prefill_dims(supports)
    return PrefillCase(
        dtype=profile.dtype,
        seqlens_q=queries,
        seqlens_k=keys,
        num_heads=nearest(supports.num_heads, heads),
        qk_head_dim=d,
        v_head_dim=v,
        **options,
    )


def full_and_empty_prefixes(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """New tokens of sequences of which some have a cached prefix and others none."""
    return [
        _narrow(supports, profile, (3, 2, 4, 1), keys, 3, seed=seed)
        for seed, keys in enumerate(((3, 40, 4, 18), (19, 2, 70, 1)))
        if takes_empty_rows(supports)
    ]


COUNTS = (
    # sequences, heads
    (140, 2),
    (2, 24),
    (2, 48),
    (1, 128),
)


def counts(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Many sequences, heads and queries; keys beyond 2^12 and 2^16 of a few queries, at each place among the sequences."""
    width = sum(prefill_dims(supports))

    def case(queries: tuple[int, ...], keys: tuple[int, ...], heads: int, seed: int) -> PrefillCase:
        if not takes_empty_rows(supports):
            keys = tuple(max(n, t) for n, t in zip(queries, keys, strict=True))
        causal = supports.causal[seed % len(supports.causal)]
        return _narrow(supports, profile, queries, keys, heads, seed=seed, causal=causal)

    cases = []
    for seed, (b, heads) in enumerate(COUNTS):
        keys = shortened(tuple(cycled(list(FEW), b)), nearest(supports.num_heads, heads) * width)
        cases.append(case(tuple(cycled([1, 3, 0, 2, 1], b)), keys, heads, seed))
    heads = nearest(supports.num_heads, 1)
    if 1100**2 * heads <= ELEMENTS:
        cases.append(case((2, 1100), (9, 1100), 2, 0))
    for seed, (long, place) in enumerate((n, p) for n in (4100, 8193, 65700) for p in (range(3) if n < 8193 else (1,))):
        if long * heads * width <= ELEMENTS and long <= most_keys(profile):
            cases.append(case((3, 2, 1), placed(long, (5, 70), place), 1, seed))
    for seed, keys in enumerate(shortened(keys, heads * width) for keys in arranged()):
        cases.append(case((2,) * len(keys), keys, 1, seed))
        if sum(keys) ** 2 * heads <= ELEMENTS:
            cases.append(case(keys, keys, 1, seed))
    return cases


CROSSED = (
    # queries, keys, heads
    ((3,) * len(BETWEEN), BETWEEN, 1),
    ((300, 1, 129, 0, 40), (2311, 70, 1290, 9, 512), 2),
    ((256, 3, 384), (256, 5, 640), 2),
    ((300, 2, 70), (5, 40, 90), 2),
    ((600, 1, 5, 1), (600, 40, 70, 300), 2),
    ((66, 1), (130, 65), 72),
    ((260, 3), (260, 70), 16),
    ((4, 5, 3, 2), (4100, 5, 1027, 2), 2),
    ((2, 5, 3), (8194, 5010, 3), 1),
    ((1100, 2), (500, 9), 2),
    ((70, 2), (4400, 9), 2),
)

WHOLE = (
    # queries, keys, heads
    ((5, 6), (20, 200), 2),
    ((130,), (130,), 16),
)
"""Of DeepSeek-V3's heads of 192 and 128."""

MANY_QUERIES = (
    # queries, keys, heads
    ((140, 3), (1300, 70), 2),
    ((1100, 3), (40, 70), 24),
    ((1100, 3), (40, 70), 112),
)
"""Which see all keys, where the subject can do without the mask."""


def crossed(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Prompts after long prefixes, in whole tiles and not, beside some without; so many queries that their numbers have 17 bits;
    heads as wide as published ones.
    """

    def case(queries: tuple[int, ...], keys: tuple[int, ...], heads: int, seed: int, causal: bool) -> PrefillCase:
        lengths = (min(n, most_keys(profile)) for n in keys)
        if not takes_empty_rows(supports):
            lengths = (max(n, s if causal else min(s, 1)) for n, s in zip(lengths, queries, strict=True))
        return _narrow(supports, profile, queries, tuple(lengths), heads, seed=seed, causal=causal)

    cases = [case(*wanted, seed, max(supports.causal)) for seed, wanted in enumerate(CROSSED)]
    for queries, keys, heads in (*MANY_QUERIES, ((66_000, 3), (20, 5), 1)):
        if keys[0] >= queries[0] or takes_empty_rows(supports) or False in supports.causal:
            cases.append(case(queries, keys, heads, len(cases), min(supports.causal)))
    if supports.prefill_dims is None or (192, 128) in supports.prefill_dims:
        whole = (case(*wanted, seed, max(supports.causal)) for seed, wanted in enumerate(WHOLE, 100))
        cases += [replace(each, qk_head_dim=192, v_head_dim=128) for each in whole]
    return [
        case
        for case in cases
        if (sum(case.seqlens_q) + sum(case.seqlens_k)) * case.num_heads * (case.qk_head_dim + case.v_head_dim)
        <= ELEMENTS
        and sum(q * k for q, k in zip(case.seqlens_q, case.seqlens_k, strict=True)) * case.num_heads <= ELEMENTS
    ]


def long(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Of the crossed ones those with prompts after long prefixes, which sinks and windows are added to."""
    return [case for case in crossed(supports, profile) if case.seed in (1, 4, 7)]
