"""What must hold of sparse attention, whichever operation computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.sparse import max_logits_with_bound, sparse_attention
from mla_spec.judging.law import Run
from mla_spec.operations.sparse import SparseDecodeCase, SparseInputs, SparsePrefillCase
from mla_spec.operations.sparse_driver import SparseDriver, SparseResult, Tensors
from mla_spec.properties.expected import declared_lse
from mla_spec.properties.memory import require_own_outputs, require_unmodified
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array, BoolArray, IntArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.violation import Violation

SparseCase = SparsePrefillCase | SparseDecodeCase


@dataclass(frozen=True)
class SparseExpected:
    """Exact values and their bounds, in the layout in which the operation returns them."""

    out: Array
    out_error: ErrorBound
    max_logits: Array
    max_logits_error: ErrorBound
    lse: Array
    lse_error: ErrorBound

    def __getitem__(self, index: IntArray | slice) -> SparseExpected:
        """Some of the leading axis."""
        return SparseExpected(*(x[index] for x in vars(self).values()))


def expected(inputs: SparseInputs, profile: Profile) -> SparseExpected:
    """Exact attention over the selected rows, and its bound."""
    kv = np.broadcast_to(inputs.rows, (*inputs.q.shape[:-3], *inputs.rows.shape))
    want = sparse_attention(
        inputs.q,
        kv,
        inputs.entries,
        head_dim_v=inputs.head_dim_v,
        softmax_scale=inputs.softmax_scale,
        profile=profile,
        attn_sink=inputs.attn_sink,
        topk_length=inputs.topk_length,
    )
    largest, largest_error = max_logits_with_bound(
        inputs.q,
        kv,
        inputs.entries,
        softmax_scale=inputs.softmax_scale,
        profile=profile,
        topk_length=inputs.topk_length,
    )

    def laid_out(x: Array) -> Array:
        return x.T if inputs.q.ndim == 3 else x  # [s, h] in prefill, [b, h, s] in decode

    return SparseExpected(
        want.out,
        want.out_error,
        laid_out(largest),
        largest_error.map(laid_out),
        laid_out(want.lse),
        want.lse_error.map(laid_out),
    )


def driver_of(run: Run, case: SparseCase) -> SparseDriver:
    """The driver of the case's operation."""
    return SparseDriver(run.driver, case.operation)


def judge_statistics(run: Run, got: SparseResult, want: SparseExpected) -> None:
    """Judge max_logits and LSE, where they are returned."""
    if got.max_logits is not None:
        run.within(got.max_logits, want.max_logits, want.max_logits_error, gate=False)
    if got.lse is not None:
        run.within(got.lse, declared_lse(want.lse, run.supports), want.lse_error, gate=False)


def judge(run: Run, got: SparseResult, want: SparseExpected) -> None:
    """Judge all that was returned."""
    run.within(got.out, want.out, want.out_error)
    judge_statistics(run, got, want)


def agrees(run: Run, case: SparseCase) -> None:
    """Everything returned is within its bound."""
    inputs = case.build()
    judge(run, driver_of(run, case).call(inputs), expected(inputs, run.profile))


def output_agrees(run: Run, case: SparseCase) -> None:
    """Out is within its bound."""
    inputs = case.build()
    want = expected(inputs, run.profile)
    run.within(driver_of(run, case).call(inputs).out, want.out, want.out_error)


def statistics_agree(run: Run, case: SparseCase) -> None:
    """max_logits and LSE are within their bounds."""
    inputs = case.build()
    judge_statistics(run, driver_of(run, case).call(inputs), expected(inputs, run.profile))


def equal_sink_takes_half(run: Run, case: SparseCase) -> None:
    """Every query selects one key, whose score is 0 as the sink's is: out is exactly half of an integer."""
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
    out = driver_of(run, case).call(inputs).out
    half = inputs.rows[inputs.entries[..., 0], None, : inputs.head_dim_v] / 2  # [(b,) s, 1, c]
    wrong = out.value != half
    run.require(
        not wrong.any(),
        f"{int(wrong.sum())} of {wrong.size} elements of out are not exactly half the value of the one key, whose score "
        f"equals the sink; first: got {out.value[wrong][:1]}, want {np.broadcast_to(half, wrong.shape)[wrong][:1]}",
    )


def same_bits(run: Run, got: SparseResult, want: SparseResult, why: str) -> None:
    """No bit of any result differs."""
    for a, b in zip(got.parts(), want.parts(), strict=True):
        run.same_bits(a, b, why)


def same_function(run: Run, got: SparseResult, want: SparseResult, bound: SparseExpected, why: str) -> None:
    """Results for the same exact values, each within its bound of them."""
    errors = (bound.out_error, bound.max_logits_error, bound.lse_error)
    for a, b, error in zip(vars(got).values(), vars(want).values(), errors, strict=True):
        if a is not None and b is not None:
            run.same_function(a, b, error, why)


def read_entries(inputs: SparseInputs) -> BoolArray:
    """Which entries come before topk_length, shaped as ``indices``."""
    if inputs.topk_length is None:
        return np.ones(inputs.indices.shape, dtype=bool)
    lead = np.expand_dims(inputs.topk_length, (-2, -1))  # [s or b, 1, 1]
    return np.broadcast_to(np.arange(inputs.indices.shape[-1]) < lead, inputs.indices.shape)


def selecting(inputs: SparseInputs) -> BoolArray:
    """Which entries name a row, read or not, shaped as ``indices``."""
    return (inputs.indices >= 0) & (inputs.indices < len(inputs.rows))


def ignores_rows_that_no_index_names(run: Run, case: SparseCase) -> None:
    """Poison in rows that occur in no row of indices changes no bit."""
    inputs = case.build()
    driver, rows = driver_of(run, case), inputs.rows
    want = driver.call(inputs)
    unnamed = np.setdiff1d(np.arange(len(rows)), inputs.indices[selecting(inputs)])
    for poison in (np.nan, format_of(case.dtype).max_finite):
        poisoned = rows.copy()
        poisoned[unnamed] = poison
        got = driver.call(replace(inputs, kv=poisoned.reshape(inputs.kv.shape)))
        same_bits(run, got, want, f"rows that no index names were filled with {poison}")


def ignores_what_invalid_entries_say(run: Run, case: SparseCase) -> None:
    """All ways to select nothing are the same, bit for bit."""
    inputs = case.build()
    driver, valid = driver_of(run, case), selecting(inputs)
    want = driver.call(inputs)
    for nothing in (-1, len(inputs.rows), 2**31 - 1):
        got = driver.call(replace(inputs, indices=np.where(valid, inputs.indices, nothing).astype(np.int32)))
        same_bits(run, got, want, f"entries that select nothing were set to {nothing}")


def ignores_entries_beyond_topk_length(run: Run, case: SparseCase) -> None:
    """Entries from topk_length on may name any row, or none."""
    inputs = case.build()
    driver, read = driver_of(run, case), read_entries(inputs)
    want = driver.call(inputs)
    rng = np.random.default_rng([case.seed, 8])
    others = rng.integers(0, len(inputs.rows), inputs.indices.shape)
    for other in (others, np.full_like(others, -1)):
        got = driver.call(replace(inputs, indices=np.where(read, inputs.indices, other).astype(np.int32)))
        same_bits(run, got, want, "entries from topk_length on were changed")


def order_does_not_matter(run: Run, case: SparseCase) -> None:
    """Rows of indices in another order are the same function."""
    inputs = case.build()
    driver = driver_of(run, case)
    k = inputs.indices.shape[-1]
    keys = np.random.default_rng([case.seed, 9]).random(inputs.indices.shape)
    order = np.argsort(np.where(read_entries(inputs), keys, 1 + np.arange(k)), axis=-1)  # unread entries stay
    other = np.take_along_axis(inputs.indices, order, axis=-1)
    got, want = driver.call(replace(inputs, indices=other)), driver.call(inputs)
    same_function(run, got, want, expected(inputs, run.profile), "the indices of each row were permuted")


def leading_are_independent(run: Run, case: SparseCase) -> None:
    """Each query of prefill, or sequence of decode, gives the same alone."""
    inputs = case.build()
    driver, want = driver_of(run, case), expected(inputs, run.profile)
    together = driver.call(inputs)
    for i in range(len(inputs.q)):
        one = slice(i, i + 1)
        length = None if inputs.topk_length is None else inputs.topk_length[one]
        alone = driver.call(replace(inputs, q=inputs.q[one], indices=inputs.indices[one], topk_length=length))
        there = together[one]
        why = f"row {i} of {len(inputs.q)} alone differs from itself among the others"
        if run.profile.batch_invariant:
            same_bits(run, alone, there, why)
        else:
            same_function(run, alone, there, want[one], why)


def reads_strides(run: Run, case: SparseCase, views: dict[str, Callable[[Tensors], Tensors]]) -> None:
    """Views of larger or transposed tensors give the same."""
    inputs = case.build()
    driver, want = driver_of(run, case), expected(inputs, run.profile)
    for name, view in views.items():
        try:
            judge(run, driver.call(inputs, view(driver.tensors(inputs))), want)
        except Violation as violation:
            raise Violation(f"with {name}:\n{violation}") from None


def leaves_inputs_alone(run: Run, case: SparseCase) -> None:
    """No argument has changed after the call."""
    inputs = case.build()
    driver = driver_of(run, case)
    tensors = driver.tensors(inputs)
    require_unmodified(run, case.operation, tensors, lambda: driver.raw(inputs, tensors))


def owns_its_outputs(run: Run, case: SparseCase) -> None:
    """Outputs share no memory with arguments, nor with the outputs of the next call."""
    inputs = case.build()
    driver = driver_of(run, case)
    tensors = driver.tensors(inputs)

    def out_and_lse() -> tuple[object, object]:
        out, *_, lse = driver.raw(inputs, tensors)
        return out, lse

    require_own_outputs(run, tensors, out_and_lse)


def calls_are_independent(run: Run, case: SparseCase) -> None:
    """Nothing of a call lives on in the next one with the same shapes and another scale."""
    driver, first = driver_of(run, case), case.build()
    other = replace(case, seed=case.seed + 1).build()
    # LSEs are about half as large then, and sinks must leave the keys a share.
    sink = None if other.attn_sink is None else other.attn_sink / 2
    for inputs in (first, replace(other, softmax_scale=other.softmax_scale / 2, attn_sink=sink)):
        judge(run, driver.call(inputs), expected(inputs, run.profile))


def judge_equal(run: Run, got: Result, want: Result, errors: tuple[ErrorBound, ErrorBound], why: str) -> None:
    """Two results for the same exact value, each within its own bound of it."""
    both = ErrorBound({"sparse": errors[0].total, "dense": errors[1].total})
    try:
        run.within(got, want.value, both, gate=False)
    except Violation as violation:
        raise Violation(f"{violation}\n{why}") from None
