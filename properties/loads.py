"""The production loads: prefill, decode over rows of numbers and of codes, and sparse decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import OPERATION as DECODE_OPERATION
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.operations.prefill import OPERATION as PREFILL_OPERATION
from mla_spec.operations.prefill import PrefillCase, PrefillInputs
from mla_spec.operations.quantised_decode import OPERATION as QUANTIZED_OPERATION
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, QuantisedDecodeInputs, latent_formats
from mla_spec.operations.sparse import SPARSE_DECODE as SPARSE_OPERATION
from mla_spec.operations.sparse import SparseDecodeCase, SparseInputs
from mla_spec.operations.workload_line import shared
from mla_spec.properties.fixed.counts import nearest
from mla_spec.properties.load import Load, Row
from mla_spec.subjects.supports import Supports

HEADS = (128, 64, 32, 24)
"""Heads of a rank: of published models, whole or divided by tensor parallelism."""

RUNGS = ((2, 100), (4, 200), (17, 200), (40, 600), (64, 2048), (128, 4096), (128, 8192))
"""(sequences, keys of the longest), from what a CPU computes in a tenth of a second to a real load."""


def _heads(supports: Supports) -> list[int]:
    """Different numbers of heads that are allowed, the largest first."""
    return sorted({nearest(supports.num_heads, h) for h in HEADS}, reverse=True)


def _lengths(seed: int, b: int, longest: int, least: int) -> tuple[int, ...]:
    """Lengths from half of the longest on, with the longest and the least among them."""
    rng = np.random.default_rng([seed, 42])
    lengths = rng.integers(max(longest // 2, least), longest + 1, b)
    lengths[rng.permutation(b)[:2]] = longest, least
    return tuple(int(n) for n in lengths)


def _latent_dims(supports: Supports) -> tuple[int, int]:
    """Those of published models, or the widest that are allowed."""
    dims = supports.latent_dims
    return (512, 64) if dims is None or (512, 64) in dims else max(dims, key=sum)


def _page_size(supports: Supports) -> int:
    size: int = nearest(supports.page_sizes, 64)
    return size


def _queries(supports: Supports, heads: int) -> int:
    """Two of a sequence, as where tokens are guessed ahead, with every second number of heads."""
    return min(2, supports.max_s or 2) if heads in HEADS[1::2] else 1


def _decode_ladders(supports: Supports, profile: Profile, seed: int) -> list[list[DecodeCase]]:
    c, r = _latent_dims(supports)
    size = _page_size(supports)

    def case(b: int, longest: int, heads: int, rung: int) -> DecodeCase:
        s = _queries(supports, heads)
        seqlens = _lengths(seed + rung, b, longest, s)
        return DecodeCase(
            dtype=profile.dtype,
            seed=seed + rung,
            seqlens=seqlens,
            s=s,
            num_heads=heads,
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=size,
            causal=max(supports.causal),
            shared_pages=shared(seqlens, size, c + r),
        )

    return [[case(b, longest, h, i) for i, (b, longest) in enumerate(RUNGS)] for h in _heads(supports)]


def _rows_of(case: Any) -> dict[str, int]:
    return {"sequence": len(case.seqlens), "head": case.num_heads, "query": case.s}


def _has_keys(lengths: tuple[int, ...], s: int, supports: Supports) -> bool:
    return supports.empty_row != "unsupported" or min(lengths) >= s


def _accepts(supports: Supports, case: Any, *fields: tuple[str, Any]) -> bool:
    """Whether the number of heads and other values of fields are among those supported."""
    wanted = (("num_heads", case.num_heads), *fields)
    return all((allowed := getattr(supports, name)) is None or value in allowed for name, value in wanted)


def _decode_fits(case: DecodeCase, supports: Supports) -> bool:
    dims = case.kv_lora_rank, case.qk_rope_head_dim
    return (
        _accepts(supports, case, ("page_sizes", case.page_size), ("latent_dims", dims), ("causal", case.causal))
        and case.s <= (supports.max_s or case.s)
        and _has_keys(case.seqlens, case.s, supports)
    )


def _seen(length: int, s: int, query: int, *, causal: bool) -> int:
    """Keys that a query sees."""
    return max(length - s + 1 + query, 0) if causal else length


def _one_of_decode(inputs: DecodeInputs, row: Row) -> DecodeInputs:
    """One query against the keys that it sees, in pages of its own."""
    i, head, query = row
    length, s, size = int(inputs.cache_seqlens[i]), inputs.q.shape[1], inputs.kv_cache.shape[1]
    pages = inputs.block_table[i, : -(-length // size)]
    return replace(
        inputs,
        q=inputs.q[i : i + 1, query : query + 1, head : head + 1],
        kv_cache=inputs.kv_cache[pages] if len(pages) else inputs.kv_cache[:1],
        block_table=np.arange(max(len(pages), 1), dtype=np.int32)[None],
        cache_seqlens=np.array([_seen(length, s, query, causal=inputs.causal)], dtype=np.int32),
        causal=False,
    )


def _places_of_decode(row: Row) -> tuple[Any, ...]:
    """In out [b, s, h, c] and the LSE [b, h, s]."""
    i, head, query = (slice(n, n + 1) for n in row)
    return (i, query, head), (i, head, query)


DECODE = Load(
    operation=DECODE_OPERATION,
    ladders=_decode_ladders,
    fits=_decode_fits,
    axes=_rows_of,
    keys=lambda case: list(case.seqlens),
    work=lambda case: sum(case.seqlens) * case.s * case.num_heads,
    one=_one_of_decode,
    places=_places_of_decode,
)


def _quantised_ladders(supports: Supports, profile: Profile, seed: int) -> list[list[QuantisedDecodeCase]]:
    formats = latent_formats(supports)
    if not formats:
        return []
    name = "fp8_ds_mla" if "fp8_ds_mla" in formats else formats[0]
    size = _page_size(supports)

    def case(b: int, longest: int, heads: int, rung: int) -> QuantisedDecodeCase:
        s = _queries(supports, heads)
        made = QuantisedDecodeCase(
            dtype=profile.dtype,
            seed=seed + rung,
            format=name,
            page_size=size,
            seqlens=_lengths(seed + rung, b, longest, s),
            s=s,
            num_heads=heads,
            causal=max(supports.causal),
            logit_std=0.1,  # what rounding dequantised rows to 16 bits leaves a meaning
            power_of_two=True,
        )
        return replace(made, shared_pages=shared(made.seqlens, size, made.layout.width) or 40 * (b > 4))

    return [[case(b, longest, h, i) for i, (b, longest) in enumerate(RUNGS)] for h in _heads(supports)]


def _quantised_fits(case: QuantisedDecodeCase, supports: Supports) -> bool:
    return (
        _accepts(supports, case, ("page_sizes", case.page_size), ("causal", case.causal))
        and case.format in supports.cache_formats
        and case.s <= (supports.max_s or case.s)
        and _has_keys(case.seqlens, case.s, supports)
    )


def _one_of_quantised(inputs: QuantisedDecodeInputs, row: Row) -> QuantisedDecodeInputs:
    return replace(inputs, exact=_one_of_decode(inputs.exact, row))


DECODE_QUANTIZED = Load(
    operation=QUANTIZED_OPERATION,
    ladders=_quantised_ladders,
    fits=_quantised_fits,
    axes=_rows_of,
    keys=lambda case: list(case.seqlens),
    work=lambda case: sum(case.seqlens) * case.s * case.num_heads,
    one=_one_of_quantised,
    places=_places_of_decode,
)


PREFILL_RUNGS = (
    # sequences, tokens of the longest, cached tokens before them
    (2, 30, 20),
    (3, 130, 60),
    (4, 256, 200),
    (4, 1024, 1000),
    (2, 4096, 4096),
)

PREFILL_ELEMENTS = 2**25
"""Of keys, at most: sequences have their own, which cannot be shared."""


def _prefill_ladders(supports: Supports, profile: Profile, seed: int) -> list[list[PrefillCase]]:
    dims = supports.prefill_dims
    d, v = (192, 128) if dims is None or (192, 128) in dims else max(dims, key=sum)

    def case(b: int, longest: int, cached: int, heads: int, rung: int) -> PrefillCase:
        queries = _lengths(seed + rung, b, longest, 1)
        return PrefillCase(
            dtype=profile.dtype,
            seed=seed + rung,
            seqlens_q=queries,
            seqlens_k=tuple(n + cached * (i % 2) for i, n in enumerate(queries)),
            num_heads=heads,
            qk_head_dim=d,
            v_head_dim=v,
            causal=max(supports.causal),
        )

    ladders = [
        [case(*rung, h, i) for i, rung in enumerate(PREFILL_RUNGS)] for h in (*_heads(supports), *_few(supports))
    ]
    return [[c for c in ladder if sum(c.seqlens_k) * c.num_heads * d <= PREFILL_ELEMENTS] for ladder in ladders]


def _few(supports: Supports) -> list[int]:
    """So few heads, as of a rank, that long prompts fit."""
    return [] if supports.num_heads else [4]


def _prefill_fits(case: PrefillCase, supports: Supports) -> bool:
    dims = case.qk_head_dim, case.v_head_dim
    return _accepts(supports, case, ("prefill_dims", dims), ("causal", case.causal)) and (
        supports.empty_row != "unsupported"
        or all(t >= max(s, 1) for s, t in zip(case.seqlens_q, case.seqlens_k, strict=True) if s)
    )


def _keys_of_tokens(case: PrefillCase) -> list[int]:
    """How many keys each token sees."""
    return [
        _seen(t, s, i, causal=case.causal)
        for s, t in zip(case.seqlens_q, case.seqlens_k, strict=True)
        for i in range(s)
    ]


def _one_of_prefill(inputs: PrefillInputs, row: Row) -> PrefillInputs:
    token, head = row
    sequence = int(np.searchsorted(inputs.cu_seqlens_q, token, side="right")) - 1
    first, last = inputs.cu_seqlens_q[sequence : sequence + 2]
    start, end = inputs.cu_seqlens_k[sequence : sequence + 2]
    seen = _seen(end - start, last - first, token - first, causal=inputs.causal)
    keys, only = slice(start, start + seen), slice(head, head + 1)
    return replace(
        inputs,
        q=inputs.q[token : token + 1, only],
        k=inputs.k[keys, only],
        v=inputs.v[keys, only],
        cu_seqlens_q=np.array([0, 1], dtype=np.int32),
        cu_seqlens_k=np.array([0, seen], dtype=np.int32),
        causal=False,
    )


def _places_of_prefill(row: Row) -> tuple[Any, ...]:
    """In out [tokens, h, v] and the LSE [h, tokens]."""
    token, head = (slice(n, n + 1) for n in row)
    return (token, head), (head, token)


PREFILL = Load(
    operation=PREFILL_OPERATION,
    ladders=_prefill_ladders,
    fits=_prefill_fits,
    axes=lambda case: {"token": sum(case.seqlens_q), "head": case.num_heads},
    keys=_keys_of_tokens,
    work=lambda case: case.num_heads * sum(s * t for s, t in zip(case.seqlens_q, case.seqlens_k, strict=True)),
    one=_one_of_prefill,
    places=_places_of_prefill,
)


SPARSE_RUNGS = ((2, 8, 64), (4, 16, 128), (17, 16, 128), (40, 32, 512), (64, 64, 1024), (128, 128, 2048))
"""(sequences, pages of 64 tokens, indices of a query)."""


def _sparse_ladders(supports: Supports, profile: Profile, seed: int) -> list[list[SparseDecodeCase]]:
    c, r = _latent_dims(supports)
    size, multiple = _page_size(supports), supports.topk_multiple

    def case(b: int, pages: int, topk: int, heads: int, rung: int) -> SparseDecodeCase:
        return SparseDecodeCase(
            dtype=profile.dtype,
            seed=seed + rung,
            batch=b,
            s=_queries(supports, heads),
            num_heads=heads,
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            topk=-(-topk // multiple) * multiple,
            pages=-(-64 * pages // size),
            page_size=size,
            invalid=0.1,
        )

    return [[case(*rung, h, i) for i, rung in enumerate(SPARSE_RUNGS)] for h in _heads(supports)]


def _sparse_fits(case: SparseDecodeCase, supports: Supports) -> bool:
    dims = case.kv_lora_rank, case.qk_rope_head_dim
    return (
        _accepts(supports, case, ("page_sizes", case.page_size), ("latent_dims", dims))
        and case.s <= (supports.max_s or case.s)
        and case.topk % supports.topk_multiple == 0
    )


def _one_of_sparse(inputs: SparseInputs, row: Row) -> SparseInputs:
    i, head, query = (slice(n, n + 1) for n in row)
    return replace(
        inputs,
        q=inputs.q[i, query, head],
        indices=inputs.indices[i, query],
        attn_sink=None if inputs.attn_sink is None else inputs.attn_sink[head],
        topk_length=None if inputs.topk_length is None else inputs.topk_length[i],
    )


SPARSE_DECODE = Load(
    operation=SPARSE_OPERATION,
    ladders=_sparse_ladders,
    fits=_sparse_fits,
    axes=lambda case: {"sequence": case.batch, "head": case.num_heads, "query": case.s},
    keys=lambda case: [case.topk] * case.batch,
    work=lambda case: case.batch * case.s * case.num_heads * case.topk,
    one=_one_of_sparse,
    places=_places_of_decode,
)

LOADS = (PREFILL, DECODE, DECODE_QUANTIZED, SPARSE_DECODE)
"""In the order of reports."""
