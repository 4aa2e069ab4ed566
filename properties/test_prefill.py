"""Laws of the operation ``prefill``: attention of packed sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, declared_lse, decode_expected
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillCase, PrefillInputs, prefill_expected
from mla_spec.properties.attention import judge_attention, judge_merged_results, needs_several_sequences
from mla_spec.properties.fixed import prefill
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.prefill import prefill_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports

MERGEABLE = (1.0, 4.0, 0.1, 16.0)
"""Standard deviations of logits for which the LSE of a part is known well enough to merge by it."""


def _needs_lse(supports: Supports) -> str:
    return "" if supports.lse else "prefill returns no LSE"


def _needs_causal(supports: Supports) -> str:
    return "" if True in supports.causal else "prefill is never causal"


def _needs_both_masks(supports: Supports) -> str:
    both = {True, False} <= set(supports.causal)
    return _needs_lse(supports) or ("" if both else "prefill does not accept both values of causal")


def _needs_equal_dims(supports: Supports) -> str:
    dims = supports.prefill_dims
    return "" if dims is None or any((d, d) in dims for d, _ in dims) else "prefill takes no V as wide as QK"


def _needs_any_dims(supports: Supports) -> str:
    free = supports.prefill_dims is None and supports.latent_dims is None
    return "" if free else "prefill and decode take different dims"


def _sequences(inputs: PrefillInputs) -> list[tuple[slice, slice]]:
    """The tokens of each sequence's queries and keys."""
    q, k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


def _packed(inputs: PrefillInputs, queries: IntArray, keys: IntArray, **changes: Any) -> PrefillInputs:
    """Tokens queries[i, 0] .. queries[i, 1] - 1 and keys likewise of each sequence, packed anew."""
    taken_q, taken_k = (
        np.concatenate([np.arange(*span) for span in spans] + [np.zeros(0, dtype=int)]).astype(int)
        for spans in (queries, keys)
    )
    offsets = [np.cumsum([0, *np.diff(spans, axis=1)[:, 0]]).astype(np.int32) for spans in (queries, keys)]
    return replace(
        inputs,
        q=inputs.q[taken_q],
        k=inputs.k[taken_k],
        v=inputs.v[taken_k],
        cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1],
        **changes,
    )


def _spans(cu_seqlens: IntArray) -> IntArray:
    """First token and end of each sequence, [b, 2]."""
    return np.stack([cu_seqlens[:-1], cu_seqlens[1:]], axis=1)


@law(needs=PREFILL, cases=prefill_cases)
def test_prefill_agrees_with_reference(run: Run, case: PrefillCase) -> None:
    """out = softmax(scale · q · kᵀ) · v of each sequence, within the worst-case bound of the profile."""
    inputs = case.build()
    want = prefill_expected(inputs, run.profile)
    run.within(run.call(PREFILL, inputs)[0], want.out, want.out_error)


@law(needs=PREFILL, cases=prefill_cases, missing=_needs_lse)
def test_prefill_lse_agrees_with_reference(run: Run, case: PrefillCase) -> None:
    """lse = log Σ exp(scale · q · kᵀ), natural, laid out [h, tokens], the declared value where there is no key."""
    inputs = case.build()
    want = prefill_expected(inputs, run.profile)
    lse = run.call(PREFILL, inputs)[1]
    assert lse is not None
    run.within(lse, declared_lse(want.lse, run.supports), want.lse_error, gate=False)


@law(needs=PREFILL, cases=narrowed(prefill_cases, min_batch=2), missing=needs_several_sequences, cost=2)
def test_prefill_sequences_are_independent(run: Run, case: PrefillCase) -> None:
    """A sequence gives the same packed with others as alone: the same bits where the profile claims it."""
    inputs = case.build()
    packed, want = run.call(PREFILL, inputs), prefill_expected(inputs, run.profile)
    for i, (queries, _) in enumerate(_sequences(inputs)):
        if queries.start == queries.stop:
            continue
        one = slice(i, i + 1)
        alone = run.call(PREFILL, _packed(inputs, _spans(inputs.cu_seqlens_q)[one], _spans(inputs.cu_seqlens_k)[one]))
        why = f"sequence {i} of {len(case.seqlens_q)} alone differs from itself packed with the others"
        _require_same(run, alone, _rows(packed, queries), (want.out_error[queries], want.lse_error[:, queries]), why)


def _rows(results: tuple[Result, Result | None], tokens: slice | IntArray) -> tuple[Result, Result | None]:
    """out and LSE of some tokens."""
    out, lse = results
    return out[tokens], None if lse is None else lse[:, tokens]


def _require_same(
    run: Run, got: tuple[Result, Result | None], want: tuple[Result, Result | None], bounds: Any, why: str
) -> None:
    for a, b, bound in zip(got, want, bounds, strict=True):
        if a is None or b is None:
            continue
        if run.profile.batch_invariant:
            run.same_bits(a, b, why)
        else:
            run.same_function(a, b, bound, why)


def _causal(supports: Supports, profile: Profile) -> list[PrefillCase]:
    return [replace(case, causal=True) for case in prefill.ordinary(supports, profile)]


@law(
    needs=PREFILL,
    cases=narrowed(prefill_cases, min_queries=2, causal=True),
    missing=_needs_causal,
    first=_causal,
)
def test_prefill_ignores_future_keys(run: Run, case: PrefillCase) -> None:
    """Changing the last key and value of a sequence changes no bit but of its last query (causal, bottom-right)."""
    inputs = case.build()
    last = inputs.cu_seqlens_k[1:][np.array(case.seqlens_k) > 0] - 1
    k, v = inputs.k.copy(), inputs.v.copy()
    k[last], v[last] = -k[last], -v[last]
    changed, want = run.call(PREFILL, replace(inputs, k=k, v=v)), run.call(PREFILL, inputs)
    past = np.setdiff1d(np.arange(len(inputs.q)), inputs.cu_seqlens_q[1:] - 1)
    if not len(past) or not len(last):
        run.trivial("no query comes before a last key")
    for a, b in zip(_rows(changed, past), _rows(want, past), strict=True):
        if a is not None and b is not None:
            run.same_bits(a, b, "only the last key of each sequence, which these queries do not see, was changed")


@law(
    needs=PREFILL, cases=narrowed(prefill_cases, min_queries=1, min_past=0, causal=True), missing=_needs_causal, cost=2
)
def test_prefill_in_chunks_of_queries(run: Run, case: PrefillCase) -> None:
    """Queries that come in two chunks, the second to the keys of both as after a prefix-cache hit, give the same rows."""
    inputs = case.build()
    whole, want = run.call(PREFILL, inputs), prefill_expected(inputs, run.profile)
    queries, keys = _spans(inputs.cu_seqlens_q), _spans(inputs.cu_seqlens_k)
    rng = np.random.default_rng([case.seed, 7])
    cut = rng.integers(queries[:, 0], queries[:, 1])  # [b], at least one query comes in the second chunk
    for first in (True, False):
        chunk = np.stack([queries[:, 0], cut] if first else [cut, queries[:, 1]], axis=1)
        seen = np.stack([keys[:, 0], keys[:, 1] - (queries[:, 1] - chunk[:, 1])], axis=1)
        tokens = np.concatenate([np.arange(*span) for span in chunk])
        if len(tokens):
            got = run.call(PREFILL, _packed(inputs, chunk, seen))
            bounds = (want.out_error[tokens], want.lse_error[:, tokens])
            why = f"the {'first' if first else 'second'} chunk of queries differs from its rows of the whole"
            _require_same(run, got, _rows(whole, tokens), bounds, why)


@law(
    needs=("prefill", "merge"),
    cases=narrowed(prefill_cases, min_queries=1, min_past=0, causal=True, logit_stds=MERGEABLE),
    missing=_needs_both_masks,
    cost=2,
    first=prefill.full_and_empty_prefixes,
)
def test_chunked_prefill_merges_to_the_whole(run: Run, case: PrefillCase) -> None:
    """Cached keys in chunks that all queries see, and new keys under the causal mask, merged by LSE, are the whole."""
    inputs = case.build()
    queries, keys = _spans(inputs.cu_seqlens_q), _spans(inputs.cu_seqlens_k)
    first_new = keys[:, 1] - np.array(case.seqlens_q)  # [b]
    may_be_empty = run.supports.empty_row != "unsupported"
    chunks = case.seed % 3 + 1 if may_be_empty else int((first_new > keys[:, 0]).all())
    chunks = min(chunks, (run.supports.max_parts or 9) - 1)
    edges = keys[:, :1] + (first_new - keys[:, 0])[:, None] * np.arange(chunks + 1) // max(chunks, 1)
    parts = [_packed(inputs, queries, edges[:, i : i + 2], causal=False) for i in range(chunks)]
    parts.append(_packed(inputs, queries, np.stack([first_new, keys[:, 1]], axis=1)))
    got = []
    for part in parts:
        out, lse = run.call(PREFILL, part)
        assert lse is not None
        got.append((out, lse))
    judge_merged_results(run, got, [prefill_expected(part, run.profile) for part in parts])


@law(needs=PREFILL, cases=prefill_cases, missing=_needs_equal_dims, cost=2)
def test_prefill_of_padded_values(run: Run, case: PrefillCase) -> None:
    """v padded with zeros to the width of QK gives the same, and exactly 0 in the padding."""
    dims = run.supports.prefill_dims
    width = case.qk_head_dim if dims is None else next(d for d, v in dims if d == v)
    narrow = replace(case, qk_head_dim=width, v_head_dim=min(case.v_head_dim, width))
    inputs = narrow.build()
    want = prefill_expected(inputs, run.profile)
    padded = np.concatenate([inputs.v, np.zeros((*inputs.v.shape[:2], width - narrow.v_head_dim))], axis=-1)
    out, lse = run.call(PREFILL, replace(inputs, v=padded))
    judge_attention(run, (out[..., : narrow.v_head_dim], lse), want)
    run.require(not out.value[..., narrow.v_head_dim :].any(), "out must be 0 where v is padded with 0")


@law(
    needs=("prefill", "decode"),
    cases=narrowed(decode_cases, logit_stds=(1.0, 4.0, 0.1, 16.0)),
    missing=_needs_any_dims,
)
def test_prefill_equals_decode(run: Run, case: DecodeCase) -> None:
    """Prefill over a cache's rows, copied to every head, is what decode makes of that cache."""
    inputs = case.build()
    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)  # [b, t, c+r]
    used = np.concatenate([row[:n] for row, n in zip(rows, inputs.cache_seqlens, strict=True)])
    k = np.repeat(used[:, None], case.num_heads, axis=1)  # [key tokens, h, c+r]
    out, lse = run.call(
        PREFILL,
        PrefillInputs(
            q=inputs.q.reshape(-1, *inputs.q.shape[2:]),
            k=k,
            v=k[..., : inputs.head_dim_v],
            cu_seqlens_q=np.arange(len(rows) + 1, dtype=np.int32) * case.s,
            cu_seqlens_k=np.cumsum([0, *inputs.cache_seqlens]).astype(np.int32),
            softmax_scale=inputs.softmax_scale,
            causal=inputs.causal,
        ),
    )
    want = decode_expected(inputs, run.profile)
    decoded, decoded_lse = run.call(DECODE, inputs)
    why = "prefill and decode of the same rows differ"

    def by_token(x: Array) -> Array:
        return x.reshape(out.value.shape)  # [b, s, h, c] -> [b · s, h, c]

    run.same_function(out, decoded.arranged(by_token), want.out_error.map(by_token), why)
    if lse is not None and decoded_lse is not None:

        def by_head(x: Array) -> Array:
            return np.moveaxis(x, 1, 0).reshape(case.num_heads, -1)  # [b, h, s] -> [h, b · s]

        run.same_function(lse, decoded_lse.arranged(by_head), want.lse_error.map(by_head), why)
