"""Laws of ``sparse_prefill`` and ``sparse_decode``: attention over the keys that a row of indices selects."""

from __future__ import annotations

import numpy as np

from mla_spec.judging.law import Run, law
from mla_spec.operations.all import (
    DecodeCase,
    PrefillInputs,
    SparseDecodeCase,
    SparsePrefillCase,
)
from mla_spec.operations.sparse import SparseInputs
from mla_spec.operations.sparse_driver import SparseDriver
from mla_spec.properties import sparse_checks as check
from mla_spec.properties.expected import decode_expected, prefill_expected
from mla_spec.properties.strategies.sizes import decode_cases, narrowed
from mla_spec.properties.strategies.sparse import sparse_decode_cases, sparse_prefill_cases
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import SPARSE_DECODE_VIEWS, SPARSE_PREFILL_VIEWS

PREFILL = ("sparse_prefill",)
DECODE = ("sparse_decode",)
WITH_SINK = {"sinks": ("finite", "infinite")}
FINITE_SINK = {"sinks": ("finite",)}
WITH_LENGTH = {"with_length": True, "min_topk": 2}
REPEATED = {"duplicates": True, "min_topk": 2}
NOTHING = {"invalid": (1.0,), "empty_rows": True}
HOLES = {"invalid": (0.3, 0.9), "min_topk": 2}


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


@law(needs=PREFILL, cases=sparse_prefill_cases)
def test_sparse_prefill_agrees_with_reference(run: Run, case: SparsePrefillCase) -> None:
    """Out is attention over the selected keys alone, within the worst-case bound of the profile."""
    check.output_agrees(run, case)


@law(needs=DECODE, cases=sparse_decode_cases)
def test_sparse_decode_agrees_with_reference(run: Run, case: SparseDecodeCase) -> None:
    """Out is attention over the selected slots alone, within the worst-case bound of the profile."""
    check.output_agrees(run, case)


@law(needs=PREFILL, cases=sparse_prefill_cases, missing=_needs_lse)
def test_sparse_prefill_statistics_agree_with_reference(run: Run, case: SparsePrefillCase) -> None:
    """Max_logits and LSE [s, h] are those of the selected keys, natural, without the sink."""
    check.statistics_agree(run, case)


@law(needs=DECODE, cases=sparse_decode_cases, missing=_needs_lse)
def test_sparse_decode_lse_agrees_with_reference(run: Run, case: SparseDecodeCase) -> None:
    """The LSE [b, h, s] is that of the selected slots, natural, without the sink."""
    check.statistics_agree(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, **WITH_SINK), missing=_needs_sink)
def test_sparse_prefill_attention_sink(run: Run, case: SparsePrefillCase) -> None:
    """A sink takes its share of out and of nothing else; -inf takes none, and +inf leaves exactly 0."""
    check.agrees(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, **WITH_SINK), missing=_needs_sink)
def test_sparse_decode_attention_sink(run: Run, case: SparseDecodeCase) -> None:
    """A sink takes its share of out and of nothing else; -inf takes none, and +inf leaves exactly 0."""
    check.agrees(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, **FINITE_SINK), missing=_needs_sink)
def test_sparse_prefill_equal_sink_takes_half(run: Run, case: SparsePrefillCase) -> None:
    """A sink that equals the only score takes exactly half of the weight."""
    check.equal_sink_takes_half(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, **FINITE_SINK), missing=_needs_sink)
def test_sparse_decode_equal_sink_takes_half(run: Run, case: SparseDecodeCase) -> None:
    """A sink that equals the only score takes exactly half of the weight."""
    check.equal_sink_takes_half(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, **REPEATED))
def test_sparse_prefill_counts_every_occurrence(run: Run, case: SparsePrefillCase) -> None:
    """An index that occurs n times in a row is n keys."""
    check.agrees(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, **REPEATED))
def test_sparse_decode_counts_every_occurrence(run: Run, case: SparseDecodeCase) -> None:
    """An index that occurs n times in a row is n keys."""
    check.agrees(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, **NOTHING), missing=_needs_empty_rows)
def test_sparse_prefill_of_nothing(run: Run, case: SparsePrefillCase) -> None:
    """Rows that select nothing give what the subject declares, with a sink or without."""
    check.agrees(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, **NOTHING), missing=_needs_empty_rows)
def test_sparse_decode_of_nothing(run: Run, case: SparseDecodeCase) -> None:
    """Rows that select nothing give what the subject declares, with a sink or without."""
    check.agrees(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, **HOLES))
def test_sparse_prefill_ignores_rows_that_no_index_names(run: Run, case: SparsePrefillCase) -> None:
    """NaN and huge numbers in rows of kv that no index names change no bit."""
    check.ignores_rows_that_no_index_names(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, **HOLES))
def test_sparse_decode_ignores_slots_that_no_index_names(run: Run, case: SparseDecodeCase) -> None:
    """NaN and huge numbers in slots that no index names change no bit."""
    check.ignores_rows_that_no_index_names(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, **HOLES))
def test_sparse_prefill_invalid_entries_are_alike(run: Run, case: SparsePrefillCase) -> None:
    """-1, s_kv and the largest integer select nothing alike, anywhere in a row."""
    check.ignores_what_invalid_entries_say(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, **HOLES))
def test_sparse_decode_invalid_entries_are_alike(run: Run, case: SparseDecodeCase) -> None:
    """-1, the number of slots and the largest integer select nothing alike, anywhere in a row."""
    check.ignores_what_invalid_entries_say(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, **WITH_LENGTH), missing=_needs_length)
def test_sparse_prefill_ignores_entries_beyond_topk_length(run: Run, case: SparsePrefillCase) -> None:
    """Whatever the entries from topk_length[i] on say, no bit of row i changes."""
    check.ignores_entries_beyond_topk_length(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, **WITH_LENGTH), missing=_needs_length)
def test_sparse_decode_ignores_entries_beyond_topk_length(run: Run, case: SparseDecodeCase) -> None:
    """Whatever the entries from topk_length[i] on say, no bit of sequence i changes."""
    check.ignores_entries_beyond_topk_length(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, min_topk=2))
def test_sparse_prefill_order_of_indices(run: Run, case: SparsePrefillCase) -> None:
    """The order of the indices in a row does not matter, whatever holes it has."""
    check.order_does_not_matter(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, min_topk=2))
def test_sparse_decode_order_of_indices(run: Run, case: SparseDecodeCase) -> None:
    """The order of the indices in a row does not matter, whatever holes it has."""
    check.order_does_not_matter(run, case)


@law(needs=PREFILL, cases=narrowed(sparse_prefill_cases, min_queries=2))
def test_sparse_prefill_queries_are_independent(run: Run, case: SparsePrefillCase) -> None:
    """A query alone gives what it gives among others: the same bits where the profile claims it."""
    check.leading_are_independent(run, case)


@law(needs=DECODE, cases=narrowed(sparse_decode_cases, min_batch=2))
def test_sparse_decode_sequences_are_independent(run: Run, case: SparseDecodeCase) -> None:
    """A sequence alone gives what it gives in a batch: the same bits where the profile claims it."""
    check.leading_are_independent(run, case)


@law(needs=PREFILL, cases=sparse_prefill_cases, cost=4)
def test_sparse_prefill_reads_strides(run: Run, case: SparsePrefillCase) -> None:
    """Views of larger or transposed tensors are read by their strides."""
    check.reads_strides(run, case, SPARSE_PREFILL_VIEWS)


@law(needs=DECODE, cases=sparse_decode_cases, cost=4)
def test_sparse_decode_reads_strides(run: Run, case: SparseDecodeCase) -> None:
    """Views of larger or transposed tensors are read by their strides."""
    check.reads_strides(run, case, SPARSE_DECODE_VIEWS)


@law(needs=PREFILL, cases=sparse_prefill_cases)
def test_sparse_prefill_does_not_modify_its_inputs(run: Run, case: SparsePrefillCase) -> None:
    """No argument has changed when sparse_prefill returns."""
    check.leaves_inputs_alone(run, case)


@law(needs=DECODE, cases=sparse_decode_cases)
def test_sparse_decode_does_not_modify_its_inputs(run: Run, case: SparseDecodeCase) -> None:
    """No argument has changed when sparse_decode returns."""
    check.leaves_inputs_alone(run, case)


@law(needs=PREFILL, cases=sparse_prefill_cases)
def test_sparse_prefill_output_is_not_aliased(run: Run, case: SparsePrefillCase) -> None:
    """Outputs share no memory with arguments, nor with the outputs of the next call."""
    check.owns_its_outputs(run, case)


@law(needs=DECODE, cases=sparse_decode_cases)
def test_sparse_decode_output_is_not_aliased(run: Run, case: SparseDecodeCase) -> None:
    """Outputs share no memory with arguments, nor with the outputs of the next call."""
    check.owns_its_outputs(run, case)


@law(needs=PREFILL, cases=sparse_prefill_cases, cost=2)
def test_sparse_prefill_calls_are_independent(run: Run, case: SparsePrefillCase) -> None:
    """Nothing of a call (indices, lengths, scale) lives on in the next one with the same shapes."""
    check.calls_are_independent(run, case)


@law(needs=DECODE, cases=sparse_decode_cases, cost=2)
def test_sparse_decode_calls_are_independent(run: Run, case: SparseDecodeCase) -> None:
    """Nothing of a call (indices, lengths, scale) lives on in the next one with the same shapes."""
    check.calls_are_independent(run, case)


def _all_visible(visible: IntArray, rng: np.random.Generator, unit: int) -> IntArray:
    """Rows naming keys 0 .. visible - 1 in random order, with -1 among them, as wide as a multiple of ``unit``."""
    width = -(-max(1, int(visible.max())) // unit) * unit
    rows = np.where(np.arange(width) < visible[..., None], np.arange(width), -1)
    return rng.permuted(rows, axis=-1)


@law(
    needs=("sparse_prefill", "prefill"),
    cases=narrowed(sparse_prefill_cases, keys_for_all=True, with_length=False, sinks=("none",)),
    missing=_needs_any_dims,
)
def test_sparse_prefill_over_all_keys_is_prefill(run: Run, case: SparsePrefillCase) -> None:
    """Indices of every key that a query sees give what prefill gives, causal or not."""
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
    got, (out, lse) = SparseDriver(run.driver, "sparse_prefill").call(sparse), run.driver.prefill(dense)
    bounds, dense_bounds = check.expected(sparse, run.profile), prefill_expected(dense, run.profile)
    why = "sparse_prefill over all visible keys and prefill differ"
    check.judge_equal(run, got.out, out, (bounds.out_error, dense_bounds.out_error), why)
    if got.lse is not None and lse is not None:
        dense_error = dense_bounds.lse_error.map(np.transpose)
        check.judge_equal(run, got.lse, lse.arranged(np.transpose), (bounds.lse_error, dense_error), why)


@law(needs=("sparse_decode", "decode"), cases=decode_cases, cost=2)
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
    got, (out, lse) = SparseDriver(run.driver, "sparse_decode").call(sparse), run.driver.decode(inputs)
    bounds, dense_bounds = check.expected(sparse, run.profile), decode_expected(inputs, run.profile)
    why = "sparse_decode over all visible slots and decode differ"
    check.judge_equal(run, got.out, out, (bounds.out_error, dense_bounds.out_error), why)
    if got.lse is not None and lse is not None:
        check.judge_equal(run, got.lse, lse, (bounds.lse_error, dense_bounds.lse_error), why)
