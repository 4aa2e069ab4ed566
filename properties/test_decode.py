"""Laws of the operation ``decode``: attention over a paged latent cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis.strategies import SearchStrategy

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs, declared_lse, decode_expected
from mla_spec.properties.attention import judge_attention, needs_several_sequences
from mla_spec.properties.fixed import decode
from mla_spec.properties.fixed.counts import no_published_rows
from mla_spec.properties.pages import other_unused_entries, relabelled, spare_page, unused_slots, with_other_last_keys
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.subjects.driver import computed
from mla_spec.subjects.supports import Supports


def _needs_lse(supports: Supports) -> str:
    return "" if supports.lse else "decode returns no LSE"


def _needs_several_queries(supports: Supports) -> str:
    if True not in supports.causal:
        return "decode is never causal"
    return "" if supports.max_s is None or supports.max_s > 1 else "decode takes one query per sequence"


@law(needs=DECODE, cases=narrowed(decode_cases, shared=True), first=decode.rare)
def test_decode_agrees_with_reference(run: Run, case: DecodeCase) -> None:
    """out = softmax(scale · q · rowsᵀ) · latents, within the worst-case bound of the profile."""
    inputs = case.build()
    want = decode_expected(inputs, run.profile)
    run.within(run.call(DECODE, inputs)[0], want.out, want.out_error)


@law(needs=DECODE, cases=narrowed(decode_cases, shared=True), first=decode.rare, missing=_needs_lse)
def test_decode_lse_agrees_with_reference(run: Run, case: DecodeCase) -> None:
    """lse = log Σ exp(scale · q · rowsᵀ), natural, laid out [b, h, s], the declared value where there is no key."""
    inputs = case.build()
    want = decode_expected(inputs, run.profile)
    lse = run.call(DECODE, inputs)[1]
    assert lse is not None
    run.within(lse, declared_lse(want.lse, run.supports), want.lse_error, gate=False)


def _many_keys(supports: Supports, profile: Profile) -> SearchStrategy[DecodeCase]:
    """Two sequences of 512 keys and more, the scores spread over many of them."""
    cases: SearchStrategy[DecodeCase] = decode_cases(supports, profile, logit_stds=(1.0, 0.1, 0.5), sizes=())
    return cases.map(lambda case: replace(case, seqlens=tuple(512 + 8 * n for n in case.seqlens[:2])))


@law(needs=DECODE, cases=_many_keys)
def test_decode_roundings_do_not_add_up(run: Run, case: DecodeCase) -> None:
    """Over many keys the roundings of P cancel, as independent ones do but with probability 1e-9."""
    inputs = case.build()
    want = decode_expected(inputs, run.profile, probable=True)
    out, lse = run.call(DECODE, inputs)
    run.within(out, want.out, want.out_error_probable)
    if lse is not None:
        run.within(lse, declared_lse(want.lse, run.supports), want.lse_error_probable, gate=False)


@law(needs=DECODE, cases=narrowed(decode_cases, min_length=2, max_s=1), missing=_needs_lse, cost=2)
def test_decode_lse_recombines_disjoint_parts(run: Run, case: DecodeCase) -> None:
    """Two disjoint parts of the keys, merged by the LSEs that the subject gave them, are the whole."""
    case = replace(case, s=1, seqlens=tuple(n - n % 2 for n in case.seqlens), page_size=case.page_size)
    inputs = case.build()
    whole = decode_expected(inputs, run.profile)
    parts = []
    for first in (True, False):
        part = _half(inputs, first)
        out, lse = run.call(DECODE, part)
        assert lse is not None
        parts.append((out.value, lse.value, decode_expected(part, run.profile)))
    lses = np.stack([np.moveaxis(lse, 1, 2)[..., None] for _, lse, _ in parts])  # [2, b, s, h, 1]
    with np.errstate(invalid="ignore"):  # a subject may return anything
        weights = np.exp(lses - lses.max(axis=0))
        weights = weights / weights.sum(axis=0)
    got = sum(w * out for w, (out, _, _) in zip(weights, parts, strict=True))
    # Weights of the merge are off by at most expm1 of the LSEs' errors, and shift what the parts' outs differ by.
    lse_error = sum(np.moveaxis(p.lse_error.total, 1, 2)[..., None] for _, _, p in parts)
    outs = [p.out for _, _, p in parts]
    out_error = np.maximum(*(p.out_error.total for _, _, p in parts))
    bound = ErrorBound(
        {
            "error of the parts' outputs": out_error,
            "error of the parts' LSEs": np.minimum(np.expm1(lse_error), 1.0)
            * (np.abs(outs[0] - outs[1]) + 2 * out_error),
            "float64 merge of the law": 16 * 2.0**-53 * (np.abs(outs[0]) + np.abs(outs[1])),
        }
    )
    run.within(computed(np.asarray(got), "merged out"), whole.out, bound, gate=False)


def _half(inputs: DecodeInputs, first: bool) -> DecodeInputs:
    """The first or the second half of every sequence's tokens, in pages of one token."""
    page_size = inputs.kv_cache.shape[1]
    half = inputs.cache_seqlens // 2
    width = max(1, int(half.max(initial=0)))
    token = np.arange(width) + (0 if first else half[:, None])  # [b, width]
    token = np.minimum(token, np.maximum(inputs.cache_seqlens[:, None] - 1, 0)) + np.zeros((len(half), 1), dtype=int)
    b, pages = len(half), -(-width // page_size)
    cache = np.zeros((b * pages, page_size, *inputs.kv_cache.shape[2:]))
    slots = np.take_along_axis(inputs.block_table, token // page_size, axis=1), token % page_size
    index = np.arange(width)
    table = np.arange(b * pages, dtype=np.int32).reshape(b, pages)
    cache[table[:, index // page_size], index % page_size] = inputs.kv_cache[slots]
    return replace(inputs, kv_cache=cache, block_table=table, cache_seqlens=half.astype(np.int32))


@law(needs=DECODE, cases=decode_cases, first=decode.ordinary)
def test_decode_page_relabelling_changes_nothing(run: Run, case: DecodeCase) -> None:
    """Moving pages in the pool and renaming them in the table changes no bit."""
    inputs = case.build()
    moved, any_moved = relabelled(inputs, case.seed)
    if not any_moved:
        run.trivial("every page of a sequence stays where it is")
    got, want = run.call(DECODE, moved), run.call(DECODE, inputs)
    run.same(got, want, "pages were stored in another order and the block table renamed accordingly")


@law(needs=DECODE, cases=narrowed(decode_cases, min_batch=2), missing=needs_several_sequences, cost=2)
def test_decode_sequences_are_independent(run: Run, case: DecodeCase) -> None:
    """A sequence gives the same in a ragged batch as alone: the same bits where the profile claims it."""
    inputs = case.build()
    together, want = run.call(DECODE, inputs), decode_expected(inputs, run.profile)
    for i in range(len(case.seqlens)):
        one = slice(i, i + 1)
        alone = replace(
            inputs,
            q=inputs.q[one],
            block_table=inputs.block_table[one],
            cache_seqlens=inputs.cache_seqlens[one],
        )
        got, there = run.call(DECODE, alone), together.leading(one)
        why = f"sequence {i} of {len(case.seqlens)} alone differs from itself in the batch"
        if run.profile.batch_invariant:
            run.same(got, there, why)
            continue
        run.same_function(got.out, there.out, want.out_error[one], why)
        if got.lse is not None:
            run.same_function(got.lse, there.lse, want.lse_error[one], why)


@law(needs=DECODE, cases=decode.published, missing=no_published_rows)
def test_decode_of_published_shapes(run: Run, case: DecodeCase) -> None:
    """Of many heads over thousands of rows of 512 + 64 elements, a few are within the bound of the profile."""
    inputs, h = case.build(), case.num_heads
    heads = np.unique([0, h // 2, h - 1, *np.random.default_rng([case.seed, 17]).integers(0, h, 5)])
    got, want = run.call(DECODE, inputs), decode_expected(replace(inputs, q=inputs.q[:, :, heads]), run.profile)
    run.within(got.out[:, :, heads], want.out, want.out_error)
    if got.lse is not None:
        run.within(got.lse[:, heads], want.lse, want.lse_error, gate=False)


@law(needs=DECODE, cases=decode_cases, cost=2)
def test_decode_ignores_unused_cache_slots(run: Run, case: DecodeCase) -> None:
    """NaN, infinity or 2^100 in slots past a sequence's length, and in free pages, changes no bit."""
    inputs = case.build()
    want = run.call(DECODE, inputs)
    unused = unused_slots(inputs)
    for poison in (np.nan, 2.0**100 if case.dtype != "float16" else 2.0**15, np.inf):
        cache = inputs.kv_cache.copy()
        cache[unused] = poison
        got = run.call(DECODE, replace(inputs, kv_cache=cache))
        run.same(got, want, f"unused cache slots were filled with {poison:g}")


@law(needs=DECODE, cases=decode_cases)
def test_decode_ignores_unused_table_entries(run: Run, case: DecodeCase) -> None:
    """Table entries past a sequence's pages may name a page of NaN, or no page at all."""
    inputs = case.build()
    want = run.call(DECODE, inputs)
    cache = inputs.kv_cache.copy()
    cache[spare_page(inputs)] = np.nan
    for entry, table in other_unused_entries(inputs):
        got = run.call(DECODE, replace(inputs, kv_cache=cache, block_table=table))
        run.same(got, want, f"unused block table entries were set to {entry}")


@law(needs=DECODE, cases=narrowed(decode_cases, min_s=2, causal=True), missing=_needs_several_queries)
def test_decode_ignores_future_keys(run: Run, case: DecodeCase) -> None:
    """Changing keys that a query does not see changes no bit of its row (causal, bottom-right)."""
    inputs = case.build()
    original = run.call(DECODE, inputs)
    for count in {1, case.s - 1}:
        changed = run.call(DECODE, with_other_last_keys(inputs, count))
        for got, want in zip(changed, original, strict=True):
            if got is not None and want is not None:
                past = np.s_[:, :-count] if got.what == "out" else np.s_[..., :-count]
                why = f"only the last {count} keys, which these queries do not see, were changed"
                run.same_bits(got[past], want[past], why)


@law(needs=DECODE, cases=decode_cases, first=decode.ordinary)
def test_decode_last_key_matters(run: Run, case: DecodeCase) -> None:
    """The newest key carries its weight: when it holds all of it, the output is its value."""
    inputs = case.build()
    rows = np.flatnonzero(inputs.cache_seqlens > 0)
    if rows.size == 0:
        run.trivial("no sequence has a key")
    page_size = inputs.kv_cache.shape[1]
    cache = inputs.kv_cache.copy()
    for i in rows:
        last = inputs.cache_seqlens[i] - 1
        cache[inputs.block_table[i, last // page_size], last % page_size, 0] = 2 * np.sign(inputs.q[i, -1].sum(axis=0))
    dominant = replace(inputs, kv_cache=cache)
    want = decode_expected(dominant, run.profile)
    judge_attention(run, run.call(DECODE, dominant), want)
