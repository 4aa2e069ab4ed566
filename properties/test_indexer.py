"""Laws of the operation ``indexer``: logits of the lightning indexer, and which keys they select."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.bounds.sparse import indexer_with_bound
from mla_spec.judging.law import Run, law
from mla_spec.operations.all import IndexerCase
from mla_spec.operations.sparse import IndexerInputs
from mla_spec.operations.sparse_driver import IndexerDriver
from mla_spec.properties.indexer_checks import judge_logits, judge_selection, visible_keys
from mla_spec.properties.memory import require_unmodified
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.properties.strategies.sparse import indexer_cases
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.sparse import select_top_k
from mla_spec.reference.typing import Array, BoolArray, IntArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import INDEXER_VIEWS
from mla_spec.subjects.violation import Violation

INDEXER = ("indexer",)
THETA = 10000.0


def _needs_logits(supports: Supports) -> str:
    return "" if supports.indexer_logits else "indexer returns no logits"


def _needs_tie_rule(supports: Supports) -> str:
    return "" if supports.indexer_ties == "smaller index" else "any of equal logits may be selected"


def _needs_rope_dims(supports: Supports) -> str:
    dims = supports.indexer_dims
    wide = dims is None or any(d > 1 for _, d in dims)
    return _needs_logits(supports) or ("" if wide else "indexer has no rope dims")


def _expected(inputs: IndexerInputs, profile: Profile) -> tuple[Array, ErrorBound]:
    """Exact logits of all pairs of queries and keys, and their bound; [tokens, key tokens]."""
    return indexer_with_bound(inputs.q, inputs.k, inputs.weights, profile)


@law(needs=INDEXER, cases=indexer_cases, missing=_needs_logits)
def test_indexer_logits_agree_with_reference(run: Run, case: IndexerCase) -> None:
    """Logits are Σ_h w_h relu(q_h · k) for every visible key, within the worst-case bound of the profile."""
    inputs = case.build()
    want, bound = _expected(inputs, run.profile)
    judge_logits(run, IndexerDriver(run.driver).call(inputs)[0], want, bound, visible_keys(inputs))


@law(needs=INDEXER, cases=indexer_cases)
def test_indexer_selects_the_largest_logits(run: Run, case: IndexerCase) -> None:
    """Each row names the top_k largest exact logits up to the error of theirs, each key once, then -1."""
    inputs = case.build()
    logits, bound = _expected(inputs, run.profile)
    judge_selection(run, IndexerDriver(run.driver).call(inputs)[1], inputs, logits, bound.total)


@law(needs=INDEXER, cases=narrowed(indexer_cases, regimes=("integers",)), missing=_needs_tie_rule)
def test_indexer_ties_go_to_the_smaller_index(run: Run, case: IndexerCase) -> None:
    """Where logits are exact in every format, the keys named are the reference's: of equal ones the first."""
    inputs = case.build()
    logits, bound = _expected(inputs, run.profile)
    named = judge_selection(run, IndexerDriver(run.driver).call(inputs)[1], inputs, logits, np.zeros_like(bound.total))
    for i, (first, end) in enumerate(zip(inputs.first_key, inputs.end_key, strict=True)):
        want = first + select_top_k(logits[i, first:end], min(case.top_k, end - first), np.array(end - first))
        got = np.flatnonzero(named[i])
        run.require(
            np.array_equal(got, np.sort(want)),
            f"indices[{i}] names keys {got.tolist()}, want {np.sort(want).tolist()}: of equal logits the smaller index",
        )


@law(needs=INDEXER, cases=narrowed(indexer_cases, min_queries=2, min_past=0))
def test_indexer_ignores_future_keys(run: Run, case: IndexerCase) -> None:
    """Changing the last key of a sequence changes no bit but of its last query."""
    inputs = case.build()
    k = inputs.k.copy()
    k[inputs.cu_seqlens_k[1:] - 1] *= -1.0
    past = np.setdiff1d(np.arange(len(inputs.q)), inputs.cu_seqlens_q[1:] - 1)
    why = "only the last key of each sequence, which these queries do not see, was changed"
    _require_same(run, replace(inputs, k=k), inputs, past, why)


@law(needs=INDEXER, cases=narrowed(indexer_cases, min_batch=2, min_queries=1, min_past=0))
def test_indexer_sequences_do_not_see_each_other(run: Run, case: IndexerCase) -> None:
    """NaN in the keys of all other sequences changes no bit of a sequence."""
    inputs = case.build()
    sequence = np.repeat(np.arange(len(case.seqlens_k)), case.seqlens_k)  # [key tokens]
    for i in range(len(case.seqlens_k)):
        k = np.where((sequence == i)[:, None], inputs.k, np.nan)
        own = np.arange(inputs.cu_seqlens_q[i], inputs.cu_seqlens_q[i + 1])
        _require_same(run, replace(inputs, k=k), inputs, own, f"keys of all sequences but {i} were set to nan")


def _require_same(run: Run, changed: IndexerInputs, inputs: IndexerInputs, queries: IntArray, why: str) -> None:
    """The same logits of visible keys, and the same keys selected, for some queries."""
    driver, visible = IndexerDriver(run.driver), visible_keys(inputs)[queries]
    (got, got_indices), (want, want_indices) = driver.call(changed), driver.call(inputs)
    if got is not None and want is not None:
        run.same_bits(_shown(got[queries], visible), _shown(want[queries], visible), why)
    if run.supports.indexer_ties == "smaller index":
        same = np.sort(got_indices[queries]) == np.sort(want_indices[queries])
        run.require(bool(same.all()), f"other keys were selected: {why}")


def _shown(logits: Result, visible: BoolArray) -> Result:
    """0 where a query does not see a key."""
    return logits.arranged(lambda x: np.where(visible, x, 0))


@law(
    needs=("rope", "indexer"),
    cases=narrowed(indexer_cases, regimes=("typical",), min_head_dim=2),
    missing=_needs_rope_dims,
)
def test_indexer_of_rotated_operands(run: Run, case: IndexerCase) -> None:
    """With the leading dims of q and k rotated by the subject, in either layout, logits are those of exact rotation."""
    if case.head_dim < 2:
        return
    inputs = case.build()
    lengths_q, lengths_k = np.array(case.seqlens_q), np.array(case.seqlens_k)
    position_k = np.arange(len(inputs.k)) - np.repeat(inputs.cu_seqlens_k[:-1], lengths_k)
    position_q = np.arange(len(inputs.q)) - np.repeat(
        inputs.cu_seqlens_q[:-1] - np.maximum(lengths_k - lengths_q, 0), lengths_q
    )
    for layout in run.supports.rope_layouts:
        rope = RopeConfig(dim=case.head_dim // 4 * 2 or 2, theta=THETA, interleaved=layout == "interleaved")
        q, exact_q, q_error = _rotated(run, inputs.q, position_q, rope)
        k, exact_k, k_error = _rotated(run, inputs.k, position_k, rope)
        want, bound = indexer_with_bound(
            exact_q, exact_k, inputs.weights, run.profile, q_error=q_error, k_error=k_error
        )
        got = IndexerDriver(run.driver).call(replace(inputs, q=q, k=k))[0]
        try:
            judge_logits(run, got, want, bound, visible_keys(inputs))
        except Violation as violation:
            raise Violation(f"after rotation in the {layout} layout:\n{violation}") from None


def _rotated(run: Run, x: Array, positions: IntArray, rope: RopeConfig) -> tuple[Array, Array, Array]:
    """(x with its leading dims as the subject rotates them, rotated exactly, the error of that)."""
    part, rest = x[..., : rope.dim], x[..., rope.dim :]
    exact, error = rope_with_bound(part, positions, rope, run.profile.rope, output=run.driver.dtype)
    got = run.driver.rope(part, positions, rope).value
    joined = [np.concatenate([y, rest], axis=-1) for y in (got, exact)]
    return joined[0], joined[1], np.concatenate([error.total, np.zeros_like(rest)], axis=-1)


@law(needs=INDEXER, cases=indexer_cases, cost=4)
def test_indexer_reads_strides(run: Run, case: IndexerCase) -> None:
    """Views of larger or transposed tensors are read by their strides."""
    inputs = case.build()
    driver = IndexerDriver(run.driver)
    want, bound = _expected(inputs, run.profile)
    for name, view in INDEXER_VIEWS.items():
        try:
            logits, indices = driver.call(inputs, view(driver.tensors(inputs)))
            judge_logits(run, logits, want, bound, visible_keys(inputs))
            judge_selection(run, indices, inputs, want, bound.total)
        except Violation as violation:
            raise Violation(f"with {name}:\n{violation}") from None


@law(needs=INDEXER, cases=indexer_cases)
def test_indexer_does_not_modify_its_inputs(run: Run, case: IndexerCase) -> None:
    """No argument has changed when indexer returns."""
    inputs = case.build()
    driver = IndexerDriver(run.driver)
    tensors = driver.tensors(inputs)
    require_unmodified(run, "indexer", tensors, lambda: driver.raw(inputs, tensors))


@law(needs=INDEXER, cases=indexer_cases, cost=2)
def test_indexer_calls_are_independent(run: Run, case: IndexerCase) -> None:
    """Nothing of a call (operands, offsets, weights) lives on in the next one with the same shapes."""
    other = replace(case, seed=case.seed + 1, seqlens_q=case.seqlens_q[::-1], seqlens_k=case.seqlens_k[::-1])
    for this in (other, case):
        inputs = this.build()
        want, bound = _expected(inputs, run.profile)
        logits, indices = IndexerDriver(run.driver).call(inputs)
        judge_logits(run, logits, want, bound, visible_keys(inputs))
        judge_selection(run, indices, inputs, want, bound.total)
