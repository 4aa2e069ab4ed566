"""Laws of attention over thousands of keys that need no bound: see ``mla_spec.properties.exact``.

Every sequence of a batch is judged, the long one stands at each place of it, and LSEs are judged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.operations.operation import Operation
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillCase, PrefillInputs
from mla_spec.operations.quantised_cache import HEAD_DIM_V
from mla_spec.operations.quantised_decode import OPERATION as DECODE_QUANTIZED
from mla_spec.operations.quantised_decode import (
    QuantisedDecodeCase,
    QuantisedDecodeInputs,
    latent_formats,
    no_latent_format,
)
from mla_spec.operations.ragged import OPERATION as RAGGED
from mla_spec.operations.ragged import RaggedDecodeCase, RaggedDecodeInputs
from mla_spec.operations.rank_decode import OPERATION as RANK
from mla_spec.operations.rank_decode import RankDecodeCase, RankDecodeInputs
from mla_spec.operations.sparse import SPARSE_DECODE, SPARSE_PREFILL, SparseDecodeCase, SparseInputs, SparsePrefillCase
from mla_spec.properties.exact import PERIOD, QUERY, Answer, Keys, Pattern, patterns, rounds, rows_of, value_table
from mla_spec.properties.fixed.counts import (
    BETWEEN,
    ELEMENTS,
    LONG,
    latent_dims,
    nearest,
    no_published_rows,
    placed,
    prefill_dims,
    thinned,
)
from mla_spec.reference.cache_layout import QuantisedRows, pack
from mla_spec.reference.context_parallel import places, seen_by_queries
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Results
from mla_spec.subjects.supports import Supports

MOST = 32 * ELEMENTS
"""Elements of the keys of a call, at most."""

PLACES = tuple((long, place) for i, long in enumerate(LONG) for place in (range(3) if long < 2**13 else (i % 3,)))
"""Lengths of the long sequence and its place among three."""

SHORT = (5, 70)


def _decode_cases(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """A long sequence and short ones, and many between; rows are narrow where the subject takes them, and else share pages."""
    c, r = latent_dims(supports)
    calls = [
        (placed(long, SHORT[:others], place % (others + 1)), 1 + seed % 2)
        for seed, (long, place) in enumerate(PLACES)
        for others in _room(long * (c + r))
    ]
    calls += [((2**16,), 1)] if 2**16 * (c + r) <= MOST else []
    calls += [(thinned(lengths, c + r), s) for lengths, s in ((BETWEEN[1::2], 1), (BETWEEN[::2], 4))]
    cases = [
        DecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens=seqlens,
            s=min(s, supports.max_s or s),
            num_heads=nearest(supports.num_heads, 2),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, (64, 1, 16, 256)[seed % 4]),
            causal=supports.causal[seed // 2 % len(supports.causal)],
        )
        for seed, (seqlens, s) in enumerate(calls)
    ]
    return cases + _whole(supports, profile)


def _takes_whole_rows(supports: Supports, profile: Profile) -> bool:
    """Whether rows of 512 + 64 are asked for. Many heads of them take too long in formats of more than 16 bits."""
    return format_of(profile.dtype).bits <= 16 and not no_published_rows(supports)


def _whole(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """DeepSeek-V3's shape, whole: pages of 64, and the heads of one rank and of eight."""
    return [
        DecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens=(long,),
            num_heads=nearest(supports.num_heads, heads),
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            page_size=nearest(supports.page_sizes, 64),
            causal=supports.causal[0],
        )
        for seed, (long, heads) in enumerate(((4161, 128), (8193, 16)), 1)
        if _takes_whole_rows(supports, profile)
    ]


def _room(elements: int) -> list[int]:
    """How many sequences may stand beside one of so many elements, as a list of one number; [] where it is too long."""
    return [min(2, MOST // elements - 1)] if elements <= MOST else []


def _seen(length: int, s: int, *, causal: bool) -> int:
    """Keys that all of s queries see."""
    return length - s + 1 if causal else length


def _paged(each: list[Pattern], page_size: int, *, share: bool) -> tuple[list[Keys], IntArray, IntArray]:
    """(keys of each sequence, rows of each page as ``Keys.code`` numbers them [pages, page_size], table of pages).

    Pages stand in random order. Those that are alike are one where ``share``, and values then come again in each page.
    """
    period = min(page_size, PERIOD) if share else PERIOD
    keys = [Keys(p, np.arange(len(p.leads)) % (page_size if share else PERIOD) % period) for p in each]
    width = max(-(-len(p.leads) // page_size) for p in each)
    codes = np.zeros((len(each), width * page_size), dtype=int)
    for row, own in zip(codes, keys, strict=True):
        row[: len(own.place)] = own.code
    pages = codes.reshape(-1, page_size)
    inverse = np.arange(len(pages))
    if share:
        pages, inverse = np.unique(pages, axis=0, return_inverse=True)
    order = np.random.default_rng(len(pages)).permutation(len(pages))
    moved = np.empty_like(pages)
    moved[order] = pages
    return keys, moved, order[inverse.reshape(len(each), width)].astype(np.int32)


def _judge(run: Run, got: Results, keys: list[Keys], table: Array) -> None:
    """Out [b, s, h, c] and LSE [b, h, s] of each sequence."""
    for i, own in enumerate(keys):
        answer = Answer.of(own.pattern, table, own.place, run.profile)
        answer.judge(run, got.out.value[i], None if got.lse is None else got.lse.value[i])


@law(needs=DECODE, cases=_decode_cases)
def test_decode_is_exact_at_length(run: Run, case: DecodeCase) -> None:
    """Keys of equal weight among thousands give exactly the mean of their values, and the logarithm of their number."""
    c, d = case.kv_lora_rank, case.kv_lora_rank + case.qk_rope_head_dim
    table = value_table(c, case.seed)
    table[..., -1] = 0.0
    rows = rows_of(table, d, c - 1)
    q = np.zeros((len(case.seqlens), case.s, case.num_heads, d))
    q[..., c - 1] = QUERY
    seen = tuple(_seen(n, case.s, causal=case.causal) for n in case.seqlens)
    for each in rounds(case.seqlens, seen, seed=case.seed):
        keys, pages, blocks = _paged(each, case.page_size, share=sum(case.seqlens) * d > ELEMENTS)
        inputs = DecodeInputs(
            q=q,
            kv_cache=rows[pages][:, :, None],
            block_table=blocks,
            cache_seqlens=np.array(case.seqlens, dtype=np.int32),
            head_dim_v=c,
            softmax_scale=1.0,
            causal=case.causal,
        )
        _judge(run, run.call(DECODE, inputs), keys, table)


def _quantised_cases(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """A long sequence and short ones in every format."""
    return [
        QuantisedDecodeCase(
            dtype=profile.dtype,
            seed=seed + long // 4096,
            format=name,
            page_size=nearest(supports.page_sizes, 16 if long > 4096 else (64, 32)[seed % 2]),
            seqlens=placed(long, SHORT[:1], seed % 2),
            s=1,
            num_heads=nearest(supports.num_heads, 1),
            causal=supports.causal[0],
        )
        for seed, name in enumerate(latent_formats(supports))
        for long in ((2081, 16449) if seed == 0 else (2081,))
    ]


@law(needs=DECODE_QUANTIZED, cases=_quantised_cases, missing=no_latent_format)
def test_decode_quantized_is_exact_at_length(run: Run, case: QuantisedDecodeCase) -> None:
    """The same over pages of codes that are small integers, with scales of 1."""
    layout, c = case.layout, HEAD_DIM_V[case.format]
    channel = min(layout.scaled_dim, c) - 1
    table = value_table(c, case.seed)
    table[..., layout.scaled_dim :] = 0.0
    table[..., channel] = 0.0
    rows = rows_of(table, layout.width, channel)
    scaled = rows[:, : layout.scaled_dim]
    q = np.zeros((len(case.seqlens), case.s, case.num_heads, layout.width))
    q[..., channel] = QUERY
    seen = tuple(_seen(n, case.s, causal=case.causal) for n in case.seqlens)
    for each in rounds(case.seqlens, seen, seed=case.seed):
        keys, pages, blocks = _paged(each, case.page_size, share=True)
        scales = np.ones((pages.size, max(layout.groups, 1) if layout.scale else 1))
        stored = QuantisedRows(scaled[pages.ravel()], scales, rows[pages.ravel(), layout.scaled_dim :])
        exact = DecodeInputs(
            q=q,
            kv_cache=rows[pages][:, :, None],
            block_table=blocks,
            cache_seqlens=np.array(case.seqlens, dtype=np.int32),
            head_dim_v=c,
            softmax_scale=1.0,
            causal=case.causal,
        )
        packed = pack(stored, layout, case.page_size)
        inputs = QuantisedDecodeInputs(pages=packed, exact=exact, **case.told(1.0))
        _judge(run, run.call(DECODE_QUANTIZED, inputs), keys, table)


def _prefill_cases(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Few queries to thousands of keys, at each place among sequences, and thousands of queries."""
    d, v = prefill_dims(supports)
    heads = nearest(supports.num_heads, 1)
    lengths: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((2, 3, 1), placed(n, SHORT, p)) for n in (4100, 8193, 65700) for p in (range(3) if n < 8193 else (n % 3,))
    ]
    lengths.append(((3, 2049), (5, 2049)))
    return [
        PrefillCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=queries,
            seqlens_k=keys,
            num_heads=heads,
            qk_head_dim=d,
            v_head_dim=v,
            causal=supports.causal[seed % len(supports.causal)] if max(queries) < 9 else supports.causal[0],
        )
        for seed, (queries, keys) in enumerate(lengths)
        if sum(keys) * heads * (d + v) <= MOST and sum(queries) * sum(keys) * heads <= MOST
    ]


FIRST_KEYS = 64
"""Of a long prompt, that have weight: queries before them are not judged."""


@law(needs=PREFILL, cases=_prefill_cases)
def test_prefill_is_exact_at_length(run: Run, case: PrefillCase) -> None:
    """The same of packed sequences, of which some have thousands of keys or queries."""
    d, table = case.qk_head_dim, value_table(case.v_head_dim, case.seed)
    offsets_q, offsets_k = (np.cumsum([0, *n]).astype(np.int32) for n in (case.seqlens_q, case.seqlens_k))
    q = np.zeros((offsets_q[-1], case.num_heads, d))
    q[..., d - 1] = QUERY
    lengths = list(zip(case.seqlens_q, case.seqlens_k, strict=True))
    seen = tuple(max(_seen(t, s, causal=case.causal), min(t, FIRST_KEYS)) for s, t in lengths)
    for each in rounds(case.seqlens_k, seen, seed=case.seed):
        keys = [Keys(p, np.arange(len(p.leads)) % PERIOD) for p in each]
        k = np.zeros((offsets_k[-1], case.num_heads, d))
        rows = rows_of(table, case.v_head_dim + 1, case.v_head_dim)[np.concatenate([own.code for own in keys])]
        k[..., d - 1] = rows[:, -1:]
        inputs = PrefillInputs(
            q=q,
            k=k,
            v=np.repeat(rows[:, None, :-1], case.num_heads, axis=1),
            cu_seqlens_q=offsets_q,
            cu_seqlens_k=offsets_k,
            softmax_scale=1.0,
            causal=case.causal,
        )
        got = run.call(PREFILL, inputs)
        for i, ((s, t), own) in enumerate(zip(lengths, keys, strict=True)):
            blind = max(0, seen[i] - (t - s + 1)) if case.causal else 0
            queries = slice(offsets_q[i] + blind, offsets_q[i + 1])
            lse = None if got.lse is None else got.lse.value[:, queries]
            Answer.of(own.pattern, table, own.place, run.profile).judge(run, got.out.value[queries], lse)


def _ragged_cases(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """A decoded token of a long sequence among prompts, prompts after long prefixes, and a prompt of thousands of tokens."""
    c, r = latent_dims(supports)
    calls = [(placed(1, (2, 20), (p + i) % 3), placed(n, SHORT, p)) for i, (n, p) in enumerate(PLACES)]
    calls.append(((1, 2049, 1), (70, 2049, 5)))
    return [
        RaggedDecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens_q=queries,
            seqlens_k=tuple(max(s, t) for s, t in zip(queries, keys, strict=True)),
            num_heads=nearest(supports.num_heads, 1 + seed % 2),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, (64, 1, 16, 256)[seed % 4]),
            causal=supports.causal[seed % len(supports.causal)] if max(queries) < FIRST_KEYS else supports.causal[0],
        )
        for seed, (queries, keys) in enumerate(calls)
        if sum(keys) * (c + r) <= MOST and sum(queries) * sum(keys) * nearest(supports.num_heads, 2) <= MOST
    ]


@law(needs=RAGGED, cases=_ragged_cases)
def test_ragged_decode_is_exact_at_length(run: Run, case: RaggedDecodeCase) -> None:
    """The same of packed queries, whatever number each sequence has of them."""
    c, d = case.kv_lora_rank, case.kv_lora_rank + case.qk_rope_head_dim
    table = value_table(c, case.seed)
    table[..., -1] = 0.0
    rows = rows_of(table, d, c - 1)
    offsets = np.cumsum([0, *case.seqlens_q]).astype(np.int32)
    q = np.zeros((offsets[-1], case.num_heads, d))
    q[..., c - 1] = QUERY
    lengths = list(zip(case.seqlens_q, case.seqlens_k, strict=True))
    seen = tuple(max(_seen(t, s, causal=case.causal), min(t, FIRST_KEYS)) for s, t in lengths)
    for each in rounds(case.seqlens_k, seen, seed=case.seed):
        keys, pages, blocks = _paged(each, case.page_size, share=sum(case.seqlens_k) * d > ELEMENTS)
        inputs = RaggedDecodeInputs(
            q=q,
            kv_cache=rows[pages][:, :, None],
            block_table=blocks,
            cache_seqlens=np.array(case.seqlens_k, dtype=np.int32),
            cu_seqlens_q=offsets,
            head_dim_v=c,
            softmax_scale=1.0,
            causal=case.causal,
        )
        got = run.call(RAGGED, inputs)
        for i, ((s, t), own) in enumerate(zip(lengths, keys, strict=True)):
            blind = max(0, seen[i] - (t - s + 1)) if case.causal else 0
            tokens = slice(offsets[i] + blind, offsets[i + 1])
            lse = None if got.lse is None else got.lse.value[:, tokens]
            Answer.of(own.pattern, table, own.place, run.profile).judge(run, got.out.value[tokens], lse)


DEALT = ((2, 1), (8, 64), (4, 16))
"""Ranks, and tokens of a block."""


def _rank_cases(supports: Supports, profile: Profile) -> list[RankDecodeCase]:
    """A rank that holds the long part of one sequence and short parts of others."""
    c, r = latent_dims(supports)
    cases = []
    for seed, (long, place) in enumerate(PLACES):
        ranks, interleave = DEALT[seed % len(DEALT)]
        dealt = {"ranks": ranks, "rank": seed % ranks, "interleave": nearest(supports.interleaves, interleave)}
        for others in _room(long * (c + r)):
            own = np.array(placed(long, SHORT[:others], place % (others + 1)))
            cases.append(
                RankDecodeCase(
                    dtype=profile.dtype,
                    seed=seed,
                    seqlens=tuple((places(own - 1, **dealt) + 1).tolist()),
                    s=min(1 + seed % 2, supports.max_s or 2),
                    num_heads=nearest(supports.num_heads, 2),
                    kv_lora_rank=c,
                    qk_rope_head_dim=r,
                    page_size=nearest(supports.page_sizes, (64, 1, 16, 256)[seed % 4]),
                    causal=supports.causal[seed % len(supports.causal)],
                    **dealt,
                )
            )
    return cases


@law(needs=RANK, cases=_rank_cases)
def test_rank_decode_is_exact_at_length(run: Run, case: RankDecodeCase) -> None:
    """The same of the keys that one rank of context parallelism holds."""
    c, d = case.kv_lora_rank, case.kv_lora_rank + case.qk_rope_head_dim
    table = value_table(c, case.seed)
    table[..., -1] = 0.0
    rows = rows_of(table, d, c - 1)
    q = np.zeros((len(case.seqlens), case.s, case.num_heads, d))
    q[..., c - 1] = QUERY
    lengths = np.array(case.seqlens, dtype=np.int32)
    dealt = {"ranks": case.ranks, "rank": case.rank, "interleave": case.interleave}
    seen = tuple(seen_by_queries(lengths, case.s, causal=case.causal, **dealt).min(axis=1).tolist())
    for each in rounds(case.own, seen, seed=case.seed):
        keys, pages, blocks = _paged(each, case.page_size, share=sum(case.own) * d > ELEMENTS)
        inputs = RankDecodeInputs(
            q=q,
            kv_cache=rows[pages][:, :, None],
            block_table=blocks,
            cache_seqlens=lengths,
            head_dim_v=c,
            softmax_scale=1.0,
            causal=case.causal,
            **dealt,
        )
        _judge(run, run.call(RANK, inputs), keys, table)


TOPK = (320, 1030, 2048)
"""Indices of a row: published models have 512 to 2048."""


def _topk(supports: Supports) -> list[int]:
    return sorted({-(-k // supports.topk_multiple) * supports.topk_multiple for k in TOPK})


def _sparse_prefill_cases(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """Rows of hundreds and thousands of indices, and more keys."""
    return [
        SparsePrefillCase(s_q=2, s_kv=2 * fields["topk"] + 65, **fields) for fields in _selections(supports, profile)
    ]


def _selections(supports: Supports, profile: Profile) -> list[dict[str, Any]]:
    """Fields of cases in narrow rows, and of one with the 128 heads and 2048 indices of DeepSeek-V3.2."""
    shapes = [(topk, 2, *latent_dims(supports)) for topk in _topk(supports)]
    if _takes_whole_rows(supports, profile):
        shapes.append((max(_topk(supports)), 128, 512, 64))
    return [
        {
            "dtype": profile.dtype,
            "seed": seed,
            "num_heads": nearest(supports.num_heads, heads),
            "kv_lora_rank": c,
            "qk_rope_head_dim": r,
            "topk": topk,
        }
        for seed, (topk, heads, c, r) in enumerate(shapes)
    ]


def _sparse_decode_cases(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """The same of slots."""
    size = nearest(supports.page_sizes, 64)
    return [
        SparseDecodeCase(batch=2, s=1, pages=-(-(2 * fields["topk"] + 65) // size), page_size=size, **fields)
        for fields in _selections(supports, profile)
    ]


def _exact_selection(run: Run, operation: Operation, case: SparsePrefillCase | SparseDecodeCase) -> None:
    """Each pattern over the entries of a row; keys that are not selected lead, should any be read."""
    c, d = case.kv_lora_rank, case.kv_lora_rank + case.qk_rope_head_dim
    inputs = case.build()
    slots, table = len(inputs.rows), value_table(c, case.seed)
    table[..., -1] = 0.0
    rows = rows_of(table, d, c - 1)
    q = np.zeros_like(inputs.q)
    q[..., c - 1] = QUERY
    for pattern in patterns(case.topk, case.topk, all_places=True):
        keys = Keys(pattern, np.arange(case.topk) % PERIOD)
        chosen = np.random.default_rng([case.seed, 32]).permutation(slots)[: case.topk]
        code = np.full(slots, PERIOD)  # leading
        code[chosen] = keys.code
        kv = rows[code].reshape(inputs.kv.shape)
        indices = np.broadcast_to(chosen, inputs.indices.shape).astype(np.int32)
        called = SparseInputs(
            q=q, kv=kv, indices=indices, head_dim_v=c, softmax_scale=1.0, attn_sink=None, topk_length=None
        )
        got = run.call(operation, called)
        lse = None if got.lse is None else got.lse.value
        Answer.of(pattern, table, keys.place, run.profile).judge(run, got.out.value, lse)


@law(needs=SPARSE_PREFILL, cases=_sparse_prefill_cases)
def test_sparse_prefill_is_exact_at_length(run: Run, case: SparsePrefillCase) -> None:
    """The same of the keys that up to 2048 indices select, wherever in their row those with weight stand."""
    _exact_selection(run, SPARSE_PREFILL, case)


@law(needs=SPARSE_DECODE, cases=_sparse_decode_cases)
def test_sparse_decode_is_exact_at_length(run: Run, case: SparseDecodeCase) -> None:
    """The same of slots of a pool."""
    _exact_selection(run, SPARSE_DECODE, case)
