"""Fixed cases in which several numbers of production meet: many heads over thousands of keys, several queries under a mask of
a long sequence, empty sequences beside long ones, prompts after long prefixes.

Kernels choose parts, tiles and buffers from such numbers together. So lengths are of every remainder by the tiles that kernels
have, and numbers that ``production`` raises one at a time are raised two at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.quantised_cache import PagesCase, QuantiseCase
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, latent_formats
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.rank_decode import RankDecodeCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.properties.strategies.counts import (
    BETWEEN,
    ELEMENTS,
    latent_dims,
    most_keys,
    nearest,
    prefill_dims,
    thinned,
)
from mla_spec.properties.strategies.sizes import cycled
from mla_spec.subjects.supports import Supports

PADDED = (5, 37, 0, 1, 70, 20, 0)
"""Lengths of a batch that is padded with empty sequences, over and over."""

DECODE = (
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
)


def _lengths(wanted: tuple[int, ...], elements: int, least: int, supports: Supports, profile: Profile) -> Any:
    """Of the lengths as many as fit, none longer than the profile can be judged at, nor shorter than ``least`` where rows need keys."""
    least = least if supports.empty_row == "unsupported" else 0
    return tuple(max(min(n, most_keys(profile)), least) for n in thinned(wanted, elements))


def decode(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Lengths between a few tiles and many, with several queries under the mask, many heads, and empty sequences beside them."""
    c, r = latent_dims(supports)
    cases = []
    for seed, (wanted, s, heads, page_size) in enumerate(DECODE):
        s = min(s, supports.max_s or s)
        heads = nearest(supports.num_heads, heads)
        seqlens = _lengths(wanted, c + r, s, supports, profile)
        case = DecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens=seqlens,
            s=s,
            num_heads=heads,
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, page_size),
            causal=max(supports.causal),
        )
        if len(seqlens) * s * heads * (c + r) <= ELEMENTS:
            cases.append(case)
    return cases


PREFILL = (
    # queries, keys, heads
    ((3,) * len(BETWEEN), BETWEEN, 1),
    ((300, 1, 129, 0, 40), (2348, 70, 1281, 9, 512), 2),
    ((256, 3, 384), (256, 5, 640), 2),
    ((300, 2, 70), (5, 40, 90), 2),
    ((600, 1, 5, 1), (600, 40, 70, 300), 2),
    ((66, 1), (130, 65), 72),
    ((260, 3), (260, 70), 16),
)


def prefill(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Prompts after long prefixes, in whole tiles and not, and so many queries that their numbers have more than 16 bits."""
    d, v = prefill_dims(supports)

    def case(queries: tuple[int, ...], keys: tuple[int, ...], heads: int, seed: int, causal: bool) -> PrefillCase:
        lengths = (min(n, most_keys(profile)) for n in keys)
        if supports.empty_row == "unsupported":
            lengths = (max(n, s if causal else min(s, 1)) for n, s in zip(lengths, queries, strict=True))
        return PrefillCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=queries,
            seqlens_k=tuple(lengths),
            num_heads=nearest(supports.num_heads, heads),
            qk_head_dim=d,
            v_head_dim=v,
            causal=causal,
        )

    cases = [case(*wanted, seed, max(supports.causal)) for seed, wanted in enumerate(PREFILL)]
    cases.append(case((140, 3), (1300, 70), 2, len(cases), min(supports.causal)))
    if supports.empty_row != "unsupported" or False in supports.causal:
        cases.append(case((66_000, 3), (20, 5), 1, len(cases), min(supports.causal)))
    return [
        case
        for case in cases
        if (sum(case.seqlens_q) + sum(case.seqlens_k)) * case.num_heads * (d + v) <= ELEMENTS
        and sum(q * k for q, k in zip(case.seqlens_q, case.seqlens_k, strict=True)) * case.num_heads <= ELEMENTS
    ]


def with_options(operation: str, supports: Supports, profile: Profile, *, sink: bool) -> list[Any]:
    """Sinks, or windows, of many heads and several queries over thousands of keys; windows of hundreds of keys."""
    chosen: list[Any] = decode(supports, profile) if operation == "decode" else prefill(supports, profile)
    chosen = [case for case in chosen if case.seed in ((1, 4, 7) if operation == "decode" else (1, 4))]
    if sink:
        return [replace(case, sink="finite") for case in chosen]
    made = [replace(case, window=window, causal=True) for case, window in zip(chosen, (513, 130, 200), strict=False)]
    both = [replace(case, sink="finite") for case in made[-1:]] if operation in supports.dense_sink else []
    return made + both


RAGGED = (
    # queries, keys, heads, page size
    (tuple(cycled([1, 2, 1, 4], len(BETWEEN))), BETWEEN, 2, 64),
    ((1, 300, 1, 129, 2), (70, 2348, 4161, 1281, 512), 2, 16),
    ((3, 1), (2049, 700), 128, 64),
    (tuple([1] * 66 + [70, 1, 0, 0, 0]), tuple([37] * 66 + [200, 5, 0, 0, 0]), 2, 32),
    (tuple([70] + [1] * 67), tuple([90] + [37] * 67), 2, 64),
    ((66, 1), (90, 37), 72, 64),
    ((66_000, 3), (20, 5), 1, 64),
)


def ragged_decode(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Prompts after long prefixes and decoded tokens of long sequences; many decoded tokens before a prompt, and padding behind it."""
    c, r = latent_dims(supports)
    cases = []
    for seed, (queries, keys, heads, page_size) in enumerate(RAGGED):
        heads = nearest(supports.num_heads, heads)
        if sum(keys) * (c + r) <= ELEMENTS and sum(queries) * max(keys) * heads <= ELEMENTS:
            lengths = tuple(min(n, most_keys(profile)) for n in keys)
            more_keys = all(s <= t for s, t in zip(queries, keys, strict=True))
            if supports.empty_row == "unsupported" and not more_keys and False not in supports.causal:
                continue
            cases.append(
                RaggedDecodeCase(
                    dtype=profile.dtype,
                    seed=seed,
                    seqlens_q=queries,
                    seqlens_k=lengths,
                    num_heads=heads,
                    kv_lora_rank=c,
                    qk_rope_head_dim=r,
                    page_size=nearest(supports.page_sizes, page_size),
                    causal=max(supports.causal) if more_keys else min(supports.causal),
                )
            )
    return cases


RANKED = (
    # lengths of whole sequences, queries, heads, ranks, rank, interleave
    (tuple(2 * n for n in BETWEEN[1::4]), 4, 2, 2, 1, 1),
    ((8400, 2049, 130), 3, 32, 2, 0, 64),
    (tuple(cycled([130, 5, 40, 97, 112], 40)), 2, 2, 8, 6, 16),
    ((1006, 302, 45, 3), 3, 2, 16, 13, 1),
)


def rank_decode(supports: Supports, profile: Profile) -> list[RankDecodeCase]:
    """Several queries of long sequences, the last ranks of many, and a rank without keys of some sequences of a large batch."""
    c, r = latent_dims(supports)
    return [
        RankDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens=thinned(lengths, (c + r) // ranks + 1),
            s=min(s, supports.max_s or s),
            ranks=ranks,
            rank=rank,
            interleave=interleave,
            num_heads=nearest(supports.num_heads, heads),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, 64),
            causal=max(supports.causal),
        )
        for seed, (lengths, s, heads, ranks, rank, interleave) in enumerate(RANKED)
        if max(lengths) // ranks <= most_keys(profile)
    ]


QUANTIZED = (
    # lengths, queries, heads, page size
    ((1024, 741), 3, 2, 64),
    ((300, 0, 129), 4, 2, 32),
    ((577, 5), 2, 128, 64),
)


def decode_quantized(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """Several queries and many heads over hundreds of keys, and an empty sequence beside them, in the first format."""
    empty = supports.empty_row != "unsupported"
    return [
        QuantisedDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            format=name,
            page_size=nearest(supports.page_sizes, page_size),
            seqlens=tuple(max(n, 0 if empty else s) for n in lengths),
            s=min(s, supports.max_s or s),
            num_heads=nearest(supports.num_heads, heads),
            causal=max(supports.causal),
            logit_std=0.1,
            power_of_two=True,
            shared_pages=20,
        )
        for name in latent_formats(supports)[:1]
        for seed, (lengths, s, heads, page_size) in enumerate(QUANTIZED)
    ]


def _sparse(supports: Supports, profile: Profile, topk: int, heads: int, **options: Any) -> dict[str, Any]:
    c, r = latent_dims(supports)
    options["with_length"] = options.get("with_length", False) and supports.topk_length
    return {
        "dtype": profile.dtype,
        "num_heads": nearest(supports.num_heads, heads),
        "kv_lora_rank": c,
        "qk_rope_head_dim": r,
        "topk": -(-topk // supports.topk_multiple) * supports.topk_multiple,
        **options,
    }


SPARSE: tuple[tuple[int, int, dict[str, Any]], ...] = (
    # indices, heads, what else
    (2048, 2, {"invalid": 0.97}),  # holes as long as a tile
    (576, 2, {"with_length": True, "seed": 1}),
    (320, 128, {"seed": 2}),
    (300, 2, {"duplicates": True, "seed": 3}),
)


def _sinks(supports: Supports) -> list[tuple[int, int, dict[str, Any]]]:
    return [(1030, 80, {"sink": "finite", "seed": 4})] if supports.attention_sink else []


def sparse_prefill(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """Many heads, holes, lengths and repetitions among hundreds of indices; a sink beside them; thousands of queries, of more than
    2^17 rows a few.
    """
    many = [(2100, 300, 16), (3, 131_200, 64)]
    return [
        *(
            SparsePrefillCase(s_q=4, s_kv=2 * topk + 65, **_sparse(supports, profile, topk, heads, **options))
            for topk, heads, options in (*SPARSE, *_sinks(supports))
        ),
        *(SparsePrefillCase(s_q=s_q, s_kv=s_kv, **_sparse(supports, profile, topk, 2)) for s_q, s_kv, topk in many),
    ]


def sparse_decode(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """The same, with several queries of several sequences, and many sequences with many indices."""
    many: dict[str, Any] = {"batch": 70, "with_length": True, "seed": 5}
    cases = []
    for topk, heads, options in (*SPARSE, *_sinks(supports), (130, 2, many)):
        size = nearest(supports.page_sizes, 64)
        made = {"batch": 4, "s": min(2, supports.max_s or 2), **_sparse(supports, profile, topk, heads, **options)}
        cases.append(SparseDecodeCase(pages=-(-(2 * topk + 65) // size), page_size=size, **made))
    return cases


def indexer(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Chunks of queries and many heads over thousands of keys, and many sequences of hundreds."""
    narrow = (3, 8) if supports.indexer_dims is None else min(supports.indexer_dims)
    wide = (64, 8) if supports.indexer_dims is None else max(supports.indexer_dims)

    def case(queries: tuple[int, ...], keys: tuple[int, ...], dims: tuple[int, int], most: int) -> IndexerCase:
        return IndexerCase(
            dtype=profile.dtype,
            seqlens_q=queries,
            seqlens_k=keys,
            num_heads=dims[0],
            head_dim=dims[1],
            top_k=nearest(supports.indexer_top_k, most),
        )

    return [
        case((130, 1, 64), (1500, 300, 1100), narrow, 512),
        case((3, 2), (1100, 700), wide, 512),
        case((1,) * 12, tuple(range(100, 460, 30)), narrow, 64),
    ]


def merge(supports: Supports, profile: Profile) -> list[MergeCase]:
    """More than 65535 rows."""
    return [
        MergeCase(
            dtype=profile.dtype,
            parts=2,
            batch=256,
            s=3,
            num_heads=nearest(supports.num_heads, 128),
            head_dim_v=2,
            empty=0.0 if supports.empty_row == "unsupported" else 0.1,
        )
    ]


TOKENS = ((64, 1344), (32, 320), (64, 128), (16, 321))
"""Page sizes and tokens of quantised caches, in whole pages and not."""


def quantize_cache(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    """Hundreds of tokens in every format, more than a thousand in the first."""
    return [
        QuantiseCase(dtype=profile.dtype, format=name, page_size=nearest(supports.page_sizes, size), tokens=tokens)
        for name, (size, tokens) in zip(supports.cache_formats, cycle(TOKENS))
    ]


def dequantize_cache(supports: Supports, profile: Profile) -> list[PagesCase]:
    """The same, and more than a thousand pages of the first format where pages may be so small."""
    counts = ((1, 1100), *TOKENS)
    return [
        PagesCase(dtype=profile.dtype, format=name, page_size=nearest(supports.page_sizes, size), tokens=tokens)
        for name, (size, tokens) in zip(supports.cache_formats, cycle(counts))
    ]


CROSSED: dict[str, Callable[[Supports, Profile], list[Any]]] = {
    "prefill": prefill,
    "decode": decode,
    "ragged_decode": ragged_decode,
    "rank_decode": rank_decode,
    "merge": merge,
    "quantize_cache": quantize_cache,
    "dequantize_cache": dequantize_cache,
    "decode_quantized": decode_quantized,
    "sparse_prefill": sparse_prefill,
    "sparse_decode": sparse_decode,
    "indexer": indexer,
}
"""By the operation's name, its cases."""
