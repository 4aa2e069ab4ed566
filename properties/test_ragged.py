"""Laws of the operation ``ragged_decode``: attention of packed queries over a paged latent cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, declared_lse, decode_expected
from mla_spec.operations.ragged import OPERATION as RAGGED
from mla_spec.operations.ragged import RaggedDecodeCase, RaggedDecodeInputs, ragged_decode_expected
from mla_spec.properties.attention import needs_several_sequences
from mla_spec.properties.fixed import ragged_decode
from mla_spec.properties.pages import other_unused_entries, relabelled, spare_page, unused_slots, with_other_last_keys
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.ragged import RAGGED_SIZES, ragged_decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports

Outputs = tuple[Result, Result | None]


def _needs_lse(supports: Supports) -> str:
    return "" if supports.lse else "ragged_decode returns no LSE"


def _needs_causal(supports: Supports) -> str:
    return "" if True in supports.causal else "ragged_decode is never causal"


def _causal(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    return [replace(case, causal=True) for case in ragged_decode.ordinary(supports, profile)]


def _packed(inputs: RaggedDecodeInputs, sequences: IntArray, spans: IntArray | None = None) -> RaggedDecodeInputs:
    """Some of the sequences, in this order; of their queries those of ``spans`` [b, 2], all where None."""
    cu = inputs.cu_seqlens_q
    each = np.stack([cu[:-1], cu[1:]], axis=1)[sequences] if spans is None else spans
    return replace(
        inputs,
        q=inputs.q[_tokens(each)],
        block_table=inputs.block_table[sequences],
        cache_seqlens=inputs.cache_seqlens[sequences],
        cu_seqlens_q=np.cumsum([0, *np.diff(each, axis=1)[:, 0]]).astype(np.int32),
    )


def _tokens(spans: IntArray) -> IntArray:
    """The tokens of spans [b, 2], one after the other."""
    tokens: IntArray = np.concatenate([np.arange(*span) for span in spans]).astype(int)
    return tokens


def _rows(results: Outputs, tokens: slice | IntArray) -> Outputs:
    """Out and LSE of some tokens."""
    out, lse = results
    return out[tokens], None if lse is None else lse[:, tokens]


def _require_same(run: Run, got: Any, want: Outputs, bounds: tuple[ErrorBound, ErrorBound], why: str) -> None:
    """Two results for the same queries: the same bits where the profile claims it."""
    for a, b, bound in zip(got, want, bounds, strict=True):
        if a is None or b is None:
            continue
        if run.profile.batch_invariant:
            run.same_bits(a, b, why)
        else:
            run.same_function(a, b, bound, why)


@law(
    needs=RAGGED,
    cases=narrowed(ragged_decode_cases, sizes=RAGGED_SIZES, shared=True),
    first=ragged_decode.rare,
)
def test_ragged_decode_agrees_with_reference(run: Run, case: RaggedDecodeCase) -> None:
    """out = softmax(scale · q · rowsᵀ) · latents of each sequence, within the worst-case bound of the profile."""
    inputs = case.build()
    want = ragged_decode_expected(inputs, run.profile)
    run.within(run.call(RAGGED, inputs)[0], want.out, want.out_error)


@law(needs=RAGGED, cases=ragged_decode_cases, first=ragged_decode.rare, missing=_needs_lse)
def test_ragged_decode_lse_agrees_with_reference(run: Run, case: RaggedDecodeCase) -> None:
    """lse = log Σ exp(scale · q · rowsᵀ), natural, laid out [h, tokens], the declared value where there is no key."""
    inputs = case.build()
    want = ragged_decode_expected(inputs, run.profile)
    lse = run.call(RAGGED, inputs)[1]
    assert lse is not None
    run.within(lse, declared_lse(want.lse, run.supports), want.lse_error, gate=False)


@law(needs=(RAGGED, DECODE), cases=narrowed(decode_cases, sizes=("batch", "queries")))
def test_ragged_decode_equals_decode(run: Run, case: DecodeCase) -> None:
    """Sequences that all have as many queries, one or a few, give what decode gives of them."""
    inputs = case.build()
    b, s = inputs.q.shape[:2]
    packed = RaggedDecodeInputs(
        **inputs.plain | {"q": inputs.q.reshape(b * s, *inputs.q.shape[2:])},
        cu_seqlens_q=np.arange(b + 1, dtype=np.int32) * s,
    )
    (out, lse), (decoded, decoded_lse) = run.call(RAGGED, packed), run.call(DECODE, inputs)
    want, why = decode_expected(inputs, run.profile), "ragged_decode and decode of the same queries differ"

    def by_token(x: Array) -> Array:
        return x.reshape(out.value.shape)  # [b, s, h, c] -> [b · s, h, c]

    def by_head(x: Array) -> Array:
        return np.moveaxis(x, 1, 0).reshape(case.num_heads, -1)  # [b, h, s] -> [h, b · s]

    run.same_function(out, decoded.arranged(by_token), want.out_error.map(by_token), why)
    if lse is not None and decoded_lse is not None:
        run.same_function(lse, decoded_lse.arranged(by_head), want.lse_error.map(by_head), why)


@law(needs=RAGGED, cases=narrowed(ragged_decode_cases, min_batch=2), missing=needs_several_sequences, cost=2)
def test_ragged_decode_sequences_are_independent(run: Run, case: RaggedDecodeCase) -> None:
    """A sequence gives the same packed with others as in a call of its own: the same bits where the profile claims it."""
    inputs = case.build()
    together, want = run.call(RAGGED, inputs), ragged_decode_expected(inputs, run.profile)
    some = np.flatnonzero(inputs.queries)
    for i in some if len(some) <= ALONE else some[:: len(some) // ALONE]:
        tokens = slice(*inputs.cu_seqlens_q[i : i + 2])
        alone = run.call(RAGGED, _packed(inputs, np.array([i])))
        why = f"sequence {i} of {len(case.seqlens_q)} alone differs from itself packed with the others"
        _require_same(run, alone, _rows(together, tokens), (want.out_error[tokens], want.lse_error[:, tokens]), why)


ALONE = 8
"""Sequences that have a call of their own, about."""


@law(
    needs=RAGGED,
    cases=narrowed(ragged_decode_cases, min_batch=2),
    first=ragged_decode.ordinary,
    missing=needs_several_sequences,
)
def test_ragged_decode_follows_the_order_of_sequences(run: Run, case: RaggedDecodeCase) -> None:
    """Sequences that come in another order, prompts before decoded tokens or behind them, give the same rows there."""
    inputs = case.build()
    order = np.random.default_rng([case.seed, 5]).permutation(len(case.seqlens_q))
    if (order == np.arange(len(order))).all():
        order = order[::-1]
    cu = inputs.cu_seqlens_q
    tokens = _tokens(np.stack([cu[:-1], cu[1:]], axis=1)[order])
    got, there = run.call(RAGGED, _packed(inputs, order)), run.call(RAGGED, inputs)
    want = ragged_decode_expected(inputs, run.profile)
    bounds = (want.out_error[tokens], want.lse_error[:, tokens])
    _require_same(run, got, _rows(there, tokens), bounds, "the sequences came in another order")


@law(needs=RAGGED, cases=ragged_decode_cases, first=ragged_decode.ordinary)
def test_ragged_decode_sequences_without_queries_change_nothing(run: Run, case: RaggedDecodeCase) -> None:
    """Sequences of which no token is computed, with keys or without, may stand anywhere in the batch."""
    inputs = case.build()
    want = ragged_decode_expected(inputs, run.profile)
    rng = np.random.default_rng([case.seed, 6])
    b = len(case.seqlens_q)
    at = np.sort(rng.integers(0, b + 1, 3))
    idle = _packed(inputs, rng.integers(0, b, 3), np.zeros((3, 2), dtype=int))
    more = replace(
        inputs,
        block_table=np.insert(inputs.block_table, at, idle.block_table, axis=0),
        cache_seqlens=np.insert(inputs.cache_seqlens, at, idle.cache_seqlens * (rng.random(3) < 0.7)),
        cu_seqlens_q=np.cumsum([0, *np.insert(inputs.queries, at, 0)]).astype(np.int32),
    )
    why = "sequences without queries were added to the batch"
    _require_same(run, run.call(RAGGED, more), tuple(run.call(RAGGED, inputs)), (want.out_error, want.lse_error), why)


@law(
    needs=RAGGED,
    cases=narrowed(ragged_decode_cases, min_queries=1, min_past=0, causal=True),
    missing=_needs_causal,
    cost=2,
    first=_causal,
)
def test_ragged_decode_in_chunks_of_queries(run: Run, case: RaggedDecodeCase) -> None:
    """Prompts that come in two chunks, the second after the first one's keys as after a cached prefix, give the same rows."""
    inputs = case.build()
    whole, want = run.call(RAGGED, inputs), ragged_decode_expected(inputs, run.profile)
    begin, end = inputs.cu_seqlens_q[:-1], inputs.cu_seqlens_q[1:]
    cut = np.random.default_rng([case.seed, 7]).integers(
        begin, end
    )  # [b], at least one query comes in the second chunk
    every = np.arange(len(begin))
    for name, first, last in (("first", begin, cut), ("second", cut, end)):
        spans = np.stack([first, last], axis=1)
        tokens = _tokens(spans)
        if len(tokens):
            chunk = _packed(inputs, every, spans)
            chunk = replace(chunk, cache_seqlens=(chunk.cache_seqlens - (end - last)).astype(np.int32))
            bounds = (want.out_error[tokens], want.lse_error[:, tokens])
            why = f"the {name} chunk of queries differs from its rows of the whole"
            _require_same(run, run.call(RAGGED, chunk), _rows(whole, tokens), bounds, why)


@law(needs=RAGGED, cases=ragged_decode_cases, first=ragged_decode.ordinary)
def test_ragged_decode_ignores_other_queries(run: Run, case: RaggedDecodeCase) -> None:
    """Another query of a token, of the same sequence or a neighbor, changes no bit of the other tokens' rows."""
    inputs = case.build()
    tokens = len(inputs.q)
    if tokens == 1:
        run.trivial("there is one query")
    other = np.random.default_rng([case.seed, 8]).permutation(tokens) < tokens // 2
    changed = np.where(other[:, None, None], -2 * inputs.q, inputs.q)
    got, want = run.call(RAGGED, replace(inputs, q=changed)), run.call(RAGGED, inputs)
    for a, b in zip(_rows(tuple(got), np.flatnonzero(~other)), _rows(tuple(want), np.flatnonzero(~other)), strict=True):
        if a is not None and b is not None:
            run.same_bits(a, b, "only queries of other tokens were changed")


@law(
    needs=RAGGED,
    cases=narrowed(ragged_decode_cases, min_queries=2, causal=True),
    missing=_needs_causal,
    first=_causal,
)
def test_ragged_decode_ignores_future_keys(run: Run, case: RaggedDecodeCase) -> None:
    """Changing the last key of a sequence changes no bit but of its last query (causal, bottom-right)."""
    inputs = case.build()
    past = np.setdiff1d(np.arange(len(inputs.q)), inputs.cu_seqlens_q[1:] - 1)
    if not len(past) or not inputs.cache_seqlens.any():
        run.trivial("no query comes before a last key")
    changed, want = run.call(RAGGED, with_other_last_keys(inputs, 1)), run.call(RAGGED, inputs)
    for a, b in zip(_rows(tuple(changed), past), _rows(tuple(want), past), strict=True):
        if a is not None and b is not None:
            run.same_bits(a, b, "only the last key of each sequence, which these queries do not see, was changed")


@law(needs=RAGGED, cases=ragged_decode_cases, first=ragged_decode.ordinary)
def test_ragged_decode_page_relabelling_changes_nothing(run: Run, case: RaggedDecodeCase) -> None:
    """Moving pages in the pool and renaming them in the table changes no bit."""
    inputs = case.build()
    moved, any_moved = relabelled(inputs, case.seed)
    if not any_moved:
        run.trivial("every page of a sequence stays where it is")
    got, want = run.call(RAGGED, moved), run.call(RAGGED, inputs)
    run.same(got, want, "pages were stored in another order and the block table renamed accordingly")


@law(needs=RAGGED, cases=ragged_decode_cases, cost=2, first=ragged_decode.ordinary)
def test_ragged_decode_ignores_unused_cache_slots(run: Run, case: RaggedDecodeCase) -> None:
    """NaN, infinity or 2^100 in slots past a sequence's length, and in free pages, changes no bit."""
    inputs = case.build()
    want, unused = run.call(RAGGED, inputs), unused_slots(inputs)
    for poison in (np.nan, 2.0**100 if case.dtype != "float16" else 2.0**15, np.inf):
        cache = inputs.kv_cache.copy()
        cache[unused] = poison
        got = run.call(RAGGED, replace(inputs, kv_cache=cache))
        run.same(got, want, f"unused cache slots were filled with {poison:g}")


@law(needs=RAGGED, cases=ragged_decode_cases, first=ragged_decode.ordinary)
def test_ragged_decode_ignores_unused_table_entries(run: Run, case: RaggedDecodeCase) -> None:
    """Table entries past a sequence's pages may name a page of NaN, or no page at all."""
    inputs = case.build()
    want = run.call(RAGGED, inputs)
    cache = inputs.kv_cache.copy()
    cache[spare_page(inputs)] = np.nan
    for entry, table in other_unused_entries(inputs):
        got = run.call(RAGGED, replace(inputs, kv_cache=cache, block_table=table))
        run.same(got, want, f"unused block table entries were set to {entry}")
