"""Laws of the operation ``indexer``: logits of the lightning indexer, and which keys they select."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.bounds.sparse import indexer_with_bound
from mla_spec.judging.law import Run, law
from mla_spec.operations.indexer import OPERATION as INDEXER
from mla_spec.operations.indexer import IndexerCase, IndexerInputs, Selection, indexer_expected, visible_keys
from mla_spec.operations.rope import OPERATION as ROPE
from mla_spec.operations.rope import RopeInputs
from mla_spec.properties.attention import needs_several_sequences
from mla_spec.properties.fixed import indexer
from mla_spec.properties.strategies.indexer import indexer_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.sparse import indexer_logits, select_top_k
from mla_spec.reference.typing import Array, BoolArray, IntArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

THETA = 10000.0


def _needs_logits(supports: Supports) -> str:
    return "" if supports.indexer_logits else "indexer returns no logits"


def _needs_tie_rule(supports: Supports) -> str:
    return "" if supports.indexer_ties == "smaller index" else "any of equal logits may be selected"


def _needs_rope_dims(supports: Supports) -> str:
    dims = supports.indexer_dims
    wide = dims is None or any(d > 1 for _, d in dims)
    return _needs_logits(supports) or ("" if wide else "indexer has no rope dims")


@law(needs=INDEXER, cases=indexer_cases, missing=_needs_logits)
def test_indexer_logits_agree_with_reference(run: Run, case: IndexerCase) -> None:
    """Logits are Σ_h w_h relu(q_h · k) for every visible key, within the worst-case bound of the profile."""
    inputs = case.build()
    logits, _ = INDEXER.expected(inputs, run.profile, run.supports)
    assert logits is not None
    logits.judge(run, run.call(INDEXER, inputs).logits)


def _more_keys(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """A case with more keys than any published model selects."""
    first: list[IndexerCase] = indexer.counts(supports, profile)[:1]
    return first


@law(needs=INDEXER, cases=indexer_cases, first=_more_keys)
def test_indexer_selects_the_largest_logits(run: Run, case: IndexerCase) -> None:
    """Each row names the top_k largest exact logits up to the error of theirs, each key once, then -1."""
    inputs = case.build()
    _, selection = INDEXER.expected(inputs, run.profile, run.supports)
    assert selection is not None
    selection.judge(run, run.call(INDEXER, inputs).indices)
    _require_choice(run, inputs)


def _require_choice(run: Run, inputs: IndexerInputs) -> None:
    """A case is trivial unless some query sees more keys than are selected."""
    if (inputs.end_key - inputs.first_key).max(initial=0) <= inputs.top_k:
        run.trivial(f"no query sees more than top_k = {inputs.top_k} keys")


def _integers(supports: Supports, profile: Profile) -> list[IndexerCase]:
    return [case for case in indexer.counts(supports, profile) if case.regime == "integers"]


@law(needs=INDEXER, cases=narrowed(indexer_cases, regimes=("integers",)), missing=_needs_tie_rule, first=_integers)
def test_indexer_ties_go_to_the_smaller_index(run: Run, case: IndexerCase) -> None:
    """Where logits are exact in every format, the keys named are the reference's: of equal ones the first."""
    inputs = case.build()
    logits = indexer_logits(inputs.q, inputs.k, inputs.weights)
    named = Selection(inputs, logits, np.zeros_like(logits)).named(run, run.call(INDEXER, inputs).indices)
    for i, (first, end) in enumerate(zip(inputs.first_key, inputs.end_key, strict=True)):
        want = first + select_top_k(logits[i, first:end], min(case.top_k, end - first), np.array(end - first))
        got = np.flatnonzero(named[i])
        run.require(
            np.array_equal(got, np.sort(want)),
            f"indices[{i}] names keys {got.tolist()}, want {np.sort(want).tolist()}: of equal logits the smaller index",
        )
    _require_choice(run, inputs)


@law(needs=INDEXER, cases=narrowed(indexer_cases, min_queries=2, min_past=0))
def test_indexer_ignores_future_keys(run: Run, case: IndexerCase) -> None:
    """Changing the last key of a sequence changes no bit but of its last query."""
    inputs = case.build()
    k = inputs.k.copy()
    k[inputs.cu_seqlens_k[1:] - 1] *= -1.0
    past = np.setdiff1d(np.arange(len(inputs.q)), inputs.cu_seqlens_q[1:] - 1)
    why = "only the last key of each sequence, which these queries do not see, was changed"
    _require_same(run, replace(inputs, k=k), inputs, past, why)


@law(
    needs=INDEXER,
    cases=narrowed(indexer_cases, min_batch=2, min_queries=1, min_past=0),
    missing=needs_several_sequences,
)
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
    visible = visible_keys(inputs)[queries]
    (got, got_indices), (want, want_indices) = run.call(INDEXER, changed), run.call(INDEXER, inputs)
    if got is not None and want is not None:
        run.same_bits(_shown(got[queries], visible), _shown(want[queries], visible), why)
    if run.supports.indexer_ties == "smaller index":
        same = np.sort(got_indices.bits[queries]) == np.sort(want_indices.bits[queries])
        run.require(bool(same.all()), f"other keys were selected: {why}")


def _shown(logits: Result, visible: BoolArray) -> Result:
    """0 where a query does not see a key."""
    return logits.arranged(lambda x: np.where(visible, x, 0))


@law(
    needs=(ROPE, INDEXER),
    cases=narrowed(indexer_cases, regimes=("typical",), min_head_dim=2),
    missing=_needs_rope_dims,
    first=indexer.ordinary,
)
def test_indexer_of_rotated_operands(run: Run, case: IndexerCase) -> None:
    """With the leading dims of q and k rotated by the subject, in either layout, logits are those of exact rotation."""
    if case.head_dim < 2:
        run.trivial("no two dims to rotate")
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
        got = run.call(INDEXER, replace(inputs, q=q, k=k)).logits
        try:
            indexer_expected(inputs, want, bound)[0].judge(run, got)
        except Violation as violation:
            raise Violation(f"after rotation in the {layout} layout:\n{violation}") from None


def _rotated(run: Run, x: Array, positions: IntArray, rope: RopeConfig) -> tuple[Array, Array, Array]:
    """(x with its leading dims as the subject rotates them, rotated exactly, the error of that)."""
    part, rest = x[..., : rope.dim], x[..., rope.dim :]
    exact, error = rope_with_bound(part, positions, rope, run.profile.rope, output=run.driver.dtype)
    got = run.call(ROPE, RopeInputs(part, positions, rope)).out.value
    joined = [np.concatenate([y, rest], axis=-1) for y in (got, exact)]
    return joined[0], joined[1], np.concatenate([error.total, np.zeros_like(rest)], axis=-1)
