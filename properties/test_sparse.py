"""Laws of ``sparse_prefill`` and ``sparse_decode``: attention over the keys that a row of indices selects.

Most statements hold for both operations. Such a one is written once, and makes a law of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.judging.law import Law, Run, as_test, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, decode_expected
from mla_spec.operations.operation import Operation
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillInputs, prefill_expected
from mla_spec.operations.sparse import (
    SPARSE_DECODE,
    SPARSE_PREFILL,
    SparseExpected,
    SparseInputs,
    SparsePrefillCase,
    sparse_expected,
)
from mla_spec.properties.attention import needs_several_sequences
from mla_spec.properties.cases import none
from mla_spec.properties.fixed import sparse_decode, sparse_prefill
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.properties.strategies.sparse import sparse_decode_cases, sparse_prefill_cases
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import BoolArray, IntArray
from mla_spec.subjects.driver import Result, Results
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

MANY_ROWS = 2**16 + 70
"""Rows or slots whose numbers do not fit 16 bits, of which a few are selected."""

Check = Callable[[Operation, Run, Any], None]


def _needs_lse(supports: Supports) -> str:
    return "" if supports.lse else "returns no LSE"


def _needs_sink(supports: Supports) -> str:
    return "" if supports.attention_sink else "takes no attn_sink"


def _needs_length(supports: Supports) -> str:
    return "" if supports.topk_length else "takes no topk_length"


def _needs_empty_rows(supports: Supports) -> str:
    return "has no rule for rows without keys" if supports.empty_row == "unsupported" else ""


def _needs_any_dims(supports: Supports) -> str:
    return "" if supports.prefill_dims is None else "prefill and sparse_prefill take different dims"


def _both(
    prefill: str,
    decode: str = "",
    *,
    missing: Callable[[Supports], str] = lambda _: "",
    cost: int = 1,
    prefill_only: dict[str, Any] | None = None,
    decode_only: dict[str, Any] | None = None,
    rare_first: bool = False,
    **keywords: Any,
) -> Callable[[Check], Check]:
    """Make two laws of a statement about an operation.

    Args:
        prefill, decode: what their names end with; one name for both where ``decode`` is empty.
        rare_first: whether they begin with rows whose first tile selects nothing.
        keywords: for the strategies of both; ``prefill_only`` and ``decode_only`` for one of them.
    """

    def decorate(check: Check) -> Check:
        for operation, strategy, rare, end, own in (
            (SPARSE_PREFILL, sparse_prefill_cases, sparse_prefill.rare, prefill, prefill_only),
            (SPARSE_DECODE, sparse_decode_cases, sparse_decode.rare, decode or prefill, decode_only),
        ):
            of_one = partial(check, operation)
            of_one.__doc__ = check.__doc__
            cases = narrowed(strategy, **keywords, **own or {})
            name = f"test_{operation.name}_{end}"
            first = rare if rare_first else none
            absent = needs_several_sequences if "min_batch" in (own or {}) else missing
            made = Law(name, (operation.name,), cases, of_one, absent, cost=cost, first=first)
            globals()[name] = as_test(made, __name__)
        return check

    return decorate


@_both("agrees_with_reference", rare_first=True)
def _output_agrees(operation: Operation, run: Run, case: Any) -> None:
    """out is attention over the selected keys alone, within the worst-case bound of the profile."""
    inputs = case.build()
    want = sparse_expected(inputs, run.profile)
    run.within(run.call(operation, inputs).out, want.out, want.out_error)


@_both("statistics_agree_with_reference", "lse_agrees_with_reference", missing=_needs_lse, rare_first=True)
def _statistics_agree(operation: Operation, run: Run, case: Any) -> None:
    """The LSE, and max_logits where there are, are those of the selected keys, natural, without the sink."""
    inputs = case.build()
    want, got = sparse_expected(inputs, run.profile).outputs(run.supports), run.call(operation, inputs)
    for name in got.names[1:]:
        want[name].judge(run, getattr(got, name))


def _agrees(operation: Operation, run: Run, case: Any) -> None:
    """Everything returned is within its bound."""
    inputs = case.build()
    run.agrees(operation, inputs, run.call(operation, inputs))


@_both("attention_sink", missing=_needs_sink, sinks=("finite", "infinite"))
def _attention_sink(operation: Operation, run: Run, case: Any) -> None:
    """A sink takes its share of out and of nothing else; -inf takes none, and +inf leaves exactly 0."""
    _agrees(operation, run, case)


@_both("equal_sink_takes_half", missing=_needs_sink, sinks=("finite",))
def _equal_sink_takes_half(operation: Operation, run: Run, case: Any) -> None:
    """A sink that equals the only score takes exactly half of the weight."""
    inputs = case.build()
    indices = np.where(np.arange(case.topk) == 0, np.maximum(inputs.indices, 0) % len(inputs.rows), -1)
    inputs = replace(
        inputs,
        q=np.zeros_like(inputs.q),
        kv=np.rint(2 * inputs.kv),
        indices=indices.astype(np.int32),
        attn_sink=np.zeros(case.num_heads),
        topk_length=None,
    )
    out = run.call(operation, inputs).out
    half = inputs.rows[inputs.entries[..., 0], None, : inputs.head_dim_v] / 2  # [(b,) s, 1, c]
    wrong = out.value != half
    run.require(
        not wrong.any(),
        f"{int(wrong.sum())} of {wrong.size} elements of out are not exactly half the value of the one key, whose score "
        f"equals the sink; first: got {out.value[wrong][:1]}, want {np.broadcast_to(half, wrong.shape)[wrong][:1]}",
    )


@_both("counts_every_occurrence", duplicates=True, min_topk=2)
def _counts_every_occurrence(operation: Operation, run: Run, case: Any) -> None:
    """An index that occurs n times in a row is n keys."""
    _agrees(operation, run, case)


@_both("of_nothing", missing=_needs_empty_rows, invalid=(1.0,), empty_rows=True)
def _of_nothing(operation: Operation, run: Run, case: Any) -> None:
    """Rows that select nothing give what the subject declares, with a sink or without."""
    _agrees(operation, run, case)


def _read_entries(inputs: SparseInputs) -> BoolArray:
    """Which entries come before topk_length, shaped as ``indices``."""
    if inputs.topk_length is None:
        return np.ones(inputs.indices.shape, dtype=bool)
    lead = np.expand_dims(inputs.topk_length, (-2, -1))  # [s or b, 1, 1]
    return np.broadcast_to(np.arange(inputs.indices.shape[-1]) < lead, inputs.indices.shape)


def _selecting(inputs: SparseInputs) -> BoolArray:
    """Which entries name a row, read or not, shaped as ``indices``."""
    return (inputs.indices >= 0) & (inputs.indices < len(inputs.rows))


@_both("ignores_rows_that_no_index_names", "ignores_slots_that_no_index_names", invalid=(0.3, 0.9), min_topk=2)
def _ignores_rows_that_no_index_names(operation: Operation, run: Run, case: Any) -> None:
    """NaN and huge numbers in rows of keys that no index names change no bit."""
    inputs = case.build()
    rows = inputs.rows
    want = run.call(operation, inputs)
    unnamed = np.setdiff1d(np.arange(len(rows)), inputs.indices[_selecting(inputs)])
    for poison in (np.nan, format_of(case.dtype).max_finite):
        poisoned = rows.copy()
        poisoned[unnamed] = poison
        got = run.call(operation, replace(inputs, kv=poisoned.reshape(inputs.kv.shape)))
        run.same(got, want, f"rows that no index names were filled with {poison}")


@_both("invalid_entries_are_alike", invalid=(0.3, 0.9), min_topk=2)
def _invalid_entries_are_alike(operation: Operation, run: Run, case: Any) -> None:
    """-1, the number of rows and the largest integer select nothing alike, anywhere in a row."""
    inputs = case.build()
    valid = _selecting(inputs)
    want = run.call(operation, inputs)
    for nothing in (-1, len(inputs.rows), 2**31 - 1):
        got = run.call(operation, replace(inputs, indices=np.where(valid, inputs.indices, nothing).astype(np.int32)))
        run.same(got, want, f"entries that select nothing were set to {nothing}")


@_both("ignores_entries_beyond_topk_length", missing=_needs_length, with_length=True, min_topk=2)
def _ignores_entries_beyond_topk_length(operation: Operation, run: Run, case: Any) -> None:
    """Whatever the entries from topk_length[i] on say, no bit of query or sequence i changes."""
    inputs = case.build()
    read = _read_entries(inputs)
    want = run.call(operation, inputs)
    rng = np.random.default_rng([case.seed, 8])
    others = rng.integers(0, len(inputs.rows), inputs.indices.shape)
    for other in (others, np.full_like(others, -1)):
        got = run.call(operation, replace(inputs, indices=np.where(read, inputs.indices, other).astype(np.int32)))
        run.same(got, want, "entries from topk_length on were changed")


@_both("order_of_indices", min_topk=2)
def _order_does_not_matter(operation: Operation, run: Run, case: Any) -> None:
    """The order of the indices in a row does not matter, whatever holes it has."""
    inputs = case.build()
    k = inputs.indices.shape[-1]
    keys = np.random.default_rng([case.seed, 9]).random(inputs.indices.shape)
    order = np.argsort(np.where(_read_entries(inputs), keys, 1 + np.arange(k)), axis=-1)  # unread entries stay
    other = replace(inputs, indices=np.take_along_axis(inputs.indices, order, axis=-1))
    got, want = run.call(operation, other), run.call(operation, inputs)
    _same_function(run, got, want, sparse_expected(inputs, run.profile), "the indices of each row were permuted")


def _same_function(run: Run, got: Results, want: Results, bound: SparseExpected, why: str) -> None:
    """Results for the same exact values, each within its bound of them."""
    for name, a, b in zip(got.names, got, want, strict=True):
        if a is not None and b is not None:
            run.same_function(a, b, getattr(bound, f"{name}_error"), why)


@_both(
    "queries_are_independent",
    "sequences_are_independent",
    prefill_only={"min_queries": 2},
    decode_only={"min_batch": 2},
)
def _leading_are_independent(operation: Operation, run: Run, case: Any) -> None:
    """A query of prefill, or a sequence of decode, gives the same alone: the same bits where the profile claims it."""
    inputs = case.build()
    want, together = sparse_expected(inputs, run.profile), run.call(operation, inputs)
    for i in range(len(inputs.q)):
        one = slice(i, i + 1)
        length = None if inputs.topk_length is None else inputs.topk_length[one]
        alone = replace(inputs, q=inputs.q[one], indices=inputs.indices[one], topk_length=length)
        got, there = run.call(operation, alone), together.leading(one)
        why = f"row {i} of {len(inputs.q)} alone differs from itself among the others"
        if run.profile.batch_invariant:
            run.same(got, there, why)
        else:
            _same_function(run, got, there, want[one], why)


def _narrow(supports: Supports, case: Any) -> dict[str, Any]:
    """Widths of rows of which there are many, where the subject leaves the choice."""
    if supports.latent_dims is not None:
        return {}
    return {"kv_lora_rank": min(case.kv_lora_rank, 8), "qk_rope_head_dim": min(case.qk_rope_head_dim, 4)}


@_both("of_many_rows", "of_many_slots", cost=10)
def _of_many_rows(operation: Operation, run: Run, case: Any) -> None:
    """Rows or slots whose numbers do not fit 16 bits are selected as any others."""
    pool = {"s_kv": MANY_ROWS} if operation is SPARSE_PREFILL else {"pages": -(-MANY_ROWS // case.page_size)}
    _agrees(operation, run, replace(case, **pool, **_narrow(run.supports, case)))


def _judge_equal(run: Run, got: Result, want: Result, errors: tuple[ErrorBound, ErrorBound], why: str) -> None:
    """Two results for the same exact value, each within its own bound of it."""
    both = ErrorBound({"sparse": errors[0].total, "dense": errors[1].total})
    try:
        run.within(got, want.value, both, gate=False)
    except Violation as violation:
        raise Violation(f"{violation}\n{why}") from None


def _all_visible(visible: IntArray, rng: np.random.Generator, unit: int) -> IntArray:
    """Rows naming keys 0 .. visible - 1 in random order, with -1 among them, as wide as a multiple of ``unit``."""
    width = -(-max(1, int(visible.max())) // unit) * unit
    rows = np.where(np.arange(width) < visible[..., None], np.arange(width), -1)
    return rng.permuted(rows, axis=-1)


@law(
    needs=(SPARSE_PREFILL, PREFILL),
    cases=narrowed(sparse_prefill_cases, keys_for_all=True, with_length=False, sinks=("none",)),
    missing=_needs_any_dims,
)
def test_sparse_prefill_over_all_keys_is_prefill(run: Run, case: SparsePrefillCase) -> None:
    """Indices of every key that a query sees give what prefill gives, causal or not."""
    if run.supports.num_heads is None:  # prefill has keys of every head
        case = replace(case, num_heads=min(case.num_heads, 16))
    inputs = case.build()
    s, h, _ = inputs.q.shape
    t = case.s_kv
    causal = run.supports.causal[case.seed % len(run.supports.causal)]
    visible = t - s + 1 + np.arange(s) if causal else np.full(s, t)
    every = _all_visible(visible, np.random.default_rng([case.seed, 10]), run.supports.topk_multiple)
    sparse = SparseInputs(**vars(inputs) | {"indices": every[:, None].astype(np.int32)})
    k = np.repeat(inputs.kv, h, axis=1)  # [t, h, c+r]
    dense = PrefillInputs(
        q=inputs.q,
        k=k,
        v=k[..., : inputs.head_dim_v],
        cu_seqlens_q=np.array([0, s], dtype=np.int32),
        cu_seqlens_k=np.array([0, t], dtype=np.int32),
        softmax_scale=inputs.softmax_scale,
        causal=causal,
    )
    got, (out, lse) = run.call(SPARSE_PREFILL, sparse), run.call(PREFILL, dense)
    bounds, dense_bounds = sparse_expected(sparse, run.profile), prefill_expected(dense, run.profile)
    why = "sparse_prefill over all visible keys and prefill differ"
    _judge_equal(run, got.out, out, (bounds.out_error, dense_bounds.out_error), why)
    if got.lse is not None and lse is not None:
        dense_error = dense_bounds.lse_error.map(np.transpose)
        _judge_equal(run, got.lse, lse.arranged(np.transpose), (bounds.lse_error, dense_error), why)


@law(needs=(SPARSE_DECODE, DECODE), cases=decode_cases, cost=2)
def test_sparse_decode_over_all_keys_is_decode(run: Run, case: DecodeCase) -> None:
    """Indices of every slot that a query sees give what decode gives, causal or not."""
    inputs = case.build()
    b, s = inputs.q.shape[:2]
    lengths = inputs.cache_seqlens[:, None] + np.zeros(s, dtype=int)  # [b, s]
    visible = np.maximum(lengths - s + 1 + np.arange(s), 0) if case.causal else lengths
    tokens = _all_visible(visible, np.random.default_rng([case.seed, 10]), run.supports.topk_multiple)
    pages = np.take_along_axis(inputs.block_table, np.maximum(tokens, 0).reshape(b, -1) // case.page_size, axis=1)
    slots = pages.reshape(tokens.shape) * case.page_size + np.maximum(tokens, 0) % case.page_size
    sparse = SparseInputs(
        q=inputs.q,
        kv=inputs.kv_cache,
        indices=np.where(tokens < 0, -1, slots).astype(np.int32),
        head_dim_v=inputs.head_dim_v,
        softmax_scale=inputs.softmax_scale,
        attn_sink=None,
        topk_length=None,
    )
    got, (out, lse) = run.call(SPARSE_DECODE, sparse), run.call(DECODE, inputs)
    bounds, dense_bounds = sparse_expected(sparse, run.profile), decode_expected(inputs, run.profile)
    why = "sparse_decode over all visible slots and decode differ"
    _judge_equal(run, got.out, out, (bounds.out_error, dense_bounds.out_error), why)
    if got.lse is not None and lse is not None:
        _judge_equal(run, got.lse, lse, (bounds.lse_error, dense_bounds.lse_error), why)
