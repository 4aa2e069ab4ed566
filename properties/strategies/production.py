"""Fixed cases of the numbers that production has: sequences, heads, queries, pages, keys, tokens.

Width and number can be tested apart. So rows are narrow where the subject leaves the choice, and one number at a time is that
of a real load; where the subject declares wide rows, sequences share pages. Laws begin with these cases, whatever number of
examples is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, latent_formats
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.rank_decode import RankDecodeCase
from mla_spec.operations.rope import RopeCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.operations.write_cache import WriteCase
from mla_spec.properties.strategies.counts import (
    ELEMENTS,
    FEW,
    FEW_OF_LARGE_PAGES,
    arranged,
    latent_dims,
    long_lengths,
    most_keys,
    nearest,
    placed,
    prefill_dims,
    shortened,
)
from mla_spec.properties.strategies.sizes import cycled
from mla_spec.subjects.supports import Supports

DECODE_COUNTS = (
    # sequences, queries, heads, page size
    (96, 1, 24, 64),
    (128, 2, 2, 64),
    (256, 1, 3, 32),
    (200, 1, 1, 256),
    (3, 3, 32, 64),
    (3, 5, 48, 32),
    (2, 8, 128, 64),
    (2, 6, 96, 256),
    (3, 7, 112, 32),
    (2, 8, 64, 16),
)


def decode(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Many sequences, heads and queries, and pages of other sizes; one long sequence, at each place of a batch."""
    c, r = latent_dims(supports)
    shortest = supports.max_s or 8 if supports.empty_row == "unsupported" else 1

    def case(seqlens: tuple[int, ...], s: int, heads: int, page_size: int, seed: int) -> DecodeCase:
        page_size = nearest(supports.page_sizes, page_size)
        pages = -(-max(seqlens) // page_size)
        room = max(ELEMENTS // 2 // (page_size * (c + r)), 64)
        return DecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens=tuple(max(n, min(shortest, s)) for n in seqlens),
            s=min(s, supports.max_s or s),
            num_heads=nearest(supports.num_heads, heads),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=page_size,
            causal=supports.causal[seed // 2 % len(supports.causal)],
            logit_std=1.0,
            shared_pages=0 if pages * len(seqlens) <= room else room,
        )

    def lengths(b: int, page_size: int) -> tuple[int, ...]:
        few = FEW if page_size < 128 else FEW_OF_LARGE_PAGES
        cut: tuple[int, ...] = shortened(tuple(cycled(list(few), b)), c + r)
        return cut

    cases = [
        case(lengths(b, page_size), s, heads, page_size, seed)
        for seed, (b, s, heads, page_size) in enumerate(DECODE_COUNTS)
    ]
    for seed, (long, place) in enumerate(long_lengths(3 * (c + r), most_keys(profile))):
        cases.append(case(placed(long, (5, 70), place), 1 + seed % 2, 2, 1 if long > 2**16 else 64, seed))
    arrangements = (shortened(seqlens, c + r) for seqlens in arranged())
    return cases + [case(seqlens, 1 + seed % 2, 2, 64, seed) for seed, seqlens in enumerate(arrangements)]


PREFILL_COUNTS = (
    # sequences, heads
    (128, 2),
    (2, 24),
    (2, 48),
    (1, 128),
)


def prefill(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Many sequences, heads and queries; keys beyond 2^12 and 2^16 of a few queries, at each place among the sequences."""
    d, v = prefill_dims(supports)
    empty = supports.empty_row != "unsupported"

    def case(queries: tuple[int, ...], keys: tuple[int, ...], heads: int, seed: int) -> PrefillCase:
        return PrefillCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=queries,
            seqlens_k=keys if empty else tuple(max(n, t) for n, t in zip(queries, keys, strict=True)),
            num_heads=nearest(supports.num_heads, heads),
            qk_head_dim=d,
            v_head_dim=v,
            causal=supports.causal[seed % len(supports.causal)],
        )

    cases = []
    for seed, (b, heads) in enumerate(PREFILL_COUNTS):
        keys = shortened(tuple(cycled(list(FEW), b)), nearest(supports.num_heads, heads) * (d + v))
        cases.append(case(tuple(cycled([1, 3, 0, 2, 1], b)), keys, heads, seed))
    heads = nearest(supports.num_heads, 1)
    if 1100**2 * heads <= ELEMENTS:
        cases.append(case((2, 1100), (9, 1100), 1, 0))
    for seed, (long, place) in enumerate((n, p) for n in (4100, 8193, 65700) for p in (range(3) if n < 8193 else (1,))):
        if long * heads * (d + v) <= ELEMENTS and long <= most_keys(profile):
            cases.append(case((3, 2, 1), placed(long, (5, 70), place), 1, seed))
    for seed, keys in enumerate(shortened(keys, heads * (d + v)) for keys in arranged()):
        cases.append(case((2,) * len(keys), keys, 1, seed))
        if sum(keys) ** 2 * heads <= ELEMENTS:
            cases.append(case(keys, keys, 1, seed))
    return cases


RAGGED_COUNTS = (
    # queries of each sequence, over and over; sequences, heads, page size
    ((1, 1, 3, 1, 0), 128, 2, 64),
    ((1, 7, 1), 3, 24, 32),
    ((5, 1), 2, 48, 16),
    ((1, 4), 2, 112, 256),
    ((1, 1100, 1), 3, 2, 64),
    ((3, 1), 2, 128, 64),
)


def ragged_decode(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Many sequences, heads and queries, and pages of other sizes; one long sequence, at each place among the others."""
    c, r = latent_dims(supports)
    empty = supports.empty_row != "unsupported"

    def case(
        queries: tuple[int, ...], keys: tuple[int, ...], heads: int, page_size: int, seed: int
    ) -> RaggedDecodeCase:
        size = nearest(supports.page_sizes, page_size)
        lengths = keys if empty else tuple(max(n, t) for n, t in zip(queries, keys, strict=True))
        pages, room = sum(-(-n // size) for n in lengths), max(ELEMENTS // 2 // (size * (c + r)), 64)
        return RaggedDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=queries,
            seqlens_k=lengths,
            num_heads=nearest(supports.num_heads, heads),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=size,
            causal=supports.causal[seed % len(supports.causal)],
            shared_pages=0 if pages <= room else room,
        )

    cases = []
    for seed, (each, b, heads, page_size) in enumerate(RAGGED_COUNTS):
        queries = tuple(cycled(list(each), b))
        cached = shortened(tuple(cycled(list(FEW if page_size < 128 else FEW_OF_LARGE_PAGES), b)), c + r)
        keys = tuple(n + more for n, more in zip(queries, cached, strict=True))
        if sum(queries) * max(keys) * nearest(supports.num_heads, heads) <= ELEMENTS:
            cases.append(case(queries, keys, heads, page_size, seed))
    for seed, (long, place) in enumerate(long_lengths(3 * (c + r), most_keys(profile))):
        cases.append(case((1, 2, 1), placed(long, (5, 70), place), 2, 1 if long > 2**16 else 64, seed))
    for seed, keys in enumerate(shortened(keys, c + r) for keys in arranged()):
        cases.append(case((1 + seed % 2,) * len(keys), keys, 2, 64, seed))
    return cases


RANKED_COUNTS = (
    # whole sequence, sequences, queries, heads, ranks, interleave
    (70, 128, 1, 2, 8, 1),
    (300, 3, 4, 24, 4, 64),
    (300, 2, 2, 128, 8, 16),
    (8193, 3, 2, 2, 2, 1),
    (65606, 2, 2, 1, 8, 64),
    (131142, 1, 1, 1, 16, 1),
)


def rank_decode(supports: Supports, profile: Profile) -> list[RankDecodeCase]:
    """Many sequences, heads and ranks, and long sequences of which each rank holds its part."""
    c, r = latent_dims(supports)
    return [
        RankDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens=tuple(max(long - 7 * i % long, 3) for i in range(b)),
            s=min(s, supports.max_s or s),
            ranks=ranks,
            rank=seed % ranks,
            interleave=nearest(supports.interleaves, interleave),
            num_heads=nearest(supports.num_heads, heads),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, 64),
            causal=max(supports.causal),
        )
        for seed, (long, b, s, heads, ranks, interleave) in enumerate(RANKED_COUNTS)
        if long // ranks * b * (c + r) <= ELEMENTS and long // ranks <= most_keys(profile)
    ]


SPARSE_HEADS = (24, 32, 48, 64, 96, 112, 128)


def _sparse(supports: Supports, profile: Profile, topk: int, heads: int, seed: int) -> dict[str, Any]:
    c, r = latent_dims(supports)
    return {
        "dtype": profile.dtype,
        "seed": seed,
        "num_heads": nearest(supports.num_heads, heads),
        "kv_lora_rank": c,
        "qk_rope_head_dim": r,
        "topk": -(-topk // supports.topk_multiple) * supports.topk_multiple,
        "invalid": 0.3 * (seed % 2),
    }


def sparse_prefill(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """Many heads and queries; 2048 indices of more keys."""
    cases = [
        SparsePrefillCase(s_q=2, s_kv=70, **_sparse(supports, profile, 20, heads, seed))
        for seed, heads in enumerate(SPARSE_HEADS)
    ]
    many = _sparse(supports, profile, 8, 1, 0)
    elements = many["topk"] * (many["kv_lora_rank"] + many["qk_rope_head_dim"])
    cases.append(SparsePrefillCase(s_q=min(1100, ELEMENTS // elements), s_kv=70, **many))
    for seed, topk in enumerate((320, 576, 2048)):
        cases.append(SparsePrefillCase(s_q=2, s_kv=4161, **_sparse(supports, profile, topk, 2, seed)))
    return cases


def sparse_decode(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """Many sequences, heads and queries; 2048 indices of more slots."""

    def case(b: int, s: int, heads: int, page_size: int, slots: int, topk: int, seed: int) -> SparseDecodeCase:
        size = nearest(supports.page_sizes, page_size)
        return SparseDecodeCase(
            batch=b,
            s=min(s, supports.max_s or s),
            pages=-(-slots // size),
            page_size=size,
            **_sparse(supports, profile, topk, heads, seed),
        )

    cases = [case(2, 1 + i % 2, heads, 32, 70, 20, i) for i, heads in enumerate(SPARSE_HEADS)]
    cases += [case(200, 1, 2, 64, 200, 12, 0), case(2, 8, 64, 256, 600, 12, 1)]
    return [*cases, *(case(2, 1, 2, 64, 4161, topk, i) for i, topk in enumerate((576, 2048)))]


def decode_quantized(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """Many sequences, heads and queries, and more than 2048 keys at each place of a batch, in the first format."""

    def case(name: str, seqlens: tuple[int, ...], s: int, heads: int, page_size: int, seed: int) -> QuantisedDecodeCase:
        size = nearest(supports.page_sizes, page_size)
        return QuantisedDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            format=name,
            page_size=size,
            seqlens=tuple(max(n, s) for n in seqlens),
            s=min(s, supports.max_s or s),
            num_heads=nearest(supports.num_heads, heads),
            causal=supports.causal[seed % len(supports.causal)],
            logit_std=0.1,  # what rounding dequantised rows to 16 bits leaves a meaning
            power_of_two=True,
            shared_pages=20 if len(seqlens) > 3 else 0,
        )

    cases = []
    for name in latent_formats(supports)[:1]:
        cases.append(case(name, tuple(cycled([5, 17, 9, 1, 20], 96)), 1, 2, 32, 0))
        cases.append(case(name, (5, 37), 8, 64, 64, 1))
        cases += [case(name, (20, 37), 1, heads, 64, heads) for heads in (24, 32, 128)]
        cases += [case(name, placed(2100, (5,), place), 1, 2, 64, place) for place in (0, 1)]
        cases += [case(name, (100,) * 8, 1, 2, 64, 0), case(name, placed(700, (5,) * 12, 8), 1, 2, 64, 1)]
    return cases


def merge(supports: Supports, profile: Profile) -> list[MergeCase]:
    """Many rows: of sequences, heads and queries."""
    return [
        MergeCase(
            dtype=profile.dtype,
            seed=seed,
            parts=min(3, supports.max_parts or 3),
            batch=b,
            s=s,
            num_heads=nearest(supports.num_heads, heads),
            head_dim_v=3,
        )
        for seed, (b, s, heads) in enumerate(((256, 1, 3), (2, 8, 128), (96, 2, 24), (1, 1100, 2)))
    ]


def write_cache(supports: Supports, profile: Profile) -> list[WriteCase]:
    """More tokens than 2^16, where rows are narrow, in pages of several sizes."""
    c, r = latent_dims(supports)
    tokens = min(65_600, 2 * ELEMENTS // (c + r))
    return [
        WriteCase(
            dtype=profile.dtype,
            tokens=tokens // count,
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, size),
            skipped=0.01,
        )
        for size, count in ((64, 1), (32, 8), (256, 8))
    ]


def rope(supports: Supports, profile: Profile) -> list[RopeCase]:
    """2^17 pairs of a token and a head; many sequences."""
    return [
        RopeCase(dtype=profile.dtype, batch=b, s=s, heads=heads, dim=2, layout=layout)
        for layout in supports.rope_layouts
        for b, s, heads in ((1, 1040, 128), (4, 128, 64), (256, 1, 16), (1, 66_000, 0))
    ]


def indexer(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Many heads; 2048 of more keys, 1500 of which tie with others."""
    h, d = (3, 8) if supports.indexer_dims is None else min(supports.indexer_dims)
    wide = (64, 16) if supports.indexer_dims is None else max(supports.indexer_dims)

    def case(
        queries: tuple[int, ...], keys: tuple[int, ...], dims: tuple[int, int], regime: str, most: int
    ) -> IndexerCase:
        return IndexerCase(
            dtype=profile.dtype,
            seqlens_q=queries,
            seqlens_k=keys,
            num_heads=dims[0],
            head_dim=dims[1],
            top_k=nearest(supports.indexer_top_k, most),
            regime=regime,
        )

    # 3000 equal keys, of which some but not all are selected, are what "integers" has in few dims
    least = 2 if supports.indexer_dims is None else d
    return [
        case((2, 3), (2500, 4161), (h, d), "typical", 2048),
        case((1, 2), (8300, 65_700), (h, d), "typical", 2048),
        case((2, 1), (5000, 9), (1, least) if supports.indexer_dims is None else (h, d), "integers", 2048),
        case((3, 2), (70, 37), wide, "typical", 20),
        case(tuple(cycled([1, 2, 0, 1, 1], 96)), tuple(cycled(list(FEW), 96)), (h, d), "typical", 8),
    ]


PRODUCTION: dict[str, Callable[[Supports, Profile], list[Any]]] = {
    "rope": rope,
    "prefill": prefill,
    "decode": decode,
    "ragged_decode": ragged_decode,
    "rank_decode": rank_decode,
    "merge": merge,
    "write_cache": write_cache,
    "decode_quantized": decode_quantized,
    "sparse_prefill": sparse_prefill,
    "sparse_decode": sparse_decode,
    "indexer": indexer,
}
"""By the operation's name, its cases."""
