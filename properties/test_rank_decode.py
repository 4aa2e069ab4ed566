"""Laws of the operation ``rank_decode``: decode of the keys that one rank of context parallelism holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs, declared_lse, decode_expected
from mla_spec.operations.rank_decode import OPERATION as RANK
from mla_spec.operations.rank_decode import RankDecodeCase, RankDecodeInputs, no_empty_rows, rank_decode_expected
from mla_spec.properties.attention import judge_merged_results
from mla_spec.properties.fixed import decode, rank_decode
from mla_spec.properties.fixed.counts import nearest
from mla_spec.properties.pages import other_unused_entries, spare_page, unused_slots, with_other_last_keys
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.rank_decode import rank_decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.context_parallel import own_tokens, places
from mla_spec.subjects.supports import Supports

MERGEABLE = (1.0, 4.0, 0.1, 16.0)
"""Standard deviations of logits for which the LSE of a part is known well enough to merge by it."""


def _needs_lse(supports: Supports) -> str:
    return no_empty_rows(supports) or ("" if supports.lse else "rank_decode returns no LSE")


def _needs_several_queries(supports: Supports) -> str:
    if True not in supports.causal:
        return "rank_decode is never causal"
    several = supports.max_s is None or supports.max_s > 1
    return no_empty_rows(supports) or ("" if several else "rank_decode takes one query per sequence")


@law(needs=RANK, cases=rank_decode_cases, first=rank_decode.ordinary, missing=no_empty_rows)
def test_rank_decode_agrees_with_reference(run: Run, case: RankDecodeCase) -> None:
    """out = softmax(scale · q · rowsᵀ) · latents over the rank's keys, within the worst-case bound of the profile."""
    inputs = case.build()
    want = rank_decode_expected(inputs, run.profile)
    run.within(run.call(RANK, inputs)[0], want.out, want.out_error)


@law(needs=RANK, cases=rank_decode_cases, first=rank_decode.ordinary, missing=_needs_lse)
def test_rank_decode_lse_agrees_with_reference(run: Run, case: RankDecodeCase) -> None:
    """lse = log Σ exp(scale · q · rowsᵀ) over the rank's keys, natural, laid out [b, h, s], the declared value where there is none."""
    inputs = case.build()
    want = rank_decode_expected(inputs, run.profile)
    lse = run.call(RANK, inputs)[1]
    assert lse is not None
    run.within(lse, declared_lse(want.lse, run.supports), want.lse_error, gate=False)


def _of_rank(inputs: DecodeInputs, ranks: int, rank: int, interleave: int) -> RankDecodeInputs:
    """What one rank is given of a whole decode, in pages of its own."""
    page_size, b = inputs.kv_cache.shape[1], len(inputs.cache_seqlens)
    own = own_tokens(inputs.cache_seqlens, ranks=ranks, rank=rank, interleave=interleave)
    width = -(-max(1, int(own.max())) // page_size)
    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)  # [b, t, c+r]
    cache = np.zeros((b * width, *inputs.kv_cache.shape[1:]))
    for i, n in enumerate(own):
        held = places(np.arange(n), ranks=ranks, rank=rank, interleave=interleave)
        cache[i * width : (i + 1) * width].reshape(-1, rows.shape[-1])[:n] = rows[i, held]
    table = np.arange(b * width, dtype=np.int32).reshape(b, width)
    given = inputs.plain | {"kv_cache": cache, "block_table": table}
    return RankDecodeInputs(**given, ranks=ranks, rank=rank, interleave=interleave)


@law(needs=(RANK, DECODE), cases=narrowed(decode_cases, sizes=()), missing=no_empty_rows)
def test_rank_decode_of_one_rank_is_decode(run: Run, case: DecodeCase) -> None:
    """One rank that holds all keys, however they are dealt, gives what decode gives of them."""
    inputs = case.build()
    interleave = nearest(run.supports.interleaves, 1 + case.seed % 5)
    alone = RankDecodeInputs(**inputs.plain, ranks=1, rank=0, interleave=interleave)
    got, there, want = run.call(RANK, alone), run.call(DECODE, inputs), decode_expected(inputs, run.profile)
    why = "the only rank and decode differ"
    run.same_function(got.out, there.out, want.out_error, why)
    if got.lse is not None:
        run.same_function(got.lse, there.lse, want.lse_error, why)


@law(
    needs=("rank_decode", "merge"),
    cases=narrowed(decode_cases, logit_stds=MERGEABLE, sizes=()),
    missing=_needs_lse,
    cost=5,
    first=decode.ordinary,
)
def test_merge_of_rank_decodes_is_the_whole(run: Run, case: DecodeCase) -> None:
    """Tokens dealt to ranks in blocks, decoded rank by rank with the mask of the whole and merged, are decoded whole."""
    inputs = case.build()
    ranks = min(2 + case.seed % 3, run.supports.max_parts or 4)
    interleave = nearest(run.supports.interleaves, (4, 1, 16)[case.seed % 3])
    parts = [_of_rank(inputs, ranks, rank, interleave) for rank in range(ranks)]
    got = []
    for part in parts:
        out, lse = run.call(RANK, part)
        assert lse is not None
        got.append((out, lse))
    judge_merged_results(run, got, [rank_decode_expected(part, run.profile) for part in parts])


@law(
    needs=RANK,
    cases=narrowed(rank_decode_cases, min_s=2, causal=True),
    missing=_needs_several_queries,
    first=lambda supports, profile: [replace(c, causal=True) for c in rank_decode.ordinary(supports, profile)],
)
def test_rank_decode_ignores_future_keys(run: Run, case: RankDecodeCase) -> None:
    """Changing the last key that a rank holds changes no bit of queries that come before it in the whole sequence."""
    inputs = case.build()
    dealt = {"ranks": case.ranks, "rank": case.rank, "interleave": case.interleave}
    place = places(inputs.own - 1, **dealt)[:, None]  # [b, 1]
    before = inputs.cache_seqlens[:, None] - case.s + np.arange(case.s) < place  # [b, s]
    before &= inputs.own[:, None] > 0
    if not before.any():
        run.trivial("no query comes before the last key of this rank")
    own = replace(inputs, cache_seqlens=inputs.own.astype(np.int32))
    changed = replace(inputs, kv_cache=with_other_last_keys(own, 1).kv_cache)
    got, want = run.call(RANK, changed), run.call(RANK, inputs)
    why = "only the last key of the rank, which these queries do not see, was changed"
    run.same_bits(got.out[before], want.out[before], why)
    if got.lse is not None:
        heads_last = np.broadcast_to(before[:, None], got.lse.value.shape)
        run.same_bits(got.lse[heads_last], want.lse[heads_last], why)


@law(needs=RANK, cases=rank_decode_cases, cost=2, first=rank_decode.ordinary, missing=no_empty_rows)
def test_rank_decode_ignores_unused_cache_slots(run: Run, case: RankDecodeCase) -> None:
    """NaN, infinity or 2^100 in slots past the rank's tokens, fewer than the sequence has, changes no bit."""
    inputs = case.build()
    want = run.call(RANK, inputs)
    unused = unused_slots(replace(inputs, cache_seqlens=inputs.own.astype(np.int32)))
    for poison in (np.nan, 2.0**100 if case.dtype != "float16" else 2.0**15, np.inf):
        cache = inputs.kv_cache.copy()
        cache[unused] = poison
        run.same(run.call(RANK, replace(inputs, kv_cache=cache)), want, f"unused slots were filled with {poison:g}")


@law(needs=RANK, cases=rank_decode_cases, first=rank_decode.ordinary, missing=no_empty_rows)
def test_rank_decode_ignores_unused_table_entries(run: Run, case: RankDecodeCase) -> None:
    """Table entries past the rank's pages, fewer than the sequence has, may name a page of NaN, or no page at all."""
    inputs = case.build()
    want = run.call(RANK, inputs)
    own = replace(inputs, cache_seqlens=inputs.own.astype(np.int32))
    cache = inputs.kv_cache.copy()
    cache[spare_page(own)] = np.nan
    for entry, table in other_unused_entries(own):
        got = run.call(RANK, replace(inputs, kv_cache=cache, block_table=table))
        run.same(got, want, f"unused block table entries were set to {entry}")
